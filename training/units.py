"""What can be removed from a PyTorch model together: heads and neurons, found by how gradients flow.

A dependency graph of a model says which rows of which weights have to go when a column of another goes
(Fang et al., DepGraph, 2023, https://arxiv.org/abs/2301.12900). Here it is observed and not written down per
architecture. Each layer with a weight gets random outputs that depend on nothing, so that the input of a
layer is a function of the outputs of the layers right before it. That function's Jacobian is a graph between
their features, and its connected components are what can only go together: one neuron of an MLP with its
gate; a head with its query, key and value; with grouped queries all heads that share a key and value. A norm
or a residual sum connects everything, which says that nothing there can go alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "FoundUnits",
    "UnitGroup",
    "find_units",
    "in_features",
    "is_projection",
    "out_features",
    "shared_weights",
    "tensors_of",
]

Indices = npt.NDArray[np.int64]
Kind = Literal["heads", "neurons"]
# What runs the module once, with inputs that it accepts.
Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """Units of one place in the model: each can go without the others.

    Attributes:
        name: The module that reads them.
        kind: ``neurons`` where a unit is one column of that module, else ``heads``.
        columns: (units, width): the input features of that module that are each unit's.
        rows: Module to (units, width): the output features that make each unit.
    """

    name: str
    kind: Kind
    columns: Indices
    rows: Mapping[str, Indices]

    @property
    def count(self) -> int:
        """How many units."""
        return len(self.columns)

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that change with it."""
        return (*self.rows, self.name)


@dataclasses.dataclass(frozen=True)
class FoundUnits:
    """What can be removed from a model, and what cannot and why.

    Attributes:
        groups: In the order in which the model runs them.
        skipped: Module to reason.
    """

    groups: tuple[UnitGroup, ...]
    skipped: Mapping[str, str]

    def of(self, kind: Kind) -> tuple[UnitGroup, ...]:
        """The groups of one kind."""
        return tuple(group for group in self.groups if group.kind == kind)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a matrix with a bias at most: ``nn.Linear``, or transformers' ``Conv1D``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or type(module) is Conv1D


def in_features(module: Any) -> int:
    """Columns of a projection, as ``nn.Linear`` counts them."""
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])


def out_features(module: Any) -> int:
    """Rows of a projection."""
    return int(module.out_features if hasattr(module, "out_features") else module.nf)


@dataclasses.dataclass
class _Call:
    """One call of a projection while the model was observed."""

    name: str
    given: torch.Tensor
    made: torch.Tensor


def find_units(module: nn.Module, run: Run, *, seed: int = 0) -> FoundUnits:
    """Finds what can be removed from a model.

    Args:
        module: The model; it is left as it is.
        run: Calls it on inputs of a few tokens. Without a KV cache, which would be an output that everything
            in it depends on.
        seed: Of the random outputs.

    Raises:
        BadInputError: It has no projection that the run reached.
    """
    import torch

    with _observed(module, seed) as calls, torch.enable_grad():
        result = run()
    if not calls:
        raise BadInputError(
            f"pruning of {type(module).__name__}",
            got="no nn.Linear that its run reached",
            expected="a model with projections",
        )
    finals = [t for t in tensors_of(result) if t.requires_grad]
    readers = _readers(calls, finals)
    shared = shared_weights(module)
    groups: dict[str, UnitGroup] = {}
    skipped: dict[str, str] = {}
    for number, call in enumerate(calls):
        before = [i for i, found in enumerate(readers) if number in found]
        others = {
            calls[i].name: {calls[j].name if j >= 0 else "the model's output" for j in readers[i]}
            - {call.name}
            for i in before
        }
        found = _group_of(call, [calls[i] for i in before], others, shared)
        if isinstance(found, str):
            if found:
                skipped[call.name] = found
        elif call.name in groups and not _same(groups[call.name], found):
            skipped[call.name] = "it is called several times, each time on other units"
        else:
            groups[call.name] = found
    for name in skipped:
        groups.pop(name, None)
    return FoundUnits(tuple(groups.values()), skipped)


@contextlib.contextmanager
def _observed(module: nn.Module, seed: int) -> Iterator[list[_Call]]:
    """Cuts a model at its weights: what each gives is random and depends on nothing."""
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    calls: list[_Call] = []
    generator = torch.Generator().manual_seed(seed)
    names = {id(part): name for name, part in module.named_modules()}

    def cut(part: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        leaf = torch.randn(made.shape, generator=generator, dtype=torch.float32)
        leaf = leaf.to(device=made.device, dtype=made.dtype).requires_grad_()
        if is_projection(part) and given and isinstance(given[0], torch.Tensor):
            calls.append(_Call(names[id(part)], given[0], leaf))
        return leaf

    hooks = [
        part.register_forward_hook(cut)
        for part in module.modules()
        if is_projection(part) or isinstance(part, nn.Embedding | nn.Conv1d | nn.Conv2d)
    ]
    training = module.training
    module.eval()
    try:
        # Only this kernel can be derived twice.
        with sdpa_kernel(SDPBackend.MATH):
            yield calls
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()


def tensors_of(found: Any) -> Iterator[torch.Tensor]:
    """All tensors in what a model gave."""
    import torch

    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, Mapping):
        for part in found.values():
            yield from tensors_of(part)
    elif isinstance(found, list | tuple):
        for part in found:
            yield from tensors_of(part)
    elif hasattr(found, "__dict__"):
        # A cache of transformers, or a dataclass.
        for part in vars(found).values():
            if isinstance(part, torch.Tensor | Mapping | list | tuple):
                yield from tensors_of(part)


def shared_weights(module: nn.Module) -> dict[str, str]:
    """Names of projections whose weight another module has too, to that module's name."""
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def _readers(calls: Sequence[_Call], finals: Sequence[torch.Tensor]) -> list[set[int]]:
    """For each call the calls whose inputs depend on what it gives; -1 is the model's own output."""
    leaves = [call.made for call in calls]
    found: list[set[int]] = [set() for _ in calls]
    for number, tensors in [*((i, [call.given]) for i, call in enumerate(calls)), (-1, list(finals))]:
        for tensor in tensors:
            if not tensor.requires_grad:
                continue
            for readers, part in zip(found, _gradients(tensor, leaves, _noise(tensor)), strict=True):
                if part is not None and bool(part.count_nonzero()):
                    readers.add(number)
    return found


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(tensor.shape, generator=generator) + 0.5
    return noise.to(device=tensor.device, dtype=tensor.dtype)


def _gradients(
    tensor: torch.Tensor, leaves: Sequence[torch.Tensor], weights: torch.Tensor, *, again: bool = False
) -> tuple[torch.Tensor | None, ...]:
    import torch

    return torch.autograd.grad(
        tensor, list(leaves), weights, retain_graph=True, create_graph=again, allow_unused=True
    )


def _group_of(
    call: _Call, producers: Sequence[_Call], others: Mapping[str, set[str]], shared: Mapping[str, str]
) -> UnitGroup | str:
    """The units of one reader, or why there are none; an empty reason is not worth telling."""
    if not producers:
        return ""
    jacobian = _Jacobian(call, producers)
    units = jacobian.neurons() or jacobian.components()
    if units is None:
        # A norm or a residual sum: what most readers have before them.
        return ""
    names = [producer.name for producer in producers]
    if len(set(names)) != len(names):
        return "it reads two calls of one projection"
    for name in names:
        if others[name]:
            return f"what {name} gives is read by {', '.join(sorted(others[name])[:3])} too"
    for name in (*names, call.name):
        if name in shared:
            return f"the weight of {name} is that of {shared[name]} too"
    columns, rows = units
    if any(len({len(part) for part in parts}) != 1 for parts in (columns, *rows.values())):
        return "its units have different sizes"
    return UnitGroup(
        call.name,
        "neurons" if len(columns[0]) == 1 else "heads",
        np.stack(columns),
        {name: np.stack(parts) for name, parts in rows.items()},
    )


_Parts = tuple[list[Indices], dict[str, list[Indices]]]


class _Jacobian:
    """Which features of a reader's input depend on which features that were made before it."""

    def __init__(self, call: _Call, producers: Sequence[_Call]) -> None:
        self._given = call.given
        self._names = [producer.name for producer in producers]
        self._leaves = [producer.made for producer in producers]
        self._size = int(call.given.shape[-1])
        self._noise = _noise(call.given)

    def neurons(self) -> _Parts | None:
        """The units, where each output feature acts on one input feature only.

        The number of that feature is read bit by bit: one gradient with the features whose bit is set, one
        with those whose bit is not.
        """
        bits = max(1, (self._size - 1).bit_length())
        numbers = np.arange(self._size)
        decoded = [np.zeros(leaf.shape[-1], np.int64) for leaf in self._leaves]
        for bit in range(bits):
            is_set = (numbers >> bit & 1).astype(bool)
            ones, zeros = self._backward(is_set), self._backward(~is_set)
            for number, (one, zero) in enumerate(zip(ones, zeros, strict=True)):
                if (one & zero).any() or not (one | zero).all():
                    return None
                decoded[number] += one.astype(np.int64) << bit
        columns = [np.array([number]) for number in range(self._size)]
        rows: dict[str, list[Indices]] = {}
        for name, found in zip(self._names, decoded, strict=True):
            if len(np.bincount(found, minlength=self._size)) != self._size:
                return None
            order = np.argsort(found, kind="stable")
            counts = np.bincount(found, minlength=self._size)
            rows[name] = [np.sort(part) for part in np.split(order, np.cumsum(counts)[:-1])]
        return columns, rows

    def components(self) -> _Parts | None:
        """The connected components, or None where there is only one."""
        columns: list[Indices] = []
        rows: dict[str, list[Indices]] = {name: [] for name in self._names}
        left = np.ones(self._size, bool)
        while left.any():
            inside = np.zeros(self._size, bool)
            inside[int(np.argmax(left))] = True
            while True:
                made = self._backward(inside)
                wider = self._forward(made) | inside
                if wider.sum() == inside.sum():
                    break
                inside = wider
            if inside.all() or not (inside <= left).all():
                return None
            left &= ~inside
            columns.append(np.flatnonzero(inside))
            for name, part in zip(self._names, made, strict=True):
                rows[name].append(np.flatnonzero(part))
        return columns, rows

    def _backward(self, inside: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
        """The output features that these input features depend on."""
        import torch

        weights = self._noise * torch.from_numpy(inside).to(self._noise)
        found = _gradients(self._given, self._leaves, weights)
        return [_touched(part, leaf) for part, leaf in zip(found, self._leaves, strict=True)]

    def _forward(self, made: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
        """The input features that depend on these output features: the gradient's own gradient."""
        import torch

        weights = self._noise.clone().requires_grad_()
        first = _gradients(self._given, self._leaves, weights, again=True)
        pairs = [
            (part, torch.from_numpy(mask).to(part).expand_as(part) * _noise(part))
            for part, mask in zip(first, made, strict=True)
            if part is not None and part.requires_grad
        ]
        if not pairs:
            return np.zeros(self._size, bool)
        (found,) = torch.autograd.grad(
            [part for part, _ in pairs], [weights], [mask for _, mask in pairs], allow_unused=True
        )
        return _touched(found, weights)


def _touched(gradient: torch.Tensor | None, like: torch.Tensor) -> npt.NDArray[np.bool_]:
    if gradient is None:
        return np.zeros(like.shape[-1], bool)
    touched = gradient.detach().reshape(-1, gradient.shape[-1]).ne(0).any(0)
    return np.asarray(touched.cpu().numpy(), bool)


def _same(one: UnitGroup, other: UnitGroup) -> bool:
    return (
        one.rows.keys() == other.rows.keys()
        and np.array_equal(one.columns, other.columns)
        and all(np.array_equal(rows, other.rows[name]) for name, rows in one.rows.items())
    )
