"""The HTML report: complete, self-contained, well-formed, safe against hostile text, and fit for a phone."""

from __future__ import annotations

import copy
import html.parser
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline._report_tradeoffs import tradeoffs
from onnxsmith.pipeline.report_html import render_html
from sample_reports import (
    SAMPLES,
    broken_variant,
    encoder_report,
    full_report,
    looked_into_report,
    minimal_report,
    search_report,
    trained_report,
    variant_report,
)

pytest.importorskip("jinja2")

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr", "base", "source", "area", "embed"}


class Page(html.parser.HTMLParser):
    """Parses a page; fails on tags that do not balance; keeps ids, links, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text_parts: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute: {names}"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text_parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text_parts))


@pytest.mark.parametrize("sample", SAMPLES)
def test_page_is_well_formed_and_shows_nothing_unmeasured(sample: str) -> None:
    page = Page(render_html(SAMPLES[sample]()))
    assert len(page.ids) == len(set(page.ids))
    for _, name, value in page.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in page.ids
    assert not re.search(r"\b(None|nan|NaN|null|inf|Undefined)\b", page.text)
    assert not any(
        re.search(r"None|nan|inf", v) for t, n, v in page.attributes if n in {"x", "y", "d", "width", "cx"}
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_page_fetches_nothing_and_runs_nothing(sample: str) -> None:
    report = SAMPLES[sample]()
    report["source"]["text"] = "https://example.org/model"
    rendered = render_html(report)
    page = Page(rendered)
    assert not {"script", "iframe", "img", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "srcset", "xlink:href", "action"}:
            assert value.startswith(("#", "data:,"))
    assert "url(" not in rendered
    assert "@import" not in rendered
    assert "https://example.org/model" in page.text


def test_full_report_shows_the_headline_ratios_before_the_details() -> None:
    rendered = render_html(full_report())
    head = rendered[: rendered.index("<details")]
    banner = Page(
        head[head.index('<section class="banner"') :].partition("</section>")[0] + "</section>"
    ).text
    assert "int4 chosen" in banner
    assert "5.3× smaller" in banner
    assert "1.06× the reference’s" in banner
    assert "5.1× faster" in banner
    assert "101 MB against 538 MB" in banner
    assert "PASSED" in banner


@pytest.mark.parametrize("shown", [
    "134.5 M", "17.88", "17.0 to 18.8", "93.4 %", "98.1 MB", "100 MB", "812 kB", 
    "2.66 GB expected, 2.71 GB measured", "1 min 11 s", "2.71 GB",
    "block_size 32", "the mask is not causal in layer 0", "shares its weight with the embedding",
    "present × 60",
    "Paris.", "AMD EPYC 9B14", "torch 2.13.0", "onnxsmith run examples/smollm2.yaml", "2026-11-24 04:00 UTC",
    "SimplifiedLayerNormalization", "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "1.2e-5",
])  # fmt: skip
def test_full_report_shows(shown: str) -> None:
    assert shown in Page(render_html(full_report())).text


def test_a_search_is_drawn_with_its_front_its_limits_and_its_points() -> None:
    report = {**full_report(), "tuning": search_report()}
    report["tuning"]["trials"][3]["reason"] = report["tuning"]["trials"][3]["name"] = HOSTILE
    rendered = render_html(report)
    page, part = Page(rendered), rendered.partition('<section id="tuning">')[2].partition("</section>")[0]
    assert "script" not in page.tags and HOSTILE in page.text
    assert "The search saw 50.0 % of the data, in 3 folds" in page.text
    assert "30 points: 26 measured to the end, 2 stopped early, 2 failed" in page.text
    # Size and latency against the loss; the front of each is drawn, and the budget of the loss.
    assert part.count('class="front"') == 2 and part.count('class="limit"') == 2
    # Each point that was measured is in both charts and has a tooltip; the chosen one has a label.
    assert part.count("<title>") == 2 * 28
    assert re.findall(r'<text class="chosen"[^>]*>([^<]*)</text>', part) == ["point 6"] * 2
    assert part.index("point 6</th>".removesuffix("</th>")) < part.index(">point 0<")


def test_the_inside_of_a_variant_is_shown() -> None:
    rendered = render_html(looked_into_report())
    text = Page(rendered).text
    tasks = rendered.partition('<section id="tasks">')[2].partition("</section>")[0]
    assert (
        "0.7740" in tasks and "0.750 to 0.800" in tasks and "−0.0110 to 0.00300" in tasks and "0.31" in tasks
    )
    # 90 weights in each of three strips: 30 with each number of bits, drawn as high as they have bits.
    assert rendered.count('class="strip"') == 3
    heights = {
        tone: float(found)
        for tone, found in re.findall(r'<rect class="(b\d+)"[^>]* height="([\d.]+)"', rendered)
    }
    assert heights == {"b4": 25.6, "b8": 38.4, "b32": 64.0}
    assert "layers.0.q_proj (MatMulNBits): 4 bits, 331,776 values" in rendered
    assert (
        "Error by layer layers.3.q_proj stands out" in text
        and "tensor 9 (MatMulNBits): not finite" in rendered
    )
    assert "Where the time goes 12.2 ms a call" in text and "52.0 %" in text and "memory" in text


def test_one_point_that_is_far_off_does_not_press_the_others_together() -> None:
    from onnxsmith.pipeline._report_pareto import PlotPoint, pareto_chart

    points = [PlotPoint(f"p{n}", "variant", 10.0 + n, 5.0 - n) for n in range(5)]
    chart = pareto_chart([*points, PlotPoint("off", "failed", 9.0, 1e6)], x="size_mb", y="perplexity")
    assert chart is not None
    heights = [p["y"] for p in chart["points"] if p["name"] != "off"]
    assert max(heights) - min(heights) > 60
    (off,) = (p for p in chart["points"] if p["name"] == "off")
    assert off["above"] and off["y"] == chart["top"] and "1,000,000" in off["tip"]


def test_failures_are_in_the_banner_in_the_row_and_in_open_details() -> None:
    rendered = render_html(full_report())
    reason = "25 of 366 tensors differ"
    banner, _, rest = rendered.partition('<section id="variants">')
    table, _, details = rest.partition('<section id="details">')
    assert "int8" in banner
    assert all(reason in part for part in (banner, table, details))
    assert "budget perplexity_increase_pct: 0.5, limit 0.25" in table
    assert '<details id="variant-2" open>' in details
    assert '<details id="variant-1">' in details
    # Twenty of the twenty-five failed tensors, each with its reason (and the summary's own).
    assert details.count("cosine is 0.912345; expected at least 0.98</td>") == 20
    assert "the first 20 of 25" in Page(rendered).text


def test_failed_variant_without_a_reason_still_says_so() -> None:
    report = full_report()
    report["variants"] = [variant_report("int8", passed=False)]
    assert "failed, and the run recorded no reason" in Page(render_html(report)).text


def test_a_run_that_failed_says_so_first() -> None:
    text = Page(render_html(minimal_report())).text
    assert "FAILED" in text
    assert "PASSED" not in text
    assert "No variant was made." in text


def test_missing_parts_leave_no_section() -> None:
    ids = Page(render_html(minimal_report())).ids
    assert ids == ["verdict", "variants", "reproduce"]
    assert Page(render_html(full_report())).ids == [
        "verdict", "variants", "details", "variant-1", "variant-2", "variant-3", "generation",
        "steps", "reproduce", "artifact",
    ]  # fmt: skip


def _hostile(value: Any) -> Any:
    """The report with every string, and every key of a free mapping, hostile."""
    if isinstance(value, str):
        return f"{HOSTILE}\"'&{value}"
    if isinstance(value, list):
        return [_hostile(v) for v in value]
    if isinstance(value, dict):
        free = {"optimization", "rms_normalization", "torch", "Softmax", "CPUExecutionProvider"} & set(value)
        return {(_hostile(k) if free and k != "skipped" else k): _hostile(v) for k, v in value.items()}
    return value


def test_hostile_text_is_escaped_everywhere() -> None:
    report = full_report()
    report["variants"].append(broken_variant("it broke"))
    for variant in report["variants"]:
        for budget in variant["budgets"]:
            # Where it is the name of a measure it is drawn.
            budget["name"] = "nothing that is measured"
    harmless, hostile = Page(render_html(report)), Page(render_html(_hostile(report)))
    assert "script" not in hostile.tags
    # Names that are too long for their step are left out of its bar.
    assert [t for t in hostile.tags if t != "text"] == [t for t in harmless.tags if t != "text"]
    assert HOSTILE in hostile.text
    assert {n for _, n, _ in hostile.attributes} == {n for _, n, _ in harmless.attributes}


@pytest.mark.parametrize("place", ["generation", "source", "error"])
def test_hostile_text_is_shown_as_text(place: str) -> None:
    report = full_report()
    if place == "generation":
        report["generation"]["text"] = HOSTILE
    elif place == "source":
        report["source"]["text"] = HOSTILE
    else:
        report["variants"] = [broken_variant(HOSTILE)]
    rendered = render_html(report)
    assert "<script" not in rendered
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered


def test_text_that_html_or_utf8_cannot_hold_is_replaced() -> None:
    report = full_report()
    report["generation"]["text"] = "a\x00b\x1bc\ud800d"
    rendered = render_html(report)
    assert "a\ufffdb\ufffdc\ufffdd" in rendered
    rendered.encode("utf-8")


# Keys that the report's schema names. The others (parameters, versions, operators, ...) are free.
FREE = {
    "parameters", "details", "versions", "before", "after", "placement", "placement_by_graph", "tolerance",
    "recipe",
}  # fmt: skip


def _key_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, list):
        for entry in value:
            yield from _key_paths(entry, path)
    elif isinstance(value, dict) and not (path and path[-1] in FREE):
        for key, entry in value.items():
            yield (*path, key)
            yield from _key_paths(entry, (*path, key))


def _without(value: Any, path: tuple[str, ...]) -> None:
    if isinstance(value, list):
        for entry in value:
            _without(entry, path)
    elif isinstance(value, dict) and len(path) == 1:
        value.pop(path[0], None)
    elif isinstance(value, dict) and path[0] in value:
        _without(value[path[0]], path[1:])


@pytest.mark.parametrize("path", sorted(set(_key_paths(full_report()))), ids=".".join)
def test_missing_key_is_an_error_that_names_it(path: tuple[str, ...]) -> None:
    report = copy.deepcopy(full_report())
    _without(report, path)
    with pytest.raises(BadInputError, match=f"'{re.escape(path[-1])}'"):
        render_html(report)


def _with_numbers(value: Any, number: float | None, key: str = "") -> Any:
    if isinstance(value, float):
        return number
    if isinstance(value, list):
        return [_with_numbers(v, number) for v in value]
    return {k: _with_numbers(v, number, k) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300, None])
def test_any_number_anywhere_renders(number: float | None) -> None:
    page = Page(render_html(_with_numbers(full_report(), number)))
    assert not re.search(r"\b(None|nan|NaN|inf|Infinity)\b", page.text)
    assert not any(
        re.search(r"None|nan|inf", v) for t, n, v in page.attributes if n in {"x", "y", "d", "width", "cx"}
    )
    if number is not None and math.isinf(number):
        assert "∞" in page.text


def test_report_read_back_from_json_renders_the_same() -> None:
    report = full_report()
    assert render_html(json.loads(json.dumps(report))) == render_html(report)


def test_comparison_shows_the_worst_of_each_group_and_not_the_first() -> None:
    report = full_report()
    tensors = report["variants"][2]["comparison"]["tensors"]
    tensors[40].update(max_abs=77.5, cosine=0.8412345)
    rendered = render_html(report)
    row = next(r for r in re.findall(r"<tr>.*?</tr>", rendered, re.DOTALL) if "77.5" in r)
    assert tensors[40]["name"] in row
    assert "0.841234" in row
    assert "PASS" in row


def test_what_is_gained_is_drawn_against_what_is_lost() -> None:
    charts = tradeoffs(full_report()["reference"], full_report()["variants"])
    assert [(c["x_label"], c["y_label"]) for c in charts] == [
        ("size, MB", "perplexity increase, %"), ("latency, ms", "perplexity increase, %"),
    ]  # fmt: skip
    # int4 is the smallest, fp32 loses nothing, int8 failed: the front goes over the first two.
    size = charts[0]
    places = {p["name"]: p for p in size["points"]}
    assert places["int8"]["kind"] == "failed" and places["torch fp32"]["kind"] == "reference"
    assert (
        size["front"]
        == f"M{places['int4']['x']} {places['int4']['y']}H{places['fp32']['x']}V{places['fp32']['y']}"
    )
    assert size["limit_y"] is not None and size["limit_x"] is not None
    # A model that does not decode is judged by its labels, and by its outputs where there are none.
    report = encoder_report()
    charts = tradeoffs(report["reference"], report["variants"])
    assert [c["y_label"] for c in charts] == ["accuracy, points lost"] * 2
    (int4,) = (p for p in charts[0]["points"] if p["name"] == "int4")
    assert int4["top"] < int4["y"] < int4["bottom"]
    for variant in report["variants"]:
        variant["task_metrics"] = None
    (first, _) = tradeoffs(report["reference"], report["variants"])
    assert first["y_label"] == "1 − lowest cosine of an output"
    assert tradeoffs(report["reference"], report["variants"][:1]) == []


def test_a_model_that_does_not_decode_has_no_empty_columns() -> None:
    text = Page(render_html(encoder_report())).text
    assert "One call" in text and "4.0× faster" in text
    assert "Perplexity" not in text and "Decode" not in text and "Prefill" not in text
    assert "Speed calls/s" in text and "Accuracy 0.770" in text
    assert "Decode" in Page(render_html(full_report())).text


def test_a_run_of_fixed_time_still_says_how_it_was_trained() -> None:
    report = trained_report()
    assert "distill: loss" in Page(render_html(report)).text
    report["steps"] = []
    assert "distill: loss" in Page(render_html(report)).text


def test_an_outlier_stands_at_the_edge() -> None:
    report = full_report()
    assert "arrow" not in re.findall(r'class="variant (\w+)"', render_html(report))
    report["variants"][0] |= {"perplexity_increase_pct": 481000.0}
    assert "arrow" in re.findall(r'class="variant (\w+)"', render_html(report))


def test_labels_of_points_close_together_do_not_overlap() -> None:
    report = full_report()
    for index, variant in enumerate(report["variants"]):
        variant.update(size_mb=100.0 + index, name=f"variant-{index}")
        variant["perplexity_increase_pct"] = 6.0 + index / 100
    labels = re.findall(
        r'<text class="(?:chosen|variant|failed)" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">',
        render_html(report),
    )
    # The first chart; the second has the same names.
    labels = labels[:3]
    sides = {(anchor, y) for _, y, anchor in labels}
    assert len(sides) == 3
    for anchor in ("start", "end"):
        on_side = sorted(float(y) for _, y, a in labels if a == anchor)
        assert all(b - a >= 12 for a, b in itertools.pairwise(on_side))


def test_long_details_of_a_pass_are_counted_and_not_printed() -> None:
    from onnxsmith.pipeline._report_numbers import setting

    layers = {f"model.layers.{n}.weight": {"bits": 4, "shape": [576, 576]} for n in range(60)}
    assert setting(layers) == "60 entries, in report.json"
    assert setting(list(layers)) == "60 entries, in report.json"
    assert setting({"a": 1}) == '{"a": 1}'
    assert setting("x" * 700) == "x" * 700
