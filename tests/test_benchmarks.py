"""The benchmarks themselves: what is a regression, what is kept, what a page says of losses and failures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scripts() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))


def test_a_ratio_that_falls_by_more_than_its_noise_fails(scripts: Any) -> None:
    quick = scripts("quick")
    known = {"decode": {"ratio": 2.0, "noise": 0.1}}
    assert quick.judged({"decode": [1.81, 1.85, 1.9]}, known)[1] == []
    assert quick.judged({"decode": [1.7, 1.79, 1.9]}, known)[1] == ["decode"]
    lines, failed = quick.judged({"other": [1.0]}, known)
    assert not failed and "new" in lines[0]
    assert quick.noise([1.0, 1.0, 1.0]) == quick.LEAST_NOISE
    assert quick.noise([1.0, 1.2, 1.4]) == pytest.approx(4 * 0.2 / 1.2)


def test_rows_are_chosen_and_results_kept(scripts: Any, tmp_path: Path) -> None:
    peers = scripts("peers")
    book = peers.Book(tmp_path / "results", ["genai*", "PyTorch eager*"])
    assert book.wants("genai int4") and book.wants("PyTorch eager fp32") and not book.wants("optimum fp32")
    book.write("part", {"a": 1})
    assert peers.Book(tmp_path / "results", []).read("part") == {"a": 1}
    assert book.read("absent") == {}
    adapters = {one.adapter for rows in peers.KINDS.values() for one in rows}
    assert adapters <= set(peers.ADAPTERS)
    assert {name for name in peers.ADAPTERS.values() if name} == set(peers.ENVIRONMENTS)


def test_the_page_shows_losses_and_failures(scripts: Any, tmp_path: Path) -> None:
    peers, page = scripts("peers"), scripts("peers_page")
    book = peers.Book(tmp_path, [])
    runs = [{"prefill_s": 1.0, "decode_s": 2.0}, {"prefill_s": 1.1, "decode_s": 2.2}]
    slower = [{"prefill_s": 2.0, "decode_s": 4.0}, {"prefill_s": 2.2, "decode_s": 4.4}]
    book.write("settings", {"prompt_tokens": 512, "new_tokens": 128, "threads": 2, "rounds": 2, "shapes": []})
    book.write("environments", {"olive": "not installed: no network"})
    book.write("decoder-inference", {
        "genai int4": {"runs": runs, "opened": {"size_mb": 86.5}}, "onnxsmith cpu-gguf": {"runs": slower},
        "optimum fp32": {"runs": [], "error": "ImportError: no module"},
    })  # fmt: skip
    notes = {
        "decoder": dict.fromkeys(["genai int4", "onnxsmith cpu-gguf", "optimum fp32"], ""),
        "encoder": {},
    }
    page.write_page(book, notes, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| onnxsmith cpu-gguf | 0.50 / 0.50 |" in text
    assert "ImportError: no module" in text
    assert "not installed: no network" in text
    assert "64.0" in (tmp_path / "benchmarks-decode.svg").read_text() or "61.1" in text
