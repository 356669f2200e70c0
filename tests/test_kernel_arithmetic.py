"""The kernels' arithmetic gives the same bits on every kind of processor.

Another kind than this machine's is tried where `ONNXSMITH_TEST_QEMU` is the path of a `qemu-aarch64` and
`ONNXSMITH_TEST_ZIG` that of a Python that has `ziglang`, which compiles for it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from onnxsmith.runtime.kernel_library import SOURCES
from onnxsmith.runtime.kernels.build import (
    BuildError,
    Compiler,
    compile_commands,
    find_compiler,
    machine_name,
)

PROGRAM = Path(__file__).with_name("kernel_arithmetic.cpp")

pytestmark = pytest.mark.slow


def hashes(compiler: Compiler, directory: Path, machine: str, *runner: str) -> dict[str, str]:
    """Instruction set to the hash of its results."""
    directory.mkdir()
    objects = []
    commands = compile_commands(SOURCES, machine=machine)
    wanted = {name: flags for name, flags in commands.items() if name.startswith(("tiles", "attend_"))}
    for name, flags in (wanted | {PROGRAM.name: commands["tiles.cpp"]}).items():
        source = PROGRAM if name == PROGRAM.name else SOURCES / name
        objects.append(str(directory / f"{name}.o"))
        command = [
            *compiler.command,
            *compiler.flags(flags),
            f"-I{SOURCES}",
            "-c",
            str(source),
            "-o",
            objects[-1],
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
    program = str(directory / "program")
    static = ["-static"] if runner else []
    subprocess.run([*compiler.command, *static, *objects, "-o", program], check=True, capture_output=True)
    said = subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in said.splitlines())


def test_every_instruction_set_of_every_processor(tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    here = hashes(compiler, tmp_path / "here", machine_name())
    assert "generic" in here and len(set(here.values())) == 1, here
    emulator, python = os.environ.get("ONNXSMITH_TEST_QEMU"), os.environ.get("ONNXSMITH_TEST_ZIG")
    if not emulator or not python:
        return
    command = (python, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl")
    cross = Compiler(command, Path(python))
    for cpu, sets in (("max", {"generic", "dotprod"}), ("cortex-a53", {"generic"})):
        there = hashes(cross, tmp_path / cpu, "aarch64", *shlex.split(emulator), "-cpu", cpu)
        assert there.keys() == sets
        assert set(there.values()) == set(here.values()), there
