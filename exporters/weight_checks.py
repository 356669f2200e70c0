"""Refuses models whose weights transformers would make up: it fills gaps with random numbers and logs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxsmith.errors import SourceError
from onnxsmith.source import ModelSource, SourceKind

__all__ = ["refuse_missing", "refuse_other_sizes"]


def refuse_missing(source: ModelSource, info: Mapping[str, Any], *, expected: str) -> None:
    """Refuses a model for whose weights there are no tensors, by what ``from_pretrained`` says of loading."""
    missing = sorted(info["missing_keys"])
    if missing:
        more = "..." if len(missing) > 3 else ""
        raise SourceError(
            source.text,
            got=f"no weights for {len(missing)} tensors ({', '.join(missing[:3])}{more})",
            expected=expected,
            remedy="The file is incomplete"
            if source.kind is SourceKind.GGUF
            else "Name the task that it was trained for with --task",
        )


def refuse_other_sizes(source: ModelSource, module: Any, info: Mapping[str, Any]) -> None:
    """Refuses weights that have other sizes than the configuration says."""
    # transformers 5 adds the sizes to the names.
    names = sorted(key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"])
    if names:
        tensor = module.state_dict().get(names[0])
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise SourceError(
            source.text,
            got=f"{names[0]} of another shape in its files{more}",
            expected="the sizes of config.json"
            if tensor is None
            else f"{list(tensor.shape)}, by config.json",
            remedy="The configuration is not the one that the weights were made with",
        )
