"""The report in a real browser: nothing fails, nothing sticks out, everything can be read and printed."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Tab, chromium_program, open_browser
from onnxsmith.pipeline.report_html import render_html
from sample_reports import SAMPLES

pytest.importorskip("jinja2")

pytestmark = pytest.mark.skipif(
    chromium_program() is None,
    reason="needs Chromium: `make browser` where there is apt-get, or a chromium on PATH",
)

Show = Callable[..., None]
WIDTHS = {"phone": 390, "desk": 1200}
# WCAG 2.2, success criterion 1.4.3; and what it calls large text.
CONTRAST, LARGE_CONTRAST = 4.5, 3.0

# Each text with the least contrast to what is behind it, by CSS colours; charts' own texts as well.
_CONTRASTS = """(() => {
  const parse = text => { const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a === undefined ? 1 : a]; };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { const layers = [];
    for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]); };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; n = walker.nextNode();) {
    const e = n.parentElement;
    if (!n.textContent.trim() || !e.getClientRects().length || e.closest('title, style, svg.steps')) continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const back = behind(svg ? svg.parentElement : e);
    const ink = over(parse(svg ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const key = `${e.tagName.toLowerCase()}.${e.getAttribute('class') || ''}`;
    if (!(key in found) || ratio < found[key][0])
      found[key] = [ratio, large, n.textContent.trim().slice(0, 40)];
  }
  return found;
})()"""

# What of an element can be seen: its area, and whether it stands inside of the page.
_SEEN = """(selector => [...document.querySelectorAll(selector)].map(e => {
  const r = e.getBoundingClientRect();
  return r.width > 20 && r.height > 10 && r.right > 0 && r.left < innerWidth; }))"""


_PAPER = "getComputedStyle(document.body).backgroundColor"
_FOLDED = """[...document.querySelectorAll('details .body')]
  .filter(e => e.getBoundingClientRect().height < 40).length"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One browser for all tests."""
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def show(tab: Tab, tmp_path: Path) -> Show:
    """Opens a report with all its details, on a screen of some width."""

    def show(report: dict[str, Any], change: Callable[[str], str] = str, **screen: Any) -> None:
        page = change(render_html(report))
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        tab.show(**({"width": WIDTHS["desk"]} | screen))
        tab.open((tmp_path / "page.html").as_uri())
        if screen.get("media") != "print":
            tab.value_of("document.querySelectorAll('details').forEach(d => { d.open = true })")

    return show


def sticking_out(tab: Tab) -> int:
    """By how many pixels the page is wider than the screen."""
    return int(tab.value_of("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def hard_to_read(tab: Tab) -> dict[str, Any]:
    """Kinds of text with less contrast than readers need."""
    found: dict[str, Any] = tab.value_of(_CONTRASTS)
    assert found, "there is no text"
    return {k: v for k, v in found.items() if v[0] < (LARGE_CONTRAST if v[1] else CONTRAST)}


@pytest.mark.parametrize("sample", SAMPLES)
def test_nothing_fails_sticks_out_or_is_hard_to_read(sample: str, tab: Tab, show: Show) -> None:
    for width in WIDTHS.values():
        for scheme in ("light", "dark"):
            show(SAMPLES[sample](), width=width, scheme=scheme)
            assert tab.said == []
            assert sticking_out(tab) <= 0, (width, scheme)
            assert hard_to_read(tab) == {}, (width, scheme)
    assert tab.value_of("matchMedia('(prefers-color-scheme: dark)').matches") is True
    dark, light = (
        (show(SAMPLES[sample](), scheme=s), tab.value_of("getComputedStyle(document.body).backgroundColor"))[
            1
        ]
        for s in ("dark", "light")
    )
    assert dark != light


def test_what_is_wrong_is_seen(tab: Tab, show: Show) -> None:
    """The control of the test above."""
    script = "<script>nothing()</script><img src='http://example.org/a.png'></body>"
    show(SAMPLES["full"](), lambda page: page.replace("</body>", script))
    assert len(tab.said) >= 2 and any("example.org" in text for text in tab.said)
    wide = "<p style='width: 500px'>wide</p></main>"
    show(SAMPLES["full"](), lambda page: page.replace("</main>", wide), width=390)
    assert sticking_out(tab) > 100 and tab.said == []
    pale = "<p style='color: var(--line)'>pale</p></main>"
    show(SAMPLES["full"](), lambda page: page.replace("</main>", pale))
    assert [found[2] for found in hard_to_read(tab).values()] == ["pale"]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_long_words_do_not_widen_the_page(width: int, tab: Tab, show: Show) -> None:
    for sample in ("full", "minimal", "broken"):
        report = SAMPLES[sample]()
        report["verdict"] = report["command"] = report["source"]["text"] = "x" * 300
        for variant in report["variants"]:
            variant["error"] = "y" * 300 if not variant["passed"] else None
        show(report, width=width)
        assert sticking_out(tab) <= 0, sample


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    ("sample", "parts"),
    [
        ("full", {"#variants .charts figure": 3, "#variants path.front": 1, "#steps svg": 1}),
        ("tuned", {"#tuning figure": 2, "#tuning path.front": 2, "#tuning line.limit": 2}),
        ("looked into", {"#tasks table": 1, "svg.strip": 3, "svg[aria-label^='Relative error']": 3}),
        ("trained", {"#training figure": 1, "#training polyline.held": 1, "#training circle.ring": 1}),
        ("encoder", {"#variants .charts figure": 3, "#variants path.front": 2}),
    ],
)
def test_every_section_is_drawn(sample: str, parts: dict[str, int], width: int, tab: Tab, show: Show) -> None:
    show(SAMPLES[sample](), width=width)
    for selector, count in parts.items():
        # Lines and paths have no height of their own; that they are there is what counts.
        drawn = tab.value_of(f"{_SEEN}({json.dumps(selector)})")
        assert len(drawn) == count, selector
        if not re.search(r"(path|line|circle)\S*$", selector):
            assert all(drawn), selector
    if sample == "looked into":
        headings = tab.value_of("[...document.querySelectorAll('h3')].map(e => e.innerText)")
        assert sum(h.startswith("Where the time goes") for h in headings) == 3


@pytest.mark.parametrize("sample", ["full", "looked into", "tuned", "trained"])
def test_it_prints_whole(sample: str, tab: Tab, show: Show) -> None:
    show(SAMPLES[sample](), width=WIDTHS["desk"], media="print", scheme="dark")
    # Ink on paper, whatever the screen is; and what is folded on the screen is not on paper.
    assert tab.value_of(_PAPER) == "rgb(255, 255, 255)"
    assert tab.value_of(_FOLDED) == 0
    assert hard_to_read(tab) == {}
    pdf = tab.printed()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    drawn = sum(_shown(stream) for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL))
    assert drawn > 500


def _shown(stream: bytes) -> int:
    """How many pieces of text a page of a PDF shows."""
    try:
        content = zlib.decompress(stream)
    except zlib.error:
        return 0
    return len(re.findall(rb"\bT[jJ]\b", content))
