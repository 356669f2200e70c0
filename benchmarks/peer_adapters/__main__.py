"""The process of one peer: ``python -m peer_adapters convert|serve ADAPTER VARIANT ...``.

Answers are lines of JSON on the original standard output; what a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters import adapter
from peer_adapters.contract import Decoder, Encoder, tree_bytes


def peak_mb() -> float:
    """The largest resident set of this process, or of one that it started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)


def cpu_s() -> float:
    """Processor seconds of this process and those it started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, kinds))


def convert(name: str, variant: str, source: str, target: str) -> dict[str, Any]:
    """One conversion in this process, imports included."""
    began = time.perf_counter()
    Path(target).mkdir(parents=True)
    adapter(name).convert(variant, Path(source), Path(target))
    return {
        "wall_s": time.perf_counter() - began, "cpu_s": cpu_s(), "peak_mb": peak_mb(),
        "size_mb": tree_bytes(Path(target)) / 1e6, "versions": adapter(name).versions(),
    }  # fmt: skip


class Server:
    """An open model that measures itself when asked."""

    def __init__(self, name: str, variant: str, path: str, threads: str, kind: str) -> None:
        began, used = time.perf_counter(), cpu_s()
        peer = adapter(name)
        opener = peer.open_encoder if kind == "encoder" else peer.open_decoder
        self.model = opener(variant, Path(path), int(threads))
        self.opened = {
            "load_s": time.perf_counter() - began, "load_cpu_s": cpu_s() - used, "peak_mb": peak_mb(),
            "size_mb": tree_bytes(Path(path)) / 1e6, "versions": peer.versions(),
        }  # fmt: skip

    def round(self, ids: list[int], count: int) -> dict[str, Any]:
        """A prompt and its continuation."""
        assert isinstance(self.model, Decoder)
        used, began = time.process_time(), time.perf_counter()
        first = self.model.prefill(ids)
        middle, between = time.perf_counter(), time.process_time()
        more = self.model.decode(count) if count else []
        end, spent = time.perf_counter(), time.process_time()
        return {
            "prefill_s": middle - began, "decode_s": end - middle, "prefill_cpu_s": between - used,
            "decode_cpu_s": spent - between, "tokens": [first, *more], "peak_mb": peak_mb(),
        }  # fmt: skip

    def logits(self, ids: list[int], file: str) -> dict[str, Any]:
        """Logits of a text, into a file."""
        assert isinstance(self.model, Decoder)
        np.save(file, self.model.logits(ids).astype(np.float32, copy=False))
        return {}

    def latency(self, ids: list[Any], mask: list[Any], seconds: float) -> dict[str, Any]:
        """Calls of one batch for so long."""
        assert isinstance(self.model, Encoder)
        one, two = np.array(ids, np.int64), np.array(mask, np.int64)
        times: list[float] = []
        used, began = time.process_time(), time.perf_counter()
        while len(times) < 2 or time.perf_counter() - began < seconds:
            before = time.perf_counter()
            self.model.embed(one, two)
            times.append(time.perf_counter() - before)
        return {"times": times, "cpu_s": (time.process_time() - used) / len(times), "peak_mb": peak_mb()}

    def embed(self, batches: list[Any], file: str) -> dict[str, Any]:
        """Embeddings of many batches, into a file."""
        model = self.model
        assert isinstance(model, Encoder)
        began = time.perf_counter()
        parts = [model.embed(np.array(i, np.int64), np.array(m, np.int64)) for i, m in batches]
        seconds = time.perf_counter() - began
        np.save(file, np.concatenate(parts))
        return {"seconds": seconds}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(make: Callable[[], dict[str, Any]]) -> None:
        try:
            body = make()
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            body = {"error": f"{type(error).__name__}: {text[:300]}"}
        answers.write(json.dumps(body) + "\n")
        answers.flush()

    task, *arguments = sys.argv[1:]
    if task == "convert":
        answer(lambda: convert(*arguments))
        return
    server: list[Server] = []

    def open_server() -> dict[str, Any]:
        server.append(Server(*arguments))
        return server[0].opened

    answer(open_server)
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda request=request: getattr(server[0], request.pop("do"))(**request))  # type: ignore[misc]


main()
