"""What a pass is given to look at activations: a small model, run on samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from generated_graphs import Array, run
from onnxsmith.graph_passes.context import Activations

__all__ = ["activations_on"]


def activations_on(samples: Sequence[Mapping[str, Array]]) -> Activations:
    """Values by name, sample by sample; inputs among them are as they were given."""

    def collect(model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        given = set(samples[0])
        copy.graph.outputs[:] = [values[name] for name in names if name not in given]
        for value in copy.graph.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        for feeds in samples:
            found = run(copy, dict(feeds)) if copy.graph.outputs else {}
            yield found | {name: feeds[name] for name in names if name in given}

    return collect
