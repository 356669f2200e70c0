"""The library with onnxsmith's own operators: compiled once on the user's machine, then loaded.

It is kept in a directory that only the user can write to, because whoever can change it runs code as that
user.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxsmith.errors import KernelsUnavailableError
from onnxsmith.runtime.kernels.build import (
    LIBRARY_NAME,
    SCRATCH_PREFIX,
    BuildError,
    Compiler,
    build,
    compile_commands,
    find_compiler,
    machine_name,
    sources_in,
)
from onnxsmith.user_directories import HOME_VARIABLE, given_home, system_caches

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows, for which nothing is compiled
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FUNCTIONS",
    "ISA_VARIABLE",
    "LIBRARY_VARIABLE",
    "SCRIPT_LINES",
    "SOURCES",
    "KernelLibrary",
    "instruction_set",
    "kernel_files",
    "kernel_library",
    "operators",
    "prepare_kernels",
    "ready_library",
    "register_kernels",
]

LIBRARY_VARIABLE = "ONNXSMITH_KERNELS_LIBRARY"
ISA_VARIABLE = "ONNXSMITH_KERNELS_ISA"
# What runs the operators of a graph where the library is not there.
FUNCTIONS = "functions"
SOURCES = Path(__file__).with_name("kernels")
# For programs that run such a graph without onnxsmith: compiles what ``kernel_files`` put beside them, once.
SCRIPT_LINES = f"""\
library = here / "{SOURCES.name}" / "{LIBRARY_NAME}"
if not library.exists():
    import subprocess
    import sys

    subprocess.run([sys.executable, str(library.with_name("build.py"))])
if library.exists():  # else the graph's own functions run, slowly, where it has some
    options.register_custom_ops_library(str(library))
"""
# Versions of the sources, of a megabyte each.
_MOST_KEPT = 16
_COMPILE_AGAIN = "Run `onnxsmith kernels --build`, which compiles it again"
_OTHERS_WRITE = 0o022
_STICKY = 0o1000


@dataclasses.dataclass(frozen=True)
class KernelLibrary:
    """The compiled operators.

    Attributes:
        path: The library.
        compiler: What it was made with; empty for a library that was given.
        seconds: How long compiling took; 0 for a library that was given.
    """

    path: Path
    compiler: str = ""
    seconds: float = 0.0


def register_kernels(options: Any, *, replaceable: bool = False) -> str:
    """Makes the operators known to the sessions that ``onnxruntime.SessionOptions`` are for.

    Args:
        options: Of the sessions.
        replaceable: Whether the graph brings functions of standard operators for them; see
            ``brings_own_operators``.

    Returns:
        The instruction set that they run with; ``functions`` where there is no library, which is said once.

    Raises:
        KernelsUnavailableError: See ``kernel_library``; or this ONNX Runtime refuses it. Not for a graph that
            brings functions.
    """
    library = prepare_kernels(replaceable=replaceable)
    if library is None:
        return FUNCTIONS
    try:
        options.register_custom_ops_library(str(library.path))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise KernelsUnavailableError(
            str(library.path),
            got=f"ONNX Runtime refuses it: {' '.join(str(error).split())[:300]}",
            expected="ONNX Runtime 1.17 or later, and a library that was compiled for this processor",
            remedy=_COMPILE_AGAIN,
        ) from error
    return instruction_set(library)


def prepare_kernels(*, replaceable: bool) -> KernelLibrary | None:
    """The library for a graph; None where there is none and the graph can be run without, which is said once.

    Args:
        replaceable: See ``register_kernels``.

    Raises:
        KernelsUnavailableError: There is none, and the graph needs it.
    """
    try:
        return kernel_library()
    except KernelsUnavailableError as error:
        if not replaceable:
            raise
        _say_once(f"standard operators run in the place of onnxsmith's own, slowly. {error}")
        return None


def kernel_library(
    *, again: bool = False, sources: Path = SOURCES, on_step: Callable[[str], None] | None = None
) -> KernelLibrary:
    """The library, compiled where that was not done yet for these sources, flags and this compiler.

    ``$ONNXSMITH_KERNELS_LIBRARY`` names one that is ready. Without any compiler, what an earlier one made of
    the same sources will do.

    Args:
        again: Whether to compile even so.
        sources: Where the C++ files are.
        on_step: Called with what takes time; it is written to standard error where None.

    Raises:
        KernelsUnavailableError: No compiler, a file that it does not take, a directory that cannot be
            written, or one to which others can write.
    """
    found = None if again else ready_library(sources)
    if isinstance(found, KernelLibrary):
        return found
    try:
        kept, compiler = _directory() / _sources_key(sources), found or find_compiler()
        return _compiled(sources, kept, compiler, again=again, on_step=on_step or _say)
    except BuildError as error:
        raise _unavailable(error) from error


def ready_library(sources: Path = SOURCES) -> KernelLibrary | Compiler:
    """The library if it is ready, else what would compile it. Nothing is compiled.

    Raises:
        KernelsUnavailableError: Neither is here, or others can write where the library is.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        path = Path(given).expanduser().resolve()
        if not path.is_file():
            raise KernelsUnavailableError(LIBRARY_VARIABLE, got=f"no file {path}", expected="a library")
        _require_own(path)
        return KernelLibrary(path)
    try:
        kept = _directory() / _sources_key(sources)
        try:
            compiler = find_compiler()
        except BuildError:
            found = _found(kept, None)
            if found is None:
                raise
            return found
        return _found(kept, compiler) or compiler
    except BuildError as error:
        raise _unavailable(error) from error


def _unavailable(error: BuildError) -> KernelsUnavailableError:
    return KernelsUnavailableError(
        error.where, got=error.got, expected=error.expected or None, remedy=error.remedy or None
    )


def kernel_files() -> dict[str, bytes]:
    """What stands beside a graph with such operators, where no onnxsmith is: their sources and ``build.py``.

    Returns:
        Path below the graph's directory to content.
    """
    names = [*sources_in(SOURCES), SOURCES / "build.py"]
    return {f"{SOURCES.name}/{path.name}": path.read_bytes() for path in names}


def instruction_set(library: KernelLibrary) -> str:
    """The instruction set that the library chose for this processor, such as ``avx512vnni``.

    ``$ONNXSMITH_KERNELS_ISA`` asks for another one that the processor has.

    Raises:
        KernelsUnavailableError: It does not load, or has not what the variable asks for.
    """
    chosen = str(_function(library, "onnxsmith_kernels_isa")().decode())
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and wanted != chosen:
        raise KernelsUnavailableError(
            ISA_VARIABLE,
            got=f"{wanted!r}, which this processor or the library has not",
            expected=f"{chosen}, the fastest that it has, or a simpler one such as generic",
        )
    return chosen


def operators(library: KernelLibrary) -> list[str]:
    """The names of its operators.

    Raises:
        KernelsUnavailableError: It does not load.
    """
    name_of = _function(library, "onnxsmith_kernels_operator")
    name_of.argtypes = [ctypes.c_size_t]
    return [name.decode() for name in iter(map(name_of, itertools.count()).__next__, None)]


def _function(library: KernelLibrary, name: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(str(library.path)), name)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError(
            str(library.path),
            got=f"it does not load: {error}",
            expected="a library of these sources, for this processor",
            remedy=_COMPILE_AGAIN,
        ) from error
    function.restype = ctypes.c_char_p
    return function


def _say(what: str) -> None:
    sys.stderr.write(f"onnxsmith: {what}\n")
    sys.stderr.flush()


@functools.cache
def _say_once(what: str) -> None:
    _say(what)


def _directory() -> Path:
    home = given_home()
    return home / "kernels" if home else system_caches() / "onnxsmith-kernels"


def _sources_key(sources: Path) -> str:
    digest = hashlib.sha256(f"{sys.platform} {machine_name()}".encode())
    for name, flags in compile_commands(sources).items():
        digest.update(f"{name} {flags}\n".encode())
    for path in sources_in(sources):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _file_name(compiler: Compiler) -> str:
    """Of the library that a compiler makes; another one after an upgrade.

    Not from the version that it prints: nothing is started where a library is only loaded.
    """
    status = compiler.file.stat() if compiler.file.exists() else None
    identity = (compiler.command, str(compiler.file), status and (status.st_size, status.st_mtime_ns))
    return f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"


def _found(kept: Path, compiler: Compiler | None) -> KernelLibrary | None:
    if compiler is not None:
        path = kept / _file_name(compiler)
    else:
        # By whichever compiler there was before.
        made = sorted(kept.glob("*.so"), key=lambda one: one.stat().st_mtime) if kept.is_dir() else []
        path = made[-1] if made else kept / "none"
    if not path.is_file():
        return None
    _require_own(path)
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return KernelLibrary(path.resolve(), str(record["compiler"]), float(record["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        # Written after the library, by a process that was killed in between.
        return KernelLibrary(path.resolve())


def _compiled(
    sources: Path, kept: Path, compiler: Compiler, *, again: bool, on_step: Callable[[str], None]
) -> KernelLibrary:
    try:
        kept.parent.parent.mkdir(parents=True, exist_ok=True)
        for directory in (kept.parent, kept):
            directory.mkdir(mode=0o700, exist_ok=True)
        path = kept / _file_name(compiler)
        with _alone(kept / ".lock"):
            _require_own(kept)
            if not again:
                found = _found(kept, compiler)
                if found is not None:
                    return found
            for left in kept.glob(f"{SCRATCH_PREFIX}*"):
                # Of a process that was killed: whoever compiles has the lock.
                shutil.rmtree(left, ignore_errors=True)
            version = compiler.version()
            on_step(f"compiling kernels with {version}, which is done once")
            began = time.perf_counter()
            build(sources, path, compiler)
            seconds = round(time.perf_counter() - began, 1)
            record = {"compiler": version, "command": list(compiler.command), "seconds": seconds}
            path.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            _forget_old(kept.parent)
    except OSError as error:
        raise KernelsUnavailableError(
            str(kept),
            got=f"cannot be written: {error.strerror}",
            expected="a directory for what is compiled",
            remedy=f"Set {HOME_VARIABLE} to a directory of your own, or {LIBRARY_VARIABLE} to a library that "
            "`onnxsmith kernels --build` made elsewhere",
        ) from error
    return KernelLibrary(path.resolve(), version, seconds)


def _forget_old(directory: Path) -> None:
    """Keeps the libraries that were compiled last; who still has an older one loaded goes on with it."""
    places = [place for place in directory.iterdir() if place.is_dir()]
    for place in sorted(places, key=lambda one: one.stat().st_mtime)[:-_MOST_KEPT]:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process compiles the same; the system ends the wait for one that was killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _require_own(path: Path) -> None:
    """Refuses what others could have put there, or could put there now.

    A file and its directory must be the user's, or the system's, and closed to others. Above them others may
    write where the sticky bit keeps them from what is not theirs, as in ``/tmp``, and a group that is the
    user's alone is no other.

    Raises:
        KernelsUnavailableError: Others can write there.
    """
    real = path.resolve()
    near = (real, real.parent) if real.is_file() else (real,)
    for place in (real, *real.parents):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise _foreign(place, f"it belongs to user {status.st_uid}", real)
        open_to = status.st_mode & _OTHERS_WRITE
        if place not in near:
            if status.st_mode & _STICKY:
                continue
            if open_to == 0o020 and _is_private_group(status.st_uid, status.st_gid):
                continue
        if open_to:
            raise _foreign(place, f"others can write to it (mode {status.st_mode & 0o7777:o})", real)


def _foreign(place: Path, got: str, library: Path) -> KernelsUnavailableError:
    return KernelsUnavailableError(
        str(place),
        got=got,
        expected="a place that only the user can write to, because code is loaded from there",
        remedy=f"Run `chmod go-w {place}` if it is yours, or set {HOME_VARIABLE} to a directory of your own",
    )


def _is_private_group(user: int, group: int) -> bool:
    """Whether a group is the one that the system made for this user alone, which has the user's name."""
    import grp
    import pwd

    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(user).pw_name
    except KeyError:
        return False
