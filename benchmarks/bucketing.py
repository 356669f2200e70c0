"""What sorting texts by length saves an encoder: ``python benchmarks/bucketing.py MODEL TEXTS``.

Embeds the lines of a file, or a key of a JSONL file, in batches: as they stand, sorted by length as
``onnxsmith evaluate`` does, and one by one. All three in turn, in processor time; prints medians with their
lowest and highest, ratios of rounds, and how much of what was computed was padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxsmith import OrtSession, load_package
from onnxsmith.environment import describe_environment
from onnxsmith.pipeline.tokenization import PackageTokenizer


def texts_of(path: Path, column: str) -> list[str]:
    """Lines, or what is under a key of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line)[column] for line in file]
        return [line.strip() for line in file if line.strip()]


def embed(session: OrtSession, rows: Sequence[Sequence[int]], order: Sequence[int], batch: int) -> float:
    """Runs all rows, and says which part of what was computed was padding."""
    names = {spec.name for spec in session.inputs}
    computed = 0
    for begin in range(0, len(order), batch):
        some = [rows[number] for number in order[begin : begin + batch]]
        ids = np.zeros((len(some), max(map(len, some))), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(some):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        session.run({name: value for name, value in feeds.items() if name in names})
        computed += ids.size
    return 1 - sum(map(len, rows)) / computed


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a package of an encoder")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--column", default="text", help="of a JSONL file")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    package = load_package(Path(given.model))
    tokenizer = PackageTokenizer(package)
    texts = texts_of(given.texts, given.column)[: given.rows]
    rows = [list(one.ids) for one in tokenizer.encode_batch(texts, max_length=512)]
    as_given = list(range(len(rows)))
    by_length = sorted(as_given, key=lambda number: len(rows[number]))
    ways: Mapping[str, tuple[Sequence[int], int]] = {
        "as given": (as_given, given.batch),
        "by length": (by_length, given.batch),
        "one by one": (as_given, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    padding: dict[str, float] = {}
    with OrtSession(package, threads=given.threads) as session:
        for number in range(given.rounds + 1):
            for name, (order, batch) in ways.items():
                began = time.process_time()
                padding[name] = embed(session, rows, order, batch)
                # The first round warms up.
                seconds[name] += [time.process_time() - began] if number else []
    lengths = sorted(map(len, rows))
    print(f"{len(rows)} texts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(rows) // 2]}")
    print(f"batches of {given.batch}, {given.threads} threads, {describe_environment()['cpu']}")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(seconds["as given"], found, strict=True)]
        print(
            f"{name:12} {statistics.median(found):7.3f} s of processor "
            f"({min(found):.3f} to {max(found):.3f}), "
            f"{statistics.median(ratios):.2f} times as fast, {padding[name]:.0%} padding"
        )


if __name__ == "__main__":
    main()
