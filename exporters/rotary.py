"""Rotary embeddings whose frequencies depend on how long the text is: LongRoPE and dynamic NTK scaling.

transformers chooses the frequencies with an ``if`` on the largest position and keeps them in the module.
Neither can be traced, and the second makes a result depend on the calls before it. Here they are computed in
each call, from the positions alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["stateless_rotary"]


def stateless_rotary(model: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What makes rotary embeddings of changing frequencies a function of their inputs while it is open."""
    found = [(module, plain) for module in model.modules() if (plain := _changing(module)) is not None]
    return functools.partial(_replaced, found) if found else contextlib.nullcontext


def _changing(module: Any) -> Any:
    """The forward without the choice of frequencies; None for modules that choose none."""
    kind = getattr(module, "rope_type", None)
    if not isinstance(kind, str) or not (kind == "longrope" or "dynamic" in kind):
        return None
    # What transformers' decorator dynamic_rope_update wraps.
    plain = inspect.unwrap(type(module).forward)
    return None if plain is type(module).forward else plain


@contextlib.contextmanager
def _replaced(found: list[tuple[Any, Any]]) -> Iterator[None]:
    try:
        for module, plain in found:
            module.forward = _stateless(module, plain, long=module.rope_type == "longrope")
        yield
    finally:
        for module, _ in found:
            vars(module).pop("forward", None)


def _stateless(module: Any, plain: Any, *, long: bool) -> Any:
    import torch

    config = module.config
    limit = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        length = torch.max(position_ids) + 1
        if long:
            stretched, _ = module.rope_init_fn(config, x.device, seq_len=limit + 1)
            frequencies = torch.where(length > limit, stretched, module.original_inv_freq)
        else:
            frequencies, _ = module.rope_init_fn(config, x.device, seq_len=length)
        # A copy, because a module must not be given traced tensors.
        called = copy.copy(module)
        called._buffers = {**module._buffers, "inv_freq": frequencies}
        return plain(called, x, position_ids)

    return forward
