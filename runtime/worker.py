"""The process in which a model is measured: its memory is its own, and its crash is nobody else's.

Reads one JSON request a line from standard input and answers with one JSON line on standard output.
Started by ``onnxsmith.runtime.benchmark``; not meant to be run by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from onnxsmith.errors import OnnxsmithError
from onnxsmith.package_io import load_package
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.rounds import LlmRound, PlainRound, Round

__all__ = ["main"]


def peak_rss_mb() -> float:
    """The highest resident memory that this process had, in MB (10**6 bytes).

    On Linux that is VmHWM of proc(5), because getrusage's maximum survives execve: a worker would report
    the memory that its parent had when it forked.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> int:
    """Serves requests until standard input ends."""
    # Libraries that print must not break the protocol: what they write goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _serve(request, state)
        except OnnxsmithError as error:
            answer = {"error": str(error), "exit_status": error.exit_status}
        except MemoryError:
            answer = {"error": "not enough memory", "exit_status": 3}
        _send(answers, answer)
    return 0


def _send(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _serve(request: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "open":
        began = time.perf_counter()
        package = load_package(Path(request["path"]))
        session = OrtSession(
            package,
            provider=request["provider"],
            threads=request["threads"],
            name=request["name"],
        )
        loaded = time.perf_counter() - began
        placement = session.check_placement()
        kind: type[Round] = LlmRound if session.cache else PlainRound
        state["round"] = kind.prepare(session, package, request["settings"])
        return {
            "load_s": loaded,
            "placement": placement.to_json(),
            "provider": session.provider,
            "kind": "llm" if session.cache else "plain",
        }
    if request["do"] == "round":
        return {"times": state["round"].run(), "peak_rss_mb": peak_rss_mb()}
    raise ValueError(f"unknown request {request['do']!r}")


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
