"""Bisect on inputs of the user's own: what cannot be compared is said and does not pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith.package import ModelPackage
from onnxsmith.package_io import save_package
from onnxsmith.pipeline.cli import app

pytest.importorskip("onnxruntime")


@pytest.fixture
def models(onnx_package: Callable[..., ModelPackage], tmp_path: Path) -> tuple[str, str]:
    """Two models of the same nodes; the second's last weight is another."""
    text = """g (float[n, 4] x) => (float[n, 4] y)
        <float[4] w = {{1, 2, 3, 4}}, float[4, 4] v = {{1,2,3,4, 5,6,7,8, 9,10,11,12, 13,14,15,{last}}}>
        {{ a = Mul(x, w)
           b = Tanh(a)
           y = MatMul(b, v) }}"""
    for name, last in (("right", 16), ("wrong", 32)):
        (tmp_path / name).mkdir()
        save_package(onnx_package(text.format(last=last), name), tmp_path / name)
    return str(tmp_path / "right"), str(tmp_path / "wrong")


def test_inputs_of_nan_alone_do_not_pass(models: tuple[str, str], tmp_path: Path) -> None:
    right, wrong = models
    inputs, target = tmp_path / "nan.npz", tmp_path / "result.json"
    np.savez(inputs, x=np.full((2, 4), np.nan, np.float32))
    page = tmp_path / "page.html"
    arguments = ["--inputs", str(inputs), "--json", str(target), "--report", str(page)]
    done = CliRunner().invoke(app, ["bisect", right, right, *arguments])
    assert done.exit_code == 1, done.output
    assert "nothing was compared; 3 tensors could not be compared" in done.output
    assert "'a' first: look for NaN in the inputs" in done.output
    assert json.loads(target.read_text())["passed"] is False
    # No point stands for what is not known.
    assert "FAIL" in page.read_text()
    assert "<circle" not in page.read_text()
    # What can be known without numbers is said all the same.
    done = CliRunner().invoke(app, ["bisect", right, wrong, *arguments])
    assert done.exit_code == 1, done.output
    assert "1 value of v wrong: at [3, 3] it is 32, expected about 16" in done.output
    assert "an error of 0" not in done.output


def test_elements_of_nan_are_left_out_and_counted(models: tuple[str, str], tmp_path: Path) -> None:
    right, wrong = models
    x = np.ones((2, 4), np.float32)
    x[1, 0] = np.nan
    inputs = tmp_path / "one.npz"
    np.savez(inputs, x=x)
    done = CliRunner().invoke(app, ["bisect", right, right, "--inputs", str(inputs)])
    assert done.exit_code == 0, done.output
    assert "no divergence in 3 tensors; 6 elements of 3 tensors are NaN in the reference" in done.output
    done = CliRunner().invoke(app, ["bisect", right, wrong, "--inputs", str(inputs)])
    assert (done.exit_code, "first divergence at 'y' (MatMul)" in done.output) == (1, True), done.output


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.ones((2, 4), np.float32)}, "right: unknown input 'z'; expected one of x"),
        ({"x": np.ones((2, 5), np.float32)}, "right: input 'x': 5 on axis 1 of shape (2, 5)"),
        ({"x": np.ones((2, 4))}, "right: input 'x': element type float64; expected float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_the_models_name(
    models: tuple[str, str], tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, **arrays)
    done = CliRunner().invoke(app, ["bisect", *models, "--inputs", str(inputs)])
    assert (done.exit_code, message in " ".join(done.output.split())) == (2, True), done.output
