"""Measures the roofs of a provider: see ``roofline``."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from onnxsmith.errors import OnnxsmithError
from onnxsmith.package import TensorSpec
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.providers import ProviderChoice
from onnxsmith.runtime.roofline import Roofs
from onnxsmith.runtime.worker_process import WorkerProcess

__all__ = ["RoofBook", "measure_roofs"]

# 134 MB in float32: no last-level cache of a usual machine holds it whole.
_ROW = (1, 4096, 8192)
_SQUARE = (512, 1024, 1024)
_BEST_OF_S = 0.4


def measure_roofs(choice: ProviderChoice, *, threads: int) -> Roofs:
    """What a provider can do at best with so many threads; takes a second or two.

    Raises:
        OnnxsmithError: The provider does not run a plain MatMul.
    """
    rates = []
    with TemporaryDirectory(prefix="onnxsmith-roofs-") as directory:
        for number, (rows, inner, columns) in enumerate((_ROW, _SQUARE)):
            path = Path(directory) / f"{number}.onnx"
            _write(path, inner, columns)
            graph = GraphFile(
                path,
                (TensorSpec("x", "float32", ("rows", inner)),),
                (TensorSpec("y", "float32", ("rows", columns)),),
                {},
            )
            settings = {"seed": 0, "batch": rows, "prompt_tokens": 1, "io_binding": None}
            with WorkerProcess(choice.environment, where=f"roofs of {choice.name}") as worker:
                worker.open(graph, choice, threads=threads, name="roofs")
                worker.ask({"do": "prepare", "settings": settings})
                best, began = np.inf, time.monotonic()
                while time.monotonic() - began < _BEST_OF_S or not np.isfinite(best):
                    best = min(best, *worker.ask({"do": "round"})["times"]["latency"], np.inf)
            work = 4.0 * inner * columns if number == 0 else 2.0 * rows * inner * columns
            rates.append(work / best)
    return Roofs(rates[0], rates[1])


def _write(path: Path, inner: int, columns: int) -> None:
    import onnx

    # The weights are made when the model is loaded, so the file stays small.
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        roofs (float[rows, {inner}] x) => (float[rows, {columns}] y) {{
            shape = Constant<value_ints=[{inner}, {columns}]>()
            weight = ConstantOfShape<value=float[1] {{1.0}}>(shape)
            y = MatMul(x, weight)
        }}""")
    path.write_bytes(model.SerializeToString())


class RoofBook:
    """The roofs of each provider, measured once."""

    def __init__(self) -> None:
        """Knows none."""
        self._known: dict[tuple[str, int], Roofs | None] = {}

    def of(self, choice: ProviderChoice, threads: int) -> Roofs | None:
        """Those of a provider with so many threads; None where it runs no plain MatMul."""
        key = (choice.ort_name, threads)
        if key not in self._known:
            self._known[key] = None
            # Without roofs there is a profile all the same.
            with contextlib.suppress(OnnxsmithError):
                self._known[key] = measure_roofs(choice, threads=threads)
        return self._known[key]
