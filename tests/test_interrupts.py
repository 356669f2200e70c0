"""What Ctrl-C leaves: exit status 130, no traceback, and what was done until then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import heed_interrupts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# Says on standard output what begins: a signal comes at a known point, and not after a guess of seconds.
SPOKEN = """
import contextlib, sys
from onnxsmith.pipeline import cli, console
from onnxsmith.progress import Progress, Step
class Spoken(Progress):
    @contextlib.contextmanager
    def step(self, name, total=None):
        with super().step(name, total) as step:
            advance = step.advance
            def told(count=1, *, note=""):
                print("at", note or name, flush=True)
                advance(count, note=note)
            step.advance = told
            print("at", name, flush=True)
            yield step
console.progress_for = lambda stream=None: Spoken()
cli.main()
"""


def interrupted(
    arguments: Sequence[object], directory: Path, at: str, *, group: bool
) -> tuple[int, str, list[str]]:
    """Runs a command and sends SIGINT when it says ``at``: to its process alone, or to its group."""
    child = subprocess.Popen(
        [sys.executable, "-c", SPOKEN, *map(str, arguments)],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert child.stdout is not None
    said = []
    for line in child.stdout:
        said.append(line.strip())
        if at in line:
            break
    time.sleep(0.05)
    (os.killpg if group else os.kill)(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert "Traceback" not in err, err
    return child.returncode, err, [*said, *out.splitlines()]


def deep_model(path: Path, layers: int, wrong: int | None = None) -> None:
    """A long chain of matrix products; one of its weights is wrong."""
    random = np.random.default_rng(0)
    nodes, weights = [], []
    value = "x"
    for number in range(layers):
        weight = (random.standard_normal((24, 24)) / 5).astype(np.float32)
        if number == wrong:
            weight[3, 4] += 3
        weights.append(onnx.numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(
            onnx.helper.make_node("MatMul", [value, f"w{number}"], [f"m{number}"], f"product{number}")
        )
        nodes.append(onnx.helper.make_node("Tanh", [f"m{number}"], [f"t{number}"], f"tanh{number}"))
        value = f"t{number}"
    nodes[-1].output[0] = "y"
    kind = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "deep", [kind("x", 1, ["batch", 24])], [kind("y", 1, ["batch", 24])], weights
    )
    onnx.save(
        onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 20)]), path
    )


@pytest.mark.parametrize(
    ("at", "group", "estimated"),
    [
        ("candidate: tensor 144", True, True),
        pytest.param("inputs, turn 1: tensor", False, None, marks=pytest.mark.slow),
    ],
)
def test_bisect_ranks_what_was_compared(tmp_path: Path, at: str, group: bool, estimated: bool | None) -> None:
    deep_model(tmp_path / "right.onnx", 600)
    deep_model(tmp_path / "wrong.onnx", 600, wrong=20)
    command = ["bisect", "right.onnx", "wrong.onnx", "--json", "found.json", "-o", "fault"]
    status, err, _ = interrupted(command, tmp_path, at, group=group)
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 130, err
    assert "interrupted; what was compared until then is put in order" in err
    assert not found["passed"] and found["interrupted"]
    assert "interrupted at" in found["verdict"]
    assert found["first"]["name"] == "m20"
    assert found["blamed"][0]["node"] == "product20"
    if estimated:
        # Pieces of 16, 64 and 64 values, and it was not let to the end of them.
        assert 64 <= len(found["tensors"]) < 1200
        assert found["blamed"][0]["estimated"]
    assert not (tmp_path / "fault").exists()


def test_bisect_that_compared_nothing_says_so(tmp_path: Path) -> None:
    deep_model(tmp_path / "right.onnx", 300)
    command = ["bisect", "right.onnx", "right.onnx", "--json", "found.json"]
    status, err, _ = interrupted(command, tmp_path, "at reference", group=True)
    assert status == 130
    assert err.strip().endswith("onnxsmith: interrupted; nothing was changed")
    assert not (tmp_path / "found.json").exists()
