"""What config.json says of sizes that a pass changed: clients read heads and layers there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

__all__ = ["CONFIG", "updated_config"]

CONFIG = "config"
"""The key of a pass's details: kind of size to what it was and is in each layer."""

_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
        "heads": ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"),
        "neurons": ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "d_ff"),
    }
)


def updated_config(content: bytes, sizes: Mapping[str, Sequence[int]]) -> bytes:
    """The configuration after a pass.

    Args:
        content: Of config.json.
        sizes: Kind (layers, heads, neurons) to the number before and after it, the same in all layers.
    """
    try:
        config: Any = json.loads(content)
    except ValueError:
        return content
    if not isinstance(config, dict):
        return content
    for kind, (before, after) in sizes.items():
        heads = next((config[n] for n in _NAMES["heads"] if isinstance(config.get(n), int)), None)
        if kind == "heads" and heads and isinstance(config.get("hidden_size"), int):
            # Else clients compute it from the number of heads.
            config.setdefault("head_dim", config["hidden_size"] // heads)
        for name in _NAMES.get(kind, ()):
            value = config.get(name)
            # Query heads are a multiple of the groups that went.
            if type(value) is int and (value == before or (kind == "heads" and value % before == 0)):
                config[name] = value * after // before
        if kind == "layers":
            for name, value in config.items():
                if isinstance(value, list) and len(value) == before and "layer" in name:
                    config[name] = value[:after]
    return json.dumps(config, indent=2).encode()
