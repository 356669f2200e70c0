"""How much a model needs each of its units and layers.

With W the weight of the module that reads a unit, c its columns that are the unit's, x what it is given and L
the loss, the score of a unit is

- ``l1``, ``l2``: the norm of all weights that would go with it: ``sum |w|``, ``sqrt(sum w**2)`` (Li et al.,
  2017, https://arxiv.org/abs/1608.08710).
- ``taylor``: ``mean over samples of |sum over tokens and c of x * dL/dx|``, to first order how much the loss
  changes without it (Molchanov et al., 2017, https://arxiv.org/abs/1611.06440; for heads Michel et al.,
  2019, https://arxiv.org/abs/1905.10650).
- ``wanda``: ``sum over c of ||x_c||_2 * sum_i |W_ic|``, the score that Wanda gives single weights (Sun et
  al., 2023, https://arxiv.org/abs/2306.11695), summed over those that would go.
- ``random``: a control.

The score of a layer is ``block_influence`` (Men et al., ShortGPT, 2024, https://arxiv.org/abs/2403.03853):
``1 - mean over tokens of cos(x, y)``, with x what goes into the layer and y what comes out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.training.units import UnitGroup, in_features

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["METHODS", "NEEDS_DATA", "Batch", "Loss", "Method", "block_influence", "scores", "task_loss"]

Method = Literal["l1", "l2", "taylor", "wanda", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
NEEDS_DATA = frozenset({"taylor", "wanda"})
Floats = npt.NDArray[np.float64]
Batch = Mapping[str, "torch.Tensor"]
"""The keyword arguments of one call of the model."""
Loss = Callable[["nn.Module", Batch], "torch.Tensor"]
"""Runs the model on a batch and gives its loss, a scalar."""


def task_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a model of transformers: its own with labels, that of the text for a decoder without.

    Raises:
        BadInputError: There are no labels, and the output is not one that predicts the next token.
    """
    import torch

    found = module(**batch)
    loss = getattr(found, "loss", None)
    if loss is not None:
        assert isinstance(loss, torch.Tensor)
        return loss
    logits, ids = getattr(found, "logits", None), batch.get("input_ids")
    if logits is None or ids is None or logits.shape[:-1] != ids.shape:
        raise BadInputError(
            f"the loss of {type(module).__name__}",
            got="batches without labels",
            expected="labels in each batch, or a loss of your own",
        )
    targets = ids[:, 1:].clone()
    mask = batch.get("attention_mask")
    if mask is not None:
        targets[mask[:, 1:] == 0] = -100
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def scores(
    module: nn.Module,
    groups: Sequence[UnitGroup],
    method: Method,
    *,
    batches: Iterable[Batch] = (),
    loss: Loss = task_loss,
    seed: int = 0,
) -> dict[str, Floats]:
    """The score of each unit of each group, by the group's name: the higher, the more it is needed.

    Args:
        module: The model; it is left as it is.
        groups: What ``find_units`` found.
        method: See above.
        batches: Data, for taylor and wanda. One batch is held at a time.
        loss: For taylor.
        seed: For random.

    Raises:
        UnknownNameError: No such method.
        BadInputError: A method that needs data, and no batch.
    """
    if method not in METHODS:
        raise UnknownNameError("importance", name=method, known=METHODS, kind="method")
    parts = dict(module.named_modules())
    if method == "random":
        generator = np.random.default_rng(seed)
        return {group.name: generator.random(group.count) for group in groups}
    if method in ("l1", "l2"):
        return {group.name: _magnitude(parts, group, 1 if method == "l1" else 2) for group in groups}
    columns = {group.name: np.zeros(in_features(parts[group.name])) for group in groups}
    with _evaluating(module):
        if method == "wanda":
            return _wanda(module, parts, groups, batches, columns)
        return _taylor(module, parts, groups, batches, loss)


def _magnitude(parts: Mapping[str, Any], group: UnitGroup, power: int) -> Floats:
    total = np.zeros(group.count)
    for name, rows in group.rows.items():
        sums = _powers(_matrix(parts[name]), power).sum(1)
        bias = getattr(parts[name], "bias", None)
        if bias is not None:
            sums = sums + _powers(bias.detach(), power)
        total += sums.double().cpu().numpy()[rows].sum(1)
    sums = _powers(_matrix(parts[group.name]), power).sum(0)
    total += sums.double().cpu().numpy()[group.columns].sum(1)
    return total if power == 1 else np.sqrt(total)


def _powers(tensor: torch.Tensor, power: int) -> torch.Tensor:
    return tensor.abs() if power == 1 else tensor.square()


def _matrix(part: Any) -> torch.Tensor:
    """The weight of a projection as (out, in)."""
    import torch

    weight: torch.Tensor = part.weight.detach()
    return weight if isinstance(part, torch.nn.Linear) else weight.T


def _wanda(
    module: nn.Module,
    parts: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    batches: Iterable[Batch],
    columns: dict[str, Floats],
) -> dict[str, Floats]:
    import torch

    def watch(name: str) -> Callable[..., None]:
        def hook(_part: Any, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).float()
            columns[name] += rows.square().sum(0).double().cpu().numpy()

        return hook

    count = 0
    with _hooked(parts[g.name].register_forward_pre_hook(watch(g.name)) for g in groups), torch.no_grad():
        for batch in batches:
            module(**batch)
            count += 1
    _require(count, "wanda")
    result = {}
    for group in groups:
        weights = _matrix(parts[group.name]).abs().sum(0).double().cpu().numpy()
        result[group.name] = (np.sqrt(columns[group.name]) * weights)[group.columns].sum(1)
    return result


def _taylor(
    module: nn.Module,
    parts: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    batches: Iterable[Batch],
    loss: Loss,
) -> dict[str, Floats]:
    import torch

    result = {group.name: np.zeros(group.count) for group in groups}
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Callable[..., Any]:
        def hook(_part: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # A tensor of its own, so that weights need no gradient.
            x = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
            seen.setdefault(name, []).append(x)
            return (x, *given[1:])

        return hook

    samples = 0
    with (
        _hooked(parts[g.name].register_forward_pre_hook(watch(g.name)) for g in groups),
        _without_weight_gradients(module),
        torch.enable_grad(),
    ):
        for batch in batches:
            seen.clear()
            value = loss(module, batch)
            size = len(next(iter(batch.values())))
            samples += size
            flat = [x for group in groups for x in seen.get(group.name, [])]
            gradients = iter(torch.autograd.grad(value, flat, allow_unused=True))
            for group in groups:
                for x in seen.get(group.name, []):
                    gradient = next(gradients)
                    if gradient is None:
                        continue
                    # A loss is a mean over samples; what each of them says is not.
                    product = (x.detach() * gradient).double() * size
                    rows = (
                        product.reshape(size, -1, product.shape[-1])
                        if product.dim() > 2
                        else product[:, None]
                    )
                    units = rows.sum(1).cpu().numpy()[:, group.columns].sum(-1)
                    result[group.name] += np.abs(units).sum(0)
    _require(samples, "taylor")
    return {name: total / samples for name, total in result.items()}


def block_influence(
    module: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Batch]
) -> npt.NDArray[np.float64]:
    """How much each layer turns the hidden state that goes through it.

    Args:
        module: The model.
        layers: Modules that take the hidden state first and give it back.
        batches: Data. Padding, where ``attention_mask`` is 0, does not count.

    Raises:
        BadInputError: There is no batch.
    """
    import torch

    sums = np.zeros(len(layers))
    mask: torch.Tensor | None = None

    def watch(index: int) -> Callable[..., None]:
        def hook(_part: Any, given: tuple[Any, ...], keywords: Mapping[str, Any], made: Any) -> None:
            before = given[0] if given else keywords["hidden_states"]
            after = made[0] if isinstance(made, tuple) else made
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            kept = cosine[mask.bool()] if mask is not None and mask.shape == cosine.shape else cosine
            sums[index] += float((1 - kept).sum())

        return hook

    tokens = 0
    hooks = (part.register_forward_hook(watch(i), with_kwargs=True) for i, part in enumerate(layers))
    with _evaluating(module), _hooked(hooks), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            module(**batch)
            first = next(iter(batch.values()))
            tokens += int(mask.sum()) if mask is not None else first.numel()
    _require(tokens, "block influence")
    return sums / tokens


def _require(count: int, method: str) -> None:
    if not count:
        raise BadInputError(f"importance by {method}", got="no batch of data", expected="at least one")


@contextlib.contextmanager
def _hooked(hooks: Iterable[Any]) -> Iterator[None]:
    handles = []
    try:
        for handle in hooks:
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextlib.contextmanager
def _without_weight_gradients(module: nn.Module) -> Iterator[None]:
    kept = [(p, p.requires_grad) for p in module.parameters()]
    for parameter, _ in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in kept:
            parameter.requires_grad_(flag)
