"""Compiles the C++ files beside it into one library of operators for ONNX Runtime.

``python build.py [LIBRARY]`` needs Python and a C++ compiler, and nothing else: these files also stand beside
graphs that use the operators, where no onnxsmith is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "LIBRARY_NAME",
    "SCRATCH_PREFIX",
    "BuildError",
    "Compiler",
    "build",
    "compile_commands",
    "find_compiler",
    "machine_name",
    "sources_in",
]

LIBRARY_NAME = "libonnxsmith_kernels.so"
SCRATCH_PREFIX = ".build-"
# Products and sums must not be joined where one compiler would and another would not: results are the same
# bits everywhere.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden")
# A Python from conda brings a C++ library that may be older than the compiler's: ours goes with us where
# there is a static one.
_LINKS = (("-static-libstdc++", "-static-libgcc", "-s", "-Wl,--exclude-libs,ALL"), ("-s",), ())
_SOURCES = (".cpp", ".h", ".inl")
_CANDIDATES = ("c++", "g++", "clang++")
_REMEDY = (
    "Install g++ or clang++ with the system's package manager, or run `pip install ziglang`, "
    "which brings one to this Python"
)


class BuildError(Exception):
    """The library cannot be made here.

    Attributes:
        where: The file or program at fault.
        got: What was found.
        expected: What would have been right.
        remedy: What the reader can do.
    """

    def __init__(self, where: str, *, got: str, expected: str = "", remedy: str = "") -> None:
        self.where, self.got, self.expected, self.remedy = where, got, expected, remedy
        super().__init__(
            f"{where}: {got}"
            + (f"; expected {expected}" if expected else "")
            + "."
            + (f" {remedy}." if remedy else "")
        )


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: The program with its first arguments.
        file: The program's file, which changes when it is upgraded.
    """

    command: tuple[str, ...]
    file: Path

    @property
    def name(self) -> str:
        """As a person would call it."""
        return shlex.join(self.command)

    def flags(self, flags: Sequence[str]) -> tuple[str, ...]:
        """Flags as this compiler calls them: zig has its own names of processors.

        By itself it compiles for the very one that it runs on, and a home may be shared by several.
        """
        if not any("zig" in Path(part).name for part in self.command):
            return tuple(flags)
        renamed = [re.sub(r"^-march=[\w.-]+\+", "-mcpu=baseline+", flag) for flag in flags]
        return ("-mcpu=baseline", *renamed)

    def version(self) -> str:
        """The first line that it says of itself.

        Raises:
            BuildError: It cannot be started.
        """
        return _run([*self.command, "--version"], self.name).splitlines()[0].strip()


def machine_name() -> str:
    """The kind of processor: ``x86_64``, ``aarch64``, or what the system calls it.

    Raises:
        BuildError: Nothing can be compiled for this system.
    """
    if sys.platform not in ("linux", "darwin") or sys.byteorder != "little" or sys.maxsize < 2**32:
        raise BuildError(
            "kernels of onnxsmith's own operators",
            got=f"this is {platform.system()} on {platform.machine()}",
            expected="Linux or macOS on a 64 bit processor with the low byte first",
            remedy="Use a preset without these operators, which every system runs",
        )
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def find_compiler() -> Compiler:
    """``$CXX``, else c++, g++ or clang++ of the search path, else that of the Python package ``ziglang``.

    Raises:
        BuildError: There is none, or ``$CXX`` is no program.
    """
    given = os.environ.get("CXX", "").strip()
    if given:
        try:
            command = tuple(shlex.split(given))
        except ValueError:  # a quotation that does not end
            command = (given,)
        file = shutil.which(command[0])
        if file is None:
            raise BuildError(
                "$CXX", got=f"{given!r}, which is no program here", expected="a C++ compiler", remedy=_REMEDY
            )
        return Compiler(command, _file_of(command, file))
    for name in _CANDIDATES:
        file = shutil.which(name)
        if file is not None:
            return Compiler((name,), Path(file).resolve())
    command = (sys.executable, "-m", "ziglang", "c++")
    if importlib.util.find_spec("ziglang") is not None:
        return Compiler(command, _file_of(command, sys.executable))
    raise BuildError(
        "kernels of onnxsmith's own operators",
        got=f"no C++ compiler is installed ({', '.join(('$CXX', *_CANDIDATES, 'ziglang'))} were looked for)",
        expected="one that knows C++17",
        remedy=_REMEDY,
    )


def _file_of(command: Sequence[str], program: str) -> Path:
    """What is upgraded when the compiler is."""
    if "ziglang" in command:
        spec = importlib.util.find_spec("ziglang")
        if spec is not None and spec.origin:
            return Path(spec.origin).with_name("zig")
    return Path(program).resolve()


def sources_in(directory: Path) -> list[Path]:
    """All files that a library is made of: what is compiled, and what that includes."""
    return sorted(path for path in directory.iterdir() if path.suffix in _SOURCES)


def compile_commands(directory: Path, *, machine: str = "") -> dict[str, tuple[str, ...]]:
    """The files that are compiled for a kind of processor, this one's if none is named, each with its flags.

    The first lines of a file may say ``// flags: -mavx2 -mfma``, which are added to those of all files, and
    ``// only: x86_64`` where it is for one kind of processor.

    Raises:
        BuildError: There is nothing to compile, or nothing can be compiled for this system.
    """
    machine = machine or machine_name()
    commands = {}
    for path in sources_in(directory):
        if path.suffix != ".cpp":
            continue
        flags: list[str] = []
        wanted = True
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("//"):
                break
            told = re.fullmatch(r"//\s*(flags|only):\s*(.*?)\s*", line)
            if told and told[1] == "only":
                wanted = machine in told[2].split()
            elif told:
                flags += shlex.split(told[2])
        if wanted:
            commands[path.name] = (*FLAGS, *flags)
    if not commands:
        raise BuildError(str(directory), got="no C++ files", expected="the sources of the kernels")
    return commands


def build(directory: Path, library: Path, compiler: Compiler | None = None) -> None:
    """Compiles all files at the same time, links them, tries the library, and puts it in its place.

    Nobody ever sees half of a library: it is made beside its place and renamed.

    Args:
        directory: Where the C++ files are.
        library: What to make; its directory exists.
        compiler: What to make it with; see ``find_compiler``.

    Raises:
        BuildError: A file does not compile, the library does not load, or its place cannot be written.
    """
    commands = compile_commands(directory)
    compiler = compiler or find_compiler()
    try:
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=library.parent)
    except OSError as error:
        raise BuildError(
            str(library.parent),
            got=f"cannot be written: {error.strerror}",
            expected="one's own directory",
        ) from error
    with scratch as made:

        def compiled(name: str) -> str:
            made_file = os.path.join(made, f"{name}.o")
            flags = compiler.flags(commands[name])
            _run([*compiler.command, *flags, "-c", str(directory / name), "-o", made_file], name)
            return made_file

        with ThreadPoolExecutor(_processors()) as pool:
            files = list(pool.map(compiled, commands))
        new = Path(made) / library.name
        shared = (*compiler.command, *compiler.flags(()), "-shared")
        for number, link in enumerate(_LINKS):
            try:
                _run([*shared, *files, *link, "-o", str(new)], "linker")
            except BuildError:
                if number == len(_LINKS) - 1:
                    raise
            else:
                break
        _try(new, compiler)
        new.chmod(0o644)
        new.replace(library)


def _processors() -> int:
    with contextlib.suppress(AttributeError):  # macOS has no affinity
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _try(library: Path, compiler: Compiler) -> None:
    try:
        _ = ctypes.CDLL(str(library)).RegisterCustomOps
    except (OSError, AttributeError) as error:
        raise BuildError(
            str(library),
            got=f"what {compiler.name} made does not load: {error}",
            expected="a library with RegisterCustomOps, in a directory from which programs may be run",
        ) from error


def _run(command: Sequence[str], where: str) -> str:
    program = shlex.join(command[:3] if "-m" in command[:2] else command[:1])
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise BuildError(where, got=f"{program} does not start: {error.strerror}", remedy=_REMEDY) from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise BuildError(
            where,
            got=f"{program} fails: {said[:400]}",
            expected="a compiler that knows C++17 and the flags of this file",
            remedy=_REMEDY + "; $CXX chooses one",
        )
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Makes the library, beside this file if no other place is given."""
    here = Path(__file__).resolve().parent
    library = Path(arguments[0]).resolve() if arguments else here / LIBRARY_NAME
    try:
        build(here, library)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    sys.stdout.write(f"{library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
