"""Whole layers: finding the stack that a model runs its hidden state through, and taking layers out of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DroppedLayers", "LayerStack", "drop_layers", "find_layers"]


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Layers that are called one after the other, each on what the one before gave.

    Attributes:
        name: The ``nn.ModuleList``.
        layers: Its modules.
    """

    name: str
    layers: tuple[nn.Module, ...]


def find_layers(module: nn.Module, run: Callable[[], Any]) -> list[LayerStack]:
    """Finds stacks of layers any of which can be taken out: each gives what it could have been given.

    Args:
        module: The model.
        run: Calls it once.
    """
    import torch
    from torch import nn

    stacks = {
        name: list(part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1
    }
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def watch(part: nn.Module, given: tuple[Any, ...], keywords: Mapping[str, Any], made: Any) -> None:
        before = given[0] if given else keywords.get("hidden_states")
        after = made[0] if isinstance(made, tuple) and made else made
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            seen.setdefault(id(part), []).append((before, after))

    hooks = [
        layer.register_forward_hook(watch, with_kwargs=True) for layers in stacks.values() for layer in layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerStack(name, tuple(layers))
        for name, layers in stacks.items()
        if _is_chain([seen.get(id(layer), []) for layer in layers])
    ]


def _is_chain(calls: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> bool:
    """Whether each layer was called once, on exactly what the one before gave, and keeps its shape."""
    if any(len(found) != 1 for found in calls):
        return False
    pairs = [found[0] for found in calls]
    if any(before.shape != after.shape or before.dtype != after.dtype for before, after in pairs):
        return False
    return all(_is(one[1], other[0]) for one, other in itertools.pairwise(pairs))


def _is(made: torch.Tensor, given: torch.Tensor) -> bool:
    return made is given or (made.shape == given.shape and made.data_ptr() == given.data_ptr())


@dataclasses.dataclass(frozen=True)
class DroppedLayers:
    """What taking layers out changed.

    Attributes:
        config: Key of the model's configuration to its new value.
        before: Object, attribute and what it was.
    """

    config: Mapping[str, Any]
    before: Sequence[tuple[Any, str, Any]]

    def undo(self) -> None:
        """Puts the layers back."""
        for owner, attribute, value in reversed(self.before):
            setattr(owner, attribute, value)


def drop_layers(module: nn.Module, stack: str, keep: Sequence[int]) -> DroppedLayers:
    """Keeps some layers of a stack, in place; what counts or numbers layers follows.

    Args:
        module: The model.
        stack: The name of its ``nn.ModuleList``.
        keep: Layers to keep, in order.

    Raises:
        BadInputError: There is no such layer, or none would be left.
    """
    from torch import nn

    layers = module.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    count = len(layers)
    kept = sorted(set(keep))
    if not kept or kept[0] < 0 or kept[-1] >= count:
        raise BadInputError(
            f"layers of {stack}", got=f"to keep {kept}", expected=f"some of 0 to {count - 1}, at least one"
        )
    before: list[tuple[Any, str, Any]] = []

    def put(owner: Any, attribute: str, value: Any) -> None:
        before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    if len(kept) == count:
        return DroppedLayers({}, before)
    parent, _, attribute = stack.rpartition(".")
    owner = module.get_submodule(parent)
    put(owner, attribute, nn.ModuleList([layers[i] for i in kept]))
    for number, old in enumerate(kept):
        for part in layers[old].modules():
            for name in _INDEX_NAMES:
                if vars(part).get(name) == old:
                    put(part, name, number)
    for part in {id(p): p for p in (owner, module)}.values():
        for name in _COUNT_NAMES & vars(part).keys():
            if getattr(part, name) == count:
                put(part, name, len(kept))
    changed = dict(_config_changes(owner, module, count, kept))
    for config in _configs(owner, module):
        for name, value in changed.items():
            if hasattr(config, name):
                put(config, name, value)
    return DroppedLayers(changed, before)


_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
_COUNT_NAMES = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}
)


def _configs(owner: nn.Module, module: nn.Module) -> list[Any]:
    found = [vars(part).get("config") for part in (owner, module)]
    return list({id(config): config for config in found if config is not None}.values())


def _config_changes(
    owner: nn.Module, module: nn.Module, count: int, kept: Sequence[int]
) -> Iterator[tuple[str, Any]]:
    """Counts of layers, and lists with one entry for each layer."""
    for config in _configs(owner, module):
        for name, value in vars(config).items():
            if name in _COUNT_NAMES and value == count:
                yield name, len(kept)
            elif isinstance(value, list) and len(value) == count and "layer" in name:
                yield name, [value[i] for i in kept]
        for alias in getattr(type(config), "attribute_map", {}).values():
            if alias in _COUNT_NAMES and getattr(config, alias, None) == count:
                yield alias, len(kept)
