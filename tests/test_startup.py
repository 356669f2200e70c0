"""The command line answers at once, and needs neither torch nor ONNX to say what it can do."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

MAX_HELP_S = 0.5
HEAVY = ("torch", "transformers", "onnxruntime", "onnx")

# The same as the console script, for an environment that has none.
MAIN = """
import sys
from onnxsmith.pipeline.cli import main

sys.argv = ["onnxsmith", *sys.argv[1:]]
sys.exit(main())
"""


def without(packages: tuple[str, ...], code: str = MAIN) -> str:
    return f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
{code}
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_is_quick(tmp_path: Path) -> None:
    """Processor time, not wall time: it is one thread, and what else runs on this machine does not count."""
    script = shutil.which("onnxsmith", path=sysconfig.get_path("scripts"))
    command = [script] if script else [sys.executable, "-c", MAIN]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*command, "--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds()  # writes the bytecode
    # A busy processor makes each instruction slower, too, so the best of several is the nearest to the truth.
    best = min(seconds() for _ in range(7))
    assert best < MAX_HELP_S, f"onnxsmith --help took {best:.2f} s of a processor"


@pytest.mark.parametrize("arguments", [["--help"], ["presets"], ["run", "--help"]], ids=" ".join)
def test_says_what_it_can_do_without_heavy_packages(tmp_path: Path, arguments: list[str]) -> None:
    done = run(sys.executable, "-c", without(HEAVY), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("arguments", [["passes"], ["providers"]], ids=" ".join)
def test_lists_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    done = run(sys.executable, "-c", without(("torch", "transformers")), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("package", HEAVY)
def test_the_block_blocks(tmp_path: Path, package: str) -> None:
    done = run(sys.executable, "-c", without(HEAVY, f"import {package}"), cwd=tmp_path)
    assert f"ModuleNotFoundError: No module named '{package}'" in done.stderr
