"""What passes need besides a graph: the file that weights came from, and activations on calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    from onnxsmith.graph_passes.context import PassContext

__all__ = ["context_for"]


def context_for(source: ModelSource) -> PassContext:
    """The context of passes on a model that was exported from a source."""
    from onnxsmith.graph_passes.context import PassContext

    return PassContext(gguf=source.path if source.kind is SourceKind.GGUF else None)
