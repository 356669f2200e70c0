"""Structured pruning of a PyTorch model: layers, heads and neurons go by their scores, and weights shrink."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.training.depth import drop_layers, find_layers
from onnxsmith.training.importance import (
    METHODS,
    NEEDS_DATA,
    Batch,
    Loss,
    Method,
    block_influence,
    scores,
    task_loss,
)
from onnxsmith.training.shrinking import PruningPlan, shrink
from onnxsmith.training.units import Kind, UnitGroup, find_units

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SCOPES", "PruningReport", "PruningSettings", "choose_units", "prune"]

Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = ("layer", "global")
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class PruningSettings:
    """How much goes, and by what.

    Attributes:
        heads: Share of the heads to remove.
        neurons: Share of the MLPs' neurons to remove.
        layers: Layers to remove: a share, or a number from 1 on.
        method: The score of heads and neurons; see ``importance``. Layers go by block influence, or at
            random with ``random``.
        scope: ``layer`` removes the share from each layer, so that the configuration still describes the
            model; ``global`` ranks all layers' units together, each of which keeps at least one.
        threshold: Besides, remove units whose score is below this part of the mean score of their layer.
        seed: Of ``random``.
    """

    heads: float = 0.0
    neurons: float = 0.0
    layers: float = 0.0
    method: Method = "taylor"
    scope: Scope = "layer"
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            BadInputError: A share that is not below 1, or a threshold below 0.
            UnknownNameError: No such method or scope.
        """
        for name in ("heads", "neurons"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInputError(
                    f"pruning: {name}", got=f"{getattr(self, name):g}", expected="a share from 0 to below 1"
                )
        if self.layers < 0 or (self.layers >= 1 and self.layers != int(self.layers)):
            raise BadInputError(
                "pruning: layers", got=f"{self.layers:g}", expected="a share below 1, or a whole number"
            )
        if self.threshold is not None and not self.threshold >= 0:
            raise BadInputError("pruning: threshold", got=f"{self.threshold:g}", expected="0 or more")
        if self.method not in METHODS:
            raise UnknownNameError("pruning", name=self.method, known=METHODS, kind="method")
        if self.scope not in SCOPES:
            raise UnknownNameError("pruning", name=self.scope, known=SCOPES, kind="scope")

    @property
    def needs_data(self) -> bool:
        """Whether scores are measured on data."""
        by_data = self.method in NEEDS_DATA and bool(self.heads or self.neurons or self.threshold is not None)
        return by_data or bool(self.layers and self.method != "random")


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What was removed.

    Attributes:
        plan: To do the same to another copy of the model.
        before: Parameters of the model as it was; tied ones count once.
        after: And as it is.
        kept: Reader of a group, or stack of layers, to (what stays, what there was).
        scores: Reader or stack to the score of each of its units.
        skipped: What could not be pruned and why.
    """

    plan: PruningPlan
    before: int
    after: int
    kept: Mapping[str, tuple[int, int]]
    scores: Mapping[str, Sequence[float]]
    skipped: Mapping[str, str]

    @property
    def ratio(self) -> float:
        """The share of the parameters that stays."""
        return self.after / self.before

    def to_json(self) -> dict[str, Any]:
        """Plain data, for reports."""
        return {
            "parameters_before": self.before,
            "parameters_after": self.after,
            "ratio": self.ratio,
            "kept": {name: list(pair) for name, pair in self.kept.items()},
            "scores": {name: [float(s) for s in values] for name, values in self.scores.items()},
            "skipped": dict(self.skipped),
        }


def prune(
    module: nn.Module,
    settings: PruningSettings,
    *,
    run: Callable[[], Any] | None = None,
    batches: Iterable[Batch] = (),
    loss: Loss = task_loss,
) -> PruningReport:
    """Prunes a model in place. Layers go first, then heads and neurons of those that stay.

    Args:
        module: The model.
        settings: How much, and by what.
        run: Calls the model on a few real tokens, without a KV cache: what can be removed is found on it, and
            the result is checked on it. The first batch, where None.
        batches: Data for the scores. Read once for layers, once more for units, so not an iterator.
        loss: For taylor.

    Raises:
        BadInputError: There is nothing to prune, a layer would lose everything, or data is missing.
        CheckFailedError: The smaller model did not compute what it should; it was put back.
    """
    data = batches if isinstance(batches, Sequence) else list(batches)
    call = run or _first(module, data)
    before = _parameters(module)
    training = module.training
    module.eval()
    undo = contextlib.ExitStack()
    try:
        kept: dict[str, tuple[int, int]] = {}
        found: dict[str, Floats] = {}
        layers: dict[str, Sequence[int]] = {}
        if settings.layers:
            layers = _drop(module, settings, call, data, kept, found, undo)
        plan, skipped = PruningPlan(layers), {}
        if settings.heads or settings.neurons or settings.threshold is not None:
            units = find_units(module, call, seed=settings.seed)
            skipped = dict(units.skipped)
            groups = [group for group in units.groups if _share(settings, group.kind) is not None]
            if not groups:
                raise BadInputError(
                    f"pruning of {type(module).__name__}",
                    got="no heads or neurons that can be removed" + _shown(skipped),
                    expected="at least one group of them",
                )
            found |= scores(module, groups, settings.method, batches=data, loss=loss, seed=settings.seed)
            chosen = choose_units(groups, found, settings)
            made = shrink(module, chosen, call)
            plan = dataclasses.replace(made, layers=layers)
            kept |= {group.name: (len(units), group.count) for group, units in chosen}
    except BaseException:
        undo.close()
        raise
    finally:
        module.train(training)
    return PruningReport(
        plan, before, _parameters(module), kept, {n: s.tolist() for n, s in found.items()}, skipped
    )


def _first(module: nn.Module, data: Sequence[Batch]) -> Callable[[], Any]:
    if not data:
        raise BadInputError(
            f"pruning of {type(module).__name__}", got="neither run nor batches", expected="one of them"
        )
    batch = {name: tensor for name, tensor in data[0].items() if name != "labels"}
    # An encoder's configuration has the key too.
    has_cache = "use_cache" in inspect.signature(module.forward).parameters
    return lambda: module(**batch, **({"use_cache": False} if has_cache else {}))


def _shown(skipped: Mapping[str, str]) -> str:
    found = [f"{name}: {reason}" for name, reason in list(skipped.items())[:3]]
    return f" ({'; '.join(found)})" if found else ""


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _share(settings: PruningSettings, kind: Kind) -> float | None:
    """What goes of a kind; None where nothing does."""
    share = settings.heads if kind == "heads" else settings.neurons
    return share if share or settings.threshold is not None else None


def _drop(
    module: nn.Module,
    settings: PruningSettings,
    call: Callable[[], Any],
    data: Sequence[Batch],
    kept: dict[str, tuple[int, int]],
    found: dict[str, Floats],
    undo: contextlib.ExitStack,
) -> dict[str, Sequence[int]]:
    stacks = find_layers(module, call)
    if not stacks:
        raise BadInputError(
            f"pruning of {type(module).__name__}",
            got="no layers that follow each other, each on what the one before gave",
            expected="a stack of them",
        )
    result: dict[str, Sequence[int]] = {}
    for number, stack in enumerate(stacks):
        count = len(stack.layers)
        going = int(settings.layers) if settings.layers >= 1 else round(settings.layers * count)
        if going >= count:
            raise BadInputError(
                f"pruning of {stack.name}", got=f"{going} of {count} layers", expected=f"at most {count - 1}"
            )
        if settings.method == "random":
            values = np.random.default_rng([settings.seed, number]).random(count)
        else:
            values = block_influence(module, stack.layers, data)
        staying = sorted(np.argsort(-values, kind="stable")[: count - going].tolist())
        undo.callback(drop_layers(module, stack.name, staying).undo)
        found[stack.name], result[stack.name] = values, staying
        kept[stack.name] = (len(staying), count)
    return result


def choose_units(
    groups: Sequence[UnitGroup], found: Mapping[str, Floats], settings: PruningSettings
) -> list[tuple[UnitGroup, list[int]]]:
    """Which units stay.

    With the scope ``global``, scores of different layers are compared. Sums of weights or activations are
    divided by their root mean square in the layer first, because layers differ in scale; Taylor scores are
    in units of the loss already.

    Args:
        groups: Of ``find_units``.
        found: Scores by name.
        settings: How much.
    """
    chosen: list[tuple[UnitGroup, list[int]]] = []
    for kind in ("heads", "neurons"):
        parts = [group for group in groups if group.kind == kind]
        share = _share(settings, kind)
        if not parts or share is None:
            continue
        if settings.scope == "layer":
            cut = [_lowest(found[g.name], min(round(share * g.count), g.count - 1)) for g in parts]
        else:
            cut = _globally([_comparable(found[g.name], settings.method) for g in parts], share)
        for group, going in zip(parts, cut, strict=True):
            values = found[group.name]
            if settings.threshold is not None:
                going = going | (values < settings.threshold * values.mean())
                going[int(np.argmax(values))] = False
            chosen.append((group, np.flatnonzero(~going).tolist()))
    order = {group.name: number for number, group in enumerate(groups)}
    return sorted(chosen, key=lambda pair: order[pair[0].name])


def _comparable(values: Floats, method: str) -> Floats:
    if method == "taylor":
        return values
    size = float(np.sqrt(np.mean(np.square(values))))
    return values / size if size else values


def _lowest(values: Floats, count: int) -> npt.NDArray[np.bool_]:
    going = np.zeros(len(values), bool)
    going[np.argsort(values, kind="stable")[:count]] = True
    return going


def _globally(values: Sequence[Floats], share: float) -> list[npt.NDArray[np.bool_]]:
    # The best of each layer stays, whatever it is worth elsewhere.
    protected = [np.where(np.arange(len(v)) == np.argmax(v), np.inf, v) for v in values]
    flat = np.concatenate(protected)
    count = min(round(share * len(flat)), len(flat) - len(values))
    going = _lowest(flat, count)
    return np.split(going, np.cumsum([len(v) for v in values])[:-1])
