"""The smallest model and inputs that show a difference, with a script that shows it to others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsmith.onnx_file import save_model
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.backend import Backend
from onnxsmith.runtime.divergence import Blame, Reproduction
from onnxsmith.runtime.kernel_library import SCRIPT_LINES, SOURCES, kernel_files
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.tensor_errors import ErrorSum

__all__ = ["SmallCase", "relative_error", "shrink", "write_reproduction"]

# A smaller input shows the same fault where it shows at least this share of the error.
_KEPT = 0.5


@dataclasses.dataclass(frozen=True)
class SmallCase:
    """Inputs of a part of a graph, and what it should give.

    Attributes:
        feeds: Input name to array; what lies between is the reference's.
        expected: The reference's tensor, in the candidate's layout.
        error: The relative error that the candidate makes on them.
    """

    feeds: dict[str, Array]
    expected: Array
    error: float


def shrink(session: Session, output: str, cases: Sequence[SmallCase]) -> SmallCase:
    """Takes the case that shows most, and of it as few rows and positions as still show the difference.

    An axis is cut only where the candidate gives for the cut inputs what it gave there for the whole ones:
    else the cut would make a difference of its own.

    Args:
        session: The part, open.
        output: The tensor that is wrong.
        cases: At least one.
    """
    best = max(cases, key=lambda case: case.error)
    for axis_name in _dynamic_axes(session):
        best = _cut(session, output, best, axis_name)
    return best


def _dynamic_axes(session: Session) -> list[str]:
    """Names of axes that inputs have, the batch first."""
    names = [axis for spec in session.inputs for axis in spec.shape or () if isinstance(axis, str)]
    return sorted(dict.fromkeys(names), key=lambda name: name != "batch")


def _cut(session: Session, output: str, case: SmallCase, axis_name: str) -> SmallCase:
    spec = next(spec for spec in session.outputs if spec.name == output)
    places = {
        s.name: [n for n, axis in enumerate(s.shape or ()) if axis == axis_name] for s in session.inputs
    }
    size = next(
        (case.feeds[name].shape[axes[0]] for name, axes in places.items() if axes and name in case.feeds), 1
    )
    out_axes = [n for n, axis in enumerate(spec.shape or ()) if axis == axis_name]
    if size <= 1 or len(out_axes) > 1 or any(len(axes) > 1 for axes in places.values()):
        return case
    if not out_axes:
        # Where tracing left no names, the only axis of this size is the one.
        out_axes = [n for n, length in enumerate(case.expected.shape) if length == size][:1]
    if not out_axes:
        return case
    whole = session.run(case.feeds)[output]
    per_position = np.square(_finite(whole) - _finite(case.expected)).astype(np.float64)
    bad = ~np.isfinite(whole) & np.isfinite(case.expected)
    others = tuple(n for n in range(whole.ndim) if n != out_axes[0])
    worst = int(np.argmax(per_position.sum(axis=others) + bad.sum(axis=others) * 1e30))
    index = slice(worst, worst + 1)
    feeds = {
        name: _take(array, places[name], index) if places.get(name) else array
        for name, array in case.feeds.items()
    }
    expected = _take(case.expected, out_axes, index)
    try:
        got = session.run(feeds)[output]
    except Exception:  # whatever a backend raises, the cut is no good
        return case
    before = _take(whole, out_axes, index)
    if got.shape != expected.shape or not np.allclose(got, before, rtol=1e-3, atol=1e-5, equal_nan=True):
        return case
    error = relative_error(expected, got)
    return SmallCase(feeds, expected, error) if error >= _KEPT * case.error else case


def _take(array: Array, axes: list[int], index: slice) -> Array:
    place: list[slice] = [slice(None)] * array.ndim
    place[axes[0]] = index
    return np.ascontiguousarray(array[tuple(place)])


def _finite(array: Array) -> Array:
    result: Array = np.where(np.isfinite(array), array, 0).astype(np.float64)
    return result


def relative_error(expected: Array, got: Array) -> float:
    """Infinite where values are not finite, else the larger of whole and worst channel."""
    total = ErrorSum()
    total.add(expected, got)
    return total.total().size


def write_reproduction(
    directory: Path,
    part: ModelPackage,
    backend: Backend[ModelPackage],
    cases: Sequence[SmallCase],
    blame: Blame,
) -> Reproduction:
    """Writes a small model, its inputs, what it should give, and a script that needs nothing of onnxsmith.

    Args:
        directory: Where; it exists.
        part: The nodes to blame as a model of their own.
        backend: What the difference was seen on.
        cases: Inputs that show it.
        blame: What was found.

    Raises:
        DestinationError: A file cannot be written.
    """
    output = blame.tensor
    with backend.open(part, name="the part to blame") as session:
        smallest = shrink(session, output, cases)
        provider = session.provider
    save_model(part.main.model, directory / "minimal.onnx")
    for name, arrays in (("inputs.npz", smallest.feeds), ("expected.npz", {output: smallest.expected})):
        plain: dict[str, Any] = {key: _plain(array) for key, array in arrays.items()}
        np.savez(directory / name, **plain)
    nodes = tuple(f"{node.name} ({node.op_type})" for node in part.main.model.graph)
    size = sum(p.stat().st_size for p in directory.glob("minimal.onnx*"))
    # Half of what it makes now: a repaired node agrees.
    bound = "0.05" if math.isinf(smallest.error) else f"{smallest.error / 2:.3g}"
    script = _SCRIPT.replace("PROVIDER", provider).replace("BOUND", bound)
    needed = "onnxruntime and numpy only"
    if uses_own_operators(part.main.model):
        script = script.replace("KERNELS", SCRIPT_LINES)
        needed = "onnxruntime, numpy and a C++ compiler for the operators in `kernels/`"
        (directory / SOURCES.name).mkdir()
        for name, content in kernel_files().items():
            (directory / name).write_bytes(content)
    script = script.replace("KERNELS", "")
    (directory / "reproduce.py").write_text(script, encoding="utf-8")
    shapes = {name: array.shape for name, array in smallest.feeds.items()}
    listed = "\n".join(f"- {node}" for node in nodes)
    (directory / "README.md").write_text(
        f"# {blame.node} ({blame.operator}) on {provider}\n\n"
        f"`python reproduce.py` runs `minimal.onnx` on `inputs.npz` and compares the output `{output}` with "
        f"`expected.npz`.\nIt needs {needed}, and ends with status 1 while they differ.\n\n"
        f"Relative error: {_number(smallest.error)}. {blame.detail}\n\nNodes:\n\n{listed}\n",
        encoding="utf-8",
    )
    return Reproduction(directory, nodes, size, shapes, smallest.error)


def _plain(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.kind == "V" or str(array.dtype) == "bfloat16" else array


def _number(value: float) -> str:
    return "values that are not finite" if math.isinf(value) else f"{value:.3g}"


_SCRIPT = '''"""Shows that a small ONNX model does not give what it should. Needs numpy and onnxruntime."""

import pathlib
import sys

import numpy as np
import onnxruntime

PROVIDERS = sys.argv[1:] or ["PROVIDER"]
TOLERANCE = BOUND  # relative error of the whole output, and of the worst position on its last axis

here = pathlib.Path(__file__).parent
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
KERNELSsession = onnxruntime.InferenceSession(str(here / "minimal.onnx"), options, providers=PROVIDERS)
feeds = dict(np.load(here / "inputs.npz"))
expected = dict(np.load(here / "expected.npz"))
print("onnxruntime", onnxruntime.__version__, "providers", session.get_providers())
different = False
outputs = [output.name for output in session.get_outputs()]
results = dict(zip(outputs, session.run(outputs, feeds)))
for name, right in expected.items():
    got = results[name]
    right, got = right.astype(np.float64), got.astype(np.float64)
    wrong = ~np.isfinite(got) & np.isfinite(right)
    error = np.square(np.where(wrong, 0.0, got - right))
    width = right.shape[-1] if right.ndim > 1 else 1
    rows, scale = error.reshape(-1, width).sum(0), np.square(right).reshape(-1, width).sum(0)
    relative = float(np.sqrt(error.sum() / max(scale.sum(), 1e-30)))
    channel = float(np.sqrt((rows / np.maximum(np.maximum(scale, scale.mean()), 1e-30)).max()))
    print(f"{name}: relative error {relative:.3g}, worst position {channel:.3g}, {wrong.sum()} not finite")
    different |= bool(wrong.any()) or not max(relative, channel) <= TOLERANCE
print("differs" if different else "agrees")
sys.exit(1 if different else 0)
'''
