"""Movie-review snippets with human scores, as labelled rows: from vaderSentiment's source distribution (MIT).

    python examples/snippets.py .models/snippets

writes train.jsonl and test.jsonl (2,000 rows), drawn by chance from those whose mean score is not near
neutral, and neutral.txt with the texts of the others.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

VERSION = "3.3.2"
TESTED = 2000
# Scores go from -4 to 4.
NEUTRAL = 0.5


def download() -> list[tuple[float, str]]:
    """Score and text of each snippet. pip fetches the source, and nothing of it is run."""
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "pip", *command, f"vaderSentiment=={VERSION}", "--dest", directory],
            check=True,
        )  # fmt: skip
        [archive] = Path(directory).glob("*.tar.gz")
        inner = _member(archive.read_bytes(), "hutto_ICWSM_2014.tar.gz")
        text = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", errors="replace")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return [(float(score), text) for _, score, text in rows]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = next(m for m in opened if m.name.endswith(name) and "/._" not in m.name)
        stream = opened.extractfile(found)
        assert stream is not None
        return stream.read()


def write(directory: Path) -> None:
    """Writes the three files."""
    snippets = download()
    labelled = [
        {"text": text, "label": "positive" if score > 0 else "negative"}
        for score, text in snippets
        if abs(score) >= NEUTRAL
    ]
    order = np.random.default_rng(0).permutation(len(labelled))
    parts = {"test.jsonl": order[:TESTED], "train.jsonl": order[TESTED:]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, numbers in parts.items():
        lines = [json.dumps(labelled[n], ensure_ascii=False) for n in numbers]
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    neutral = [text for score, text in snippets if abs(score) < NEUTRAL]
    (directory / "neutral.txt").write_text("\n".join(neutral) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
