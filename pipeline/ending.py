"""How a command ends: an exit status, and a message of one line instead of a traceback."""

from __future__ import annotations

import _thread
import atexit
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

from onnxsmith.errors import OnnxsmithError

__all__ = ["FAILED", "INTERRUPTED", "end_on_signals", "guarded", "run_and_leave"]

P = ParamSpec("P")

FAILED = 1
_LACKING = 3
INTERRUPTED = 130

# What the system refuses for want of something, wherever it happens.
_LACKS = frozenset(
    {
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EROFS,
    }
)


def end_on_signals() -> None:
    """Lets SIGTERM do what Ctrl-C does, and neither of them get lost.

    A scheduler's polite end is an interrupt: what was begun is cleaned up. Python drops an exception that
    is raised while a destructor runs, and tracing a model runs many of them, so such an interrupt is
    raised again.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    before = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # By SIGTERM, because Ctrl-C is ignored in a shell's background; later, because it would be lost here.
        timer = threading.Timer(0.01, _thread.interrupt_main, (signal.SIGTERM,))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again


def run_and_leave(command: Callable[[], Any]) -> NoReturn:
    """Runs a command and ends the process, without taking apart what it has in memory.

    Python frees every module and every object one by one at its end, which takes longer than a second once
    PyTorch is there; the system frees all of it at once. What waits for an end is called as always.
    """
    status = 0
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    threads: Any = threading
    threads._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Nobody reads it any more.
            continue
    os._exit(status)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """Turns what a command raises or returns into an exit status, without a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            status = command(*args, **kwargs)
            sys.stdout.flush()
        except OnnxsmithError as error:
            _fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was changed", INTERRUPTED)
        except MemoryError:
            _fail("not enough memory for this model; use a machine with more", _LACKING)
        except BrokenPipeError:
            # Whoever read our output has seen enough. Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except Exception as error:
            if "ONNXSMITH_TRACEBACK" in os.environ:
                raise
            if isinstance(error, OSError) and error.errno in _LACKS:
                where = f"{error.filename}: " if error.filename else ""
                _fail(f"{where}the system refuses: {error.strerror}", _LACKING)
            text = " ".join(str(error).split())[:500]
            _fail(
                f"internal error: {type(error).__name__}: {text}. This is a fault of onnxsmith; "
                "please report it with the output of ONNXSMITH_TRACEBACK=1",
                FAILED,
            )
        if status:
            raise SystemExit(status)

    return run


def _fail(text: str, status: int) -> NoReturn:
    # What another program put into a message must not move the cursor or hide what stands before it.
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    sys.stderr.write(f"onnxsmith: {shown}\n")
    raise SystemExit(status) from None
