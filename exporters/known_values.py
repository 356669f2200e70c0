"""Values that are known although the tensors around them are not: loops over experts while tracing.

Mixtures of experts find out which experts have tokens and loop over those. How many there are depends on the
tokens, so torch cannot unroll the loop. But the loop may as well run over all experts: one without tokens
adds a sum over nothing. That is exact, and each expert still sees its own tokens only, because the selection
of tokens (``torch.where``) stays in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["experts_unrolled"]

# Asking a tensor for a Python value, by the names that torch gives these functions.
_QUESTIONS = frozenset({"__index__", "__int__", "__bool__", "item", "tolist"})


# The number of experts, by the names that configurations give it.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


class _Indices:
    """What a loop sees in place of the experts that have tokens: all of them. Good for nothing but a loop."""

    def __init__(self, tensors: list[Any]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tensors)

    def __getitem__(self, part: slice) -> _Indices:
        if part != slice(None):
            raise TypeError("the experts that have tokens are not known while tracing")
        return self


class _SomeTokens:
    """What code sees in place of the number of tokens of an expert: that it is not 0, and nothing else."""

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self._differs(other, answer=False)

    def __ne__(self, other: object) -> bool:
        return self._differs(other, answer=True)

    def __gt__(self, other: object) -> bool:
        return self._differs(other, answer=True)

    __hash__ = None  # type: ignore[assignment]  # it is no number that anything could be found by

    @staticmethod
    def _differs(other: object, *, answer: bool) -> bool:
        if type(other) is not int or other != 0:
            raise TypeError("the number of tokens of an expert is not known while tracing")
        return answer


@contextlib.contextmanager
def experts_unrolled(config: Any) -> Iterator[None]:
    """While open, ``nonzero()`` of a vector with one element for each expert gives all experts to a loop.

    Some loop over all experts and ask each whether it has tokens; the answer is then that it has.
    The values of the loop's variable are known where Python asks for them (indexing a ``ModuleList``,
    comparing with the number of experts). Everything else is traced. A model without experts is left alone.

    Args:
        config: The model's configuration, which says how many experts there are.
    """
    counts: set[int] = {count for name in _COUNTS if (count := getattr(config, name, None))}
    if not counts:
        yield
        return
    # Some keep one more, for tokens that no expert takes; their loops skip it.
    counts |= {count + 1 for count in counts}
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_flatten, tree_map

    known: dict[int, tuple[Any, Any]] = {}

    def value_of(tensor: Any) -> Any:
        return known[id(tensor)][1] if id(tensor) in known else None

    def plain(index: Any) -> Any:
        if not isinstance(index, torch.Tensor) or index.ndim:
            return index
        value = value_of(index)
        return index if value is None else int(value)

    class Known(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "nonzero" and not kwargs.get("as_tuple"):
                vector = args[0] if args else kwargs["input"]
                if vector.ndim == 1 and isinstance(vector.shape[0], int) and vector.shape[0] in counts:
                    return _Indices([self.index(i, vector.device) for i in range(vector.shape[0])])
            if name in ("numel", "nelement") and args and self.is_selection(args[0]):
                # Whether an expert has tokens: one without adds nothing.
                return _SomeTokens()
            if name == "__getitem__":
                # As plain integers: torch cannot broadcast an index of no axes with one of unknown length.
                args = (args[0], tree_map(plain, args[1]))
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            if not tensors or any(id(x) not in known for x in tensors):
                return func(*args, **kwargs)
            concrete = tree_map(lambda x: value_of(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
            with torch._C.DisableTorchFunction(), _undispatched(), unset_fake_temporarily():
                real = func(*concrete[0], **concrete[1])
            if name in _QUESTIONS or not isinstance(real, torch.Tensor):
                return real
            return self.keep(func(*args, **kwargs), real)

        def index(self, value: int, device: Any) -> Any:
            with torch._C.DisableTorchFunction(), _undispatched(), unset_fake_temporarily():
                real = torch.full((1,), value, dtype=torch.int64)
            return self.keep(torch.full((1,), value, dtype=torch.int64, device=device), real)

        @staticmethod
        def is_selection(tensor: Any) -> bool:
            """Indices, as many as the values of another tensor say."""
            return (
                tensor.ndim == 1
                and tensor.dtype == torch.int64
                and isinstance(tensor.shape[0], torch.SymInt)
                and bool(free_unbacked_symbols(tensor.shape[0]))
            )

        @staticmethod
        def keep(traced: Any, real: Any) -> Any:
            known[id(traced)] = (traced, real)
            return traced

    with Known():
        yield


@contextlib.contextmanager
def _undispatched() -> Iterator[None]:
    """Leaves every tracing mode, so that what runs inside is computed and not recorded."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield
