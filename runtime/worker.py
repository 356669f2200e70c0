"""The process in which a model runs apart: its packages and its memory are its own, and so is its crash.

Reads one JSON request a line from standard input and answers with one JSON line on standard output; tensors
go through shared memory. It is started by ``onnxsmith.runtime.worker_process``, perhaps with the Python of
another environment, so what it imports must need nothing but numpy and onnxruntime.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from onnxsmith.environment import peak_rss_mb
from onnxsmith.errors import OnnxsmithError, require
from onnxsmith.runtime.decoding import Decoder, open_decoder
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.plugins import plugin_devices
from onnxsmith.runtime.providers import ProviderChoice
from onnxsmith.runtime.rounds import Round, round_of
from onnxsmith.runtime.session import Session
from onnxsmith.runtime.tensor_channel import TensorReader, TensorWriter

__all__ = ["main"]

# Packages whose versions say something about a result, besides those of ONNX Runtime.
_SHOWN = frozenset({"numpy", "nxrt-ep-cpu", "torch"})


def main() -> int:
    """Serves requests until standard input ends."""
    # Libraries that print must not break the protocol: what they write goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    np.seterr(all="ignore")
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = worker.serve(request)
        except OnnxsmithError as error:
            answer = {
                "error": {
                    "kind": type(error).__name__,
                    "where": error.where,
                    "got": error.got,
                    "expected": error.expected,
                    "remedy": error.remedy,
                }
            }
        except MemoryError:
            answer = {"error": {"kind": "ResourceError", "where": "memory", "got": "not enough of it"}}
        except Exception as error:
            # PyTorch and its compilers fail by errors of all kinds.
            if worker.runs_torch:
                got = f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                answer = {"error": {"kind": "CheckFailedError", "where": "torch", "got": got}}
            else:
                raise
        _send(answers, answer)
    worker.close()
    return 0


def _send(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


class _Worker:
    """What stays between requests."""

    def __init__(self) -> None:
        self._session: OrtSession | None = None
        self._program: tuple[Session, Mapping[str, int]] | None = None
        self._reader = TensorReader()
        self._writer: TensorWriter | None = None
        self._decoder: Decoder | None = None
        self._round: Round | None = None

    def serve(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Does one request."""
        what = request["do"]
        if what == "hello":
            return _describe(request.get("plugin"))
        if what == "open":
            return self._open(request)
        if what == "open program":
            return self._open_program(request)
        if what == "prepare":
            session, limits = self._measured()
            made = round_of(session, request["settings"], limits)
            if self._round is not None:
                _forget_peak()
            self._round = made
            return {"kind": made.kind}
        if what == "round":
            assert self._round is not None
            times = self._round.run()
            return {"times": times, "peak_rss_mb": peak_rss_mb(), "device_memory_mb": device_memory_mb()}
        assert self._session is not None, f"{what!r} before 'open'"
        if what == "run":
            given = self._reader.read(request["feeds"])
            return self._tensors(self._session.run(given, request["outputs"]))
        if what == "placement":
            placement = self._session.placement(measured=request.get("measured", False))
            plain = {"copies": placement.copies, "copied_bytes": placement.copied_bytes}
            return {"placement": placement.to_json(), **plain}
        if what == "kernels":
            return {"kernels": self._session.kernels()}
        if what == "names":
            return {"names": self._session.assigned_names()}
        if what == "profile":
            feeds = self._round.feeds() if self._round is not None else None
            warm = request.get("warm", True)
            return self._session.profile(feeds, runs=request["runs"], warm=warm).to_json()
        if what == "assigned":
            return {"operators": self._session.assigned()}
        if what == "decoder":
            self._decoder = open_decoder(self._session, capacity=request["capacity"])
            return {}
        if what == "reset":
            assert self._decoder is not None
            self._decoder.reset()
            return {}
        if what == "rewind":
            assert self._decoder is not None
            self._decoder.rewind(request["length"])
            return {}
        if what == "step":
            assert self._decoder is not None
            given = self._reader.read(request["feeds"])
            return self._tensors({"logits": self._decoder.step(np.array(given["tokens"]), given.get("mask"))})
        raise ValueError(f"unknown request {what!r}")

    @property
    def runs_torch(self) -> bool:
        """Whether what is open here is a PyTorch program."""
        return self._program is not None

    def close(self) -> None:
        """Frees what was opened."""
        if self._session is not None:
            self._session.close()
        if self._writer is not None:
            self._writer.close()
        self._reader.close()

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("affinity"):
            os.sched_setaffinity(0, request["affinity"])
        directories = tuple(Path(p) for p in request["directories"])
        self._writer = TensorWriter(directories, f"{request['prefix']}-out")
        # This process is killed in the end; what it leaves goes with the directory, which its parent removes.
        tempfile.tempdir = str(directories[-1])
        began = time.perf_counter()
        self._session = OrtSession(
            GraphFile.from_json(request["graph"]),
            provider=ProviderChoice(**request["provider"]),
            threads=request["threads"],
            optimize=request["optimize"],
            record=request["record"],
            name=request["name"],
        )
        loaded = time.perf_counter() - began
        return {
            "load_s": loaded,
            "provider": self._session.provider,
            "own_kernels": self._session.own_kernels,
            "versions": _versions(),
        }

    def _open_program(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from onnxsmith.runtime.torch_session import TorchSession

        if request.get("affinity"):
            os.sched_setaffinity(0, request["affinity"])
        module, _, function = request["loader"].partition(":")
        began = time.perf_counter()
        program = getattr(importlib.import_module(module), function)(**request["arguments"])
        session = TorchSession(program, threads=request["threads"], compiled=request["compiled"])
        self._program = (session, program.limits)
        return {"load_s": time.perf_counter() - began, "versions": _versions()}

    def _measured(self) -> tuple[Session, Mapping[str, int]]:
        if self._program is not None:
            return self._program
        assert self._session is not None
        return self._session, self._session.limits

    def _tensors(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        assert self._writer is not None
        return {"tensors": self._writer.write(arrays)}


def _describe(plugin: Mapping[str, str] | None) -> dict[str, Any]:
    ort = require("onnxruntime", purpose="running an ONNX model")
    names: list[str] = list(ort.get_available_providers())
    if plugin:
        names = [plugin_devices(plugin["name"], plugin["library"])[0].ep_name, *names]
    return {
        "onnxruntime": ort.__version__,
        "versions": _versions(),
        "providers": names,
        "devices": devices(),
    }


def devices() -> list[dict[str, Any]]:
    """The devices that ONNX Runtime sees, with the provider for each; empty before version 1.22."""
    ort = require("onnxruntime", purpose="execution providers")
    if not hasattr(ort, "get_ep_devices"):
        return []
    return [
        {
            "provider": device.ep_name,
            "kind": str(device.device.type).rpartition(".")[2],
            "vendor": device.device.vendor,
            "id": device.device.device_id,
        }
        for device in ort.get_ep_devices()
    ]


def device_memory_mb() -> float | None:
    """Memory of NVIDIA GPUs that this process holds, in MB (10**6 bytes); None where there is no such GPU.

    ONNX Runtime's arena does not give memory back while a session is open, so what is held after a run is
    the most that was needed.
    """
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run(
        [program, "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"],
        capture_output=True, check=False, text=True, timeout=20,
    )  # fmt: skip
    return parse_device_memory(done.stdout, os.getpid())


def parse_device_memory(text: str, pid: int) -> float | None:
    """The memory of a process in what ``nvidia-smi`` prints, in MB; None where it is not listed."""
    used = []
    for line in text.splitlines():
        listed, _, mebibytes = line.partition(",")
        with contextlib.suppress(ValueError):
            if int(listed) == pid:
                used.append(float(mebibytes) * 1024 * 1024 / 1e6)
    return sum(used) if used else None


def _forget_peak() -> None:
    """Lets the peak of resident memory begin anew, where the system can (Linux; see proc(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and (
            name.lower().startswith("onnxruntime") or name.lower() in ("numpy", "nxrt-ep-cpu", "torch")
        ):
            found[name] = distribution.version
    return found


if __name__ == "__main__":
    sys.exit(main())
