"""The near end of a worker: starts it, asks it, and says clearly how it died."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from onnxsmith import errors
from onnxsmith.errors import OnnxsmithError, WorkerError
from onnxsmith.runtime.environments import Environment
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.kernel_library import prepare_kernels
from onnxsmith.runtime.providers import ProviderChoice
from onnxsmith.runtime.tensor_channel import TensorReader, TensorWriter, channel_directories

__all__ = ["WorkerProcess"]

# Loads this onnxsmith without the rest of the directory that it is installed in: beside it there may be
# another onnxruntime than the worker's.
_START = """
import importlib.util, os, sys
init = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "onnxsmith", init, submodule_search_locations=[os.path.dirname(init)])
module = importlib.util.module_from_spec(spec)
sys.modules["onnxsmith"] = module
spec.loader.exec_module(module)
from onnxsmith.runtime.worker import main
sys.exit(main())
"""


class WorkerProcess:
    """One worker. A context manager.

    Args:
        environment: Whose Python runs it; this one's where None.
        where: What it is for, in messages.
        variables: Environment variables besides those of this process.
    """

    def __init__(
        self,
        environment: Environment | None = None,
        *,
        where: str = "worker",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._where = where
        self._directory = Path(tempfile.mkdtemp(prefix="onnxsmith-worker-"))
        self._prefix = f"onnxsmith-{os.getpid()}-{secrets.token_hex(6)}"
        self._directories = (*channel_directories()[:-1], self._directory)
        self._writer = TensorWriter(self._directories, f"{self._prefix}-in")
        self._reader = TensorReader()
        self._stderr: list[str] = []
        init = str(Path(errors.__file__).with_name("__init__.py"))
        interpreter = sys.executable if environment is None else str(environment.interpreter)
        # Isolated where the environment is another one: neither PYTHONPATH nor the user's site-packages may
        # give it our modules. Else only the folder that the user stands in must not provide any.
        isolation = "-P" if environment is None else "-I"
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            [interpreter, isolation, "-c", _START, init, "onnxsmith.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(variables or {})},
            # Ctrl-C is for the parent, which ends its workers when it has saved what they measured.
            start_new_session=os.name == "posix",
        )
        # Drained by a thread, or a worker that logs much would wait for its pipe forever.
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: The process died.
            OnnxsmithError: What went wrong there.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None, "closed"
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        # Half a line is what a worker that died while it wrote leaves.
        if not line.endswith("\n"):
            raise self._death(process)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._relayed(answer["error"])
        return answer

    def open(
        self,
        graph: GraphFile,
        choice: ProviderChoice,
        *,
        threads: int | None,
        optimize: bool = True,
        record: bool = False,
        name: str,
        affinity: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Opens a graph there; it stays open until the process ends.

        Raises:
            OnnxsmithError: See ``OrtSession``.
        """
        if graph.own_operators:
            # Compiled here, where it is said: the time of loading a model is measured there.
            prepare_kernels(replaceable=graph.brings_operators)
        return self.ask(
            {
                "do": "open",
                "graph": graph.to_json(),
                "provider": {**dataclasses.asdict(choice), "environment": None},
                "threads": threads,
                "optimize": optimize,
                "record": record,
                "name": name,
                "affinity": list(affinity),
                "directories": [str(d) for d in self._directories],
                "prefix": self._prefix,
            }
        )

    def ask_tensors(self, request: Mapping[str, Any], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Sends arrays with a request, and gives the arrays of the answer.

        Raises:
            OnnxsmithError: See ``ask``.
        """
        answer = self.ask({**request, "feeds": self._writer.write(feeds)})
        # The next answer is written over this one.
        return {name: array.copy() for name, array in self._reader.read(answer["tensors"]).items()}

    def close(self) -> None:
        """Ends the process and removes all that it shared. Closing twice is allowed."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._drain.join(timeout=5)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._writer.close()
        self._reader.close()
        for directory in self._directories:
            for left in directory.glob(f"{self._prefix}-*"):
                left.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process; None once it is closed."""
        return None if self._process is None else self._process.pid

    def _read_stderr(self) -> None:
        process = self._process
        assert process is not None and process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self._stderr = [*self._stderr[-20:], line.strip()]

    def _death(self, process: subprocess.Popen[str]) -> WorkerError:
        status = process.wait(timeout=30)
        self._drain.join(timeout=5)
        last = f" ({self._stderr[-1]})" if self._stderr else ""
        ended = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        return WorkerError(
            self._where,
            got=f"its process {ended}{last}",
            expected="an answer",
            remedy="SIGKILL usually says that the system ran out of memory" if status == -9 else None,
        )

    def _relayed(self, plain: Mapping[str, Any]) -> OnnxsmithError:
        """An error of the worker, as if it had been raised here."""
        kind = getattr(errors, plain["kind"], OnnxsmithError)
        if not (isinstance(kind, type) and issubclass(kind, OnnxsmithError)):
            kind = OnnxsmithError
        got = plain["got"]
        if kind is errors.ProviderUnavailableError and "fell back" in got:
            # The reason is in ONNX Runtime's log, which nobody sees here.
            said = [line for line in self._stderr if "ERROR" in line or "error" in line]
            got += f" ({_plain_text(said[-1])})" if said else ""
        error = kind.__new__(kind)
        OnnxsmithError.__init__(
            error, plain["where"], got=got, expected=plain.get("expected"), remedy=plain.get("remedy")
        )
        return error


def _plain_text(line: str) -> str:
    """A line of ONNX Runtime's log without colours and without the place in its sources."""
    for begin in ("[ERROR]", "error:", "]"):
        if begin in line:
            line = line.rpartition(begin)[2]
            break
    return " ".join(line.replace("\x1b", "").split())[:300]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
