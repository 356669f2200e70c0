"""The passes by name: this package's own, and those that other packages add by entry point."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from onnxsmith.errors import BadInputError, UnknownNameError

if TYPE_CHECKING:
    from onnxsmith.graph_passes.contract import GraphPass
    from onnxsmith.graph_passes.presets import PassSpec

__all__ = ["ENTRY_POINT_GROUP", "PASSES", "load_pass", "make_passes", "pass_names"]

ENTRY_POINT_GROUP = "onnxsmith.passes"

# Name -> module:class. Strings, so that listing the names imports nothing heavy.
PASSES: Mapping[str, str] = MappingProxyType(
    {
        "cleanup": "onnxsmith.graph_passes.cleanup:Cleanup",
        "fuse_transformer": "onnxsmith.graph_passes.fusion:FuseTransformer",
        "lower_ir_version": "onnxsmith.graph_passes.cleanup:LowerIrVersion",
        "quantize_weights": "onnxsmith.graph_passes.quantization:QuantizeWeights",
        "strip_metadata": "onnxsmith.graph_passes.cleanup:StripMetadata",
        "to_float16": "onnxsmith.graph_passes.precision:ToFloat16",
        "transpose_weights": "onnxsmith.graph_passes.weights:TransposeWeights",
    }
)


def _known() -> dict[str, str]:
    third_party = {
        point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    # A foreign package must not silently replace one of ours.
    return {**third_party, **PASSES}


def pass_names() -> list[str]:
    """The names of all passes that are installed, sorted."""
    return sorted(_known())


def load_pass(name: str) -> type[GraphPass]:
    """The class of a pass.

    Raises:
        UnknownNameError: No such pass; the message names the nearest and all known ones.
        BadInputError: An entry point of another package that is not a pass.
    """
    from onnxsmith.graph_passes.contract import GraphPass

    known = _known()
    if name not in known:
        raise UnknownNameError("passes", name=name, known=known, kind="pass")
    module, _, attribute = known[name].partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in PASSES:
            raise
        raise BadInputError(
            f"pass {name}", got=f"its entry point {known[name]} fails: {error}", expected="a GraphPass class"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, GraphPass)):
        raise BadInputError(f"pass {name}", got=f"{known[name]} is {loaded!r}", expected="a GraphPass class")
    return loaded


def make_passes(specs: Iterable[PassSpec]) -> list[GraphPass]:
    """Makes passes from names and parameters, and so checks all of them before any of them runs.

    Raises:
        UnknownNameError: An unknown pass or parameter.
        BadInputError: A parameter of the wrong type or outside its range.
    """
    return [load_pass(name).create(arguments) for name, arguments in specs]
