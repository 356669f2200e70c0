"""LoRA adapters beside a model: their weights stay inputs of the graph, with the adapter's own as defaults.

Then one graph serves any adapter of the same rank and places: without further inputs it computes what it was
exported with, and a caller who gives other weights gets another adapter. The names of the inputs are the keys
of ``adapter_model.safetensors`` without PEFT's prefix ``base_model.model.``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import SourceError
from onnxsmith.exporters.other_sources import ADAPTER_CONFIG, with_adapter

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.source import ModelSource

__all__ = ["ADAPTERS", "beside", "weights_as_inputs"]

ADAPTERS = ("merge", "inputs")


def beside(source: ModelSource, module: Any) -> Any:
    """The model with an adapter's layers beside its own.

    Raises:
        SourceError: It is no LoRA, it replaces whole modules, or it does not fit the model.
    """
    assert source.path is not None
    config = json.loads((source.path / ADAPTER_CONFIG).read_bytes())
    kind, replaced = config.get("peft_type"), config.get("modules_to_save")
    if kind != "LORA" or replaced:
        raise SourceError(
            source.text,
            got=f"an adapter of the kind {kind}"
            if kind != "LORA"
            else f"an adapter that replaces {replaced}",
            expected="one of the kind LORA that only adds, to be kept as inputs",
            remedy="Merge it instead, with --adapter merge",
        )
    return with_adapter(source, module).get_base_model()


def weights_as_inputs(model: ir.Model) -> int:
    """Makes inputs of an adapter's weights, which stay there as defaults; says how many."""
    graph = model.graph
    found = [value for name, value in graph.initializers.items() if ".lora_" in name]
    for value in found:
        # PEFT's name of the first adapter.
        value.name = (value.name or "").replace(".default.", ".")
        graph.inputs.append(value)
    return len(found)
