"""How many positions a text model has, as its configuration says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["POSITIONS", "context_length", "context_of_files"]

POSITIONS = "position_ids"
"""The key of limits (one above the highest valid value of an integer input) that says how many there are."""

# The names of several architectures.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
# What says that positions are relative: these have no end.
_ENDLESS = ("alibi", "relative_attention", "relative_attention_num_buckets")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Positions of a text model, for prompt and continuation together.

    Rotary positions go on beyond what a model was trained with, but tables of them end there too.

    Args:
        config: What ``config.json`` has; that of the text model counts where there are several.

    Returns:
        None where nothing says, or positions have no end.
    """
    inner = config.get("text_config")
    parts = [part for part in (inner, config) if isinstance(part, Mapping)]
    if any(part.get(name) for part in parts for name in _ENDLESS):
        return None
    # A base that grows with the length has no last position.
    ropes = [part.get(name) for part in parts for name in ("rope_scaling", "rope_parameters")]
    if any("dynamic" in (r.get("rope_type"), r.get("type")) for r in ropes if isinstance(r, Mapping)):
        return None
    found = [part.get(name) for part in parts for name in _NAMES]
    return next((number for number in found if type(number) is int and number > 1), None)


def context_of_files(files: Mapping[str, bytes]) -> int | None:
    """The same, from the files beside a model; None where there is no ``config.json`` that can be read."""
    try:
        config = json.loads(files.get("config.json", b"{}"))
    except ValueError:
        return None
    return context_length(config) if isinstance(config, Mapping) else None
