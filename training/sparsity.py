"""Weights of a PyTorch model become zero, where they matter least, and stay zero while it is taught back.

The mathematics is that of the pass for graphs (``onnxsmith.sparse_rounding``). Layers of a stack are pruned
from the first to the last, each measured on what the pruned ones before it give, as the authors of SparseGPT
and Wanda do: what is lost in one layer can be made up for in the next.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.sparse_rounding import (
    NOT_FASTER,
    check_sparsity,
    magnitude_threshold,
    output_error,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
    stored_mb,
)
from onnxsmith.training.depth import find_layers
from onnxsmith.training.units import in_features, is_projection, shared_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "SPARSITY_METHODS",
    "SparsityMethod",
    "SparsityReport",
    "SparsitySettings",
    "is_sparse",
    "kept_zeros",
    "mark_sparse",
    "sparsify",
]

SparsityMethod = Literal["magnitude", "wanda", "sparsegpt"]
SPARSITY_METHODS: tuple[SparsityMethod, ...] = ("magnitude", "wanda", "sparsegpt")
Floats = npt.NDArray[np.float32]
Batch = Mapping[str, "torch.Tensor"]
# What the moments of the activations that are measured in one run over the data may take.
_LIMIT_BYTES = 1 << 30
_MARK = "zeros_stay"


@dataclasses.dataclass(frozen=True)
class SparsitySettings:
    """Which weights go.

    Attributes:
        ratio: The share of each matrix; of each row with wanda.
        pattern: ``unstructured``, or N:M such as 2:4: N of each M weights in a row stay, whatever the ratio.
        method: magnitude, wanda or sparsegpt; the last two need data.
        scope: ``layer``, or ``global``: all matrices are ranked together (magnitude only).
        threshold: Take what is smaller than this, in place of the ratio (magnitude only).
        damping: Of sparsegpt; 0.1 is better with fewer than about ten tokens for each column.
        skip: Patterns of names of modules that keep their weights.
    """

    ratio: float = 0.5
    pattern: str = "unstructured"
    method: SparsityMethod = "sparsegpt"
    scope: Literal["layer", "global"] = "layer"
    threshold: float | None = None
    damping: float = 0.01
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            BadInputError: One of them makes no sense.
            UnknownNameError: No such method.
        """
        if self.method not in SPARSITY_METHODS:
            raise UnknownNameError(
                "pruning of weights", name=self.method, known=SPARSITY_METHODS, kind="method"
            )
        # Checked where it is found.
        _ = self.group

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M; None of what is unstructured."""
        return check_sparsity(
            "pruning of weights", method=self.method, ratio=self.ratio, pattern=self.pattern,
            scope=self.scope, threshold=self.threshold, damping=self.damping,
        )  # fmt: skip

    @property
    def needs_data(self) -> bool:
        """Whether it looks at activations."""
        return self.method != "magnitude"


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What became zero.

    Attributes:
        method: By what.
        pattern: How.
        layers: Module to ``zeros``, a share, and with sparsegpt to ``relative_error``, the mean squared error
            of what it gives on the data, relative to the mean square.
        zeros: The share of all weights that were pruned.
        mb: What the matrices take.
        mb_if_packed: What they would take as a bit for each weight and the weights that stay.
        skipped: Module to why it was left alone.
    """

    method: str
    pattern: str
    layers: Mapping[str, Mapping[str, float]]
    zeros: float
    mb: float
    mb_if_packed: float
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for reports."""
        return dataclasses.asdict(self) | {"matrices": len(self.layers), "speed": NOT_FASTER}


def mark_sparse(part: nn.Module) -> None:
    """Says that the zeros of a module's weight stay zero when it is trained."""
    setattr(part, _MARK, True)


def is_sparse(part: nn.Module) -> bool:
    """Whether the zeros of a module's weight stay."""
    return bool(getattr(part, _MARK, False))


def kept_zeros(module: nn.Module) -> dict[str, torch.Tensor]:
    """Names of weights to what of them may change: False where a zero stays."""
    return {
        f"{name}.weight" if name else "weight": part.weight.detach() != 0
        for name, part in module.named_modules()
        if is_sparse(part)
    }


def sparsify(
    module: nn.Module,
    settings: SparsitySettings,
    *,
    run: Callable[[], Any] | None = None,
    batches: Sequence[Batch] = (),
    call: Callable[[Any, Batch], Any] | None = None,
) -> SparsityReport:
    """Sets weights of projections to zero, in place. From then on ``fit`` leaves these zeros as they are.

    Embeddings, output heads that share an embedding's weight, and output heads of decoders keep theirs.

    Args:
        module: The model.
        settings: How many, and by what.
        run: Calls the model once, without a KV cache: the stack of layers is found on it.
        batches: Data for wanda and sparsegpt. Tokens whose ``attention_mask`` is 0 do not count.
        call: Calls the model on a batch.

    Raises:
        BadInputError: There is nothing to prune, or data is missing.
    """
    import torch

    where = f"pruning of weights of {type(module).__name__}"
    parts, skipped = _projections(module, settings)
    if not parts:
        shown = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise BadInputError(
            where, got="no projection to prune" + (f" ({shown})" if shown else ""), expected="at least one"
        )
    if settings.needs_data and not batches:
        raise BadInputError(f"{where} by {settings.method}", got="no data", expected="at least one batch")
    call = call or (lambda model, batch: model(**batch))
    training = module.training
    module.eval()
    layers: dict[str, dict[str, float]] = {}
    try:
        with torch.no_grad():
            if settings.method == "magnitude":
                _by_magnitude(parts, settings, layers)
            else:
                first = batches[0]
                stack = find_layers(module, run or (lambda: call(module, first)))
                chosen = [layer for found in stack for layer in found.layers]
                _with_data(_Measured(module, chosen, parts, batches, call), settings, layers)
    finally:
        module.train(training)
    for part in parts.values():
        mark_sparse(part)
    total = sum(part.weight.numel() for part in parts.values())
    stored = sum(part.weight.numel() * part.weight.element_size() for part in parts.values())
    zeros = sum(layers[name]["zeros"] * part.weight.numel() for name, part in parts.items()) / total
    return SparsityReport(
        settings.method, settings.pattern, layers, zeros, **stored_mb(total, zeros, stored), skipped=skipped
    )


def _projections(module: nn.Module, settings: SparsitySettings) -> tuple[dict[str, Any], dict[str, str]]:
    """What is pruned, by name, and what is not and why."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find is not None else None
    shared, group = shared_weights(module), settings.group
    parts: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, part in module.named_modules():
        if not is_projection(part):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.skip):
            skipped[name] = "named in skip"
        elif part is head:
            skipped[name] = "the output head"
        elif name in shared:
            skipped[name] = f"its weight is that of {shared[name]} too"
        elif group is not None and in_features(part) % group[1]:
            skipped[name] = f"rows of {in_features(part)} are no multiple of {group[1]}"
        else:
            parts[name] = part
    return parts, skipped


def _matrix(part: Any) -> Floats:
    """The weight as (out, in)."""
    import torch

    weight = part.weight.detach().float().cpu()
    rows = weight if isinstance(part, torch.nn.Linear) else weight.T
    return np.ascontiguousarray(rows.numpy())


def _put(part: Any, matrix: Floats) -> float:
    """Writes a weight, and says which share of it is zero."""
    import torch

    made = torch.from_numpy(matrix)
    part.weight.copy_(made if isinstance(part, torch.nn.Linear) else made.T)
    return float((matrix == 0).mean())


def _by_magnitude(
    parts: Mapping[str, Any], settings: SparsitySettings, layers: dict[str, dict[str, float]]
) -> None:
    threshold = settings.threshold
    if threshold is None and settings.scope == "global":
        threshold = magnitude_threshold((_matrix(part) for part in parts.values()), settings.ratio)
    for name, part in parts.items():
        made = prune_magnitude(_matrix(part), settings.ratio, settings.group, threshold=threshold)
        layers[name] = {"zeros": _put(part, made)}


def _with_data(measured: _Measured, settings: SparsitySettings, layers: dict[str, dict[str, float]]) -> None:
    only_norms = settings.method == "wanda"
    for name, part, moments in measured.moments(only_norms=only_norms):
        matrix = _matrix(part)
        if only_norms:
            made = prune_wanda(matrix, np.sqrt(moments), settings.ratio, settings.group)
            layers[name] = {"zeros": _put(part, made)}
            continue
        made = prune_sparsegpt(matrix, moments, settings.ratio, settings.group, damping=settings.damping)
        error = output_error(matrix, made, moments)
        layers[name] = {"zeros": _put(part, made), "relative_error": error}


class _Measured:
    """What projections are given, layer after layer, while those before them change."""

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        parts: Mapping[str, Any],
        batches: Sequence[Batch],
        call: Callable[[Any, Batch], Any],
    ) -> None:
        self._module, self._layers, self._parts = module, layers, parts
        self._batches, self._call = batches, call
        inside = {id(part) for layer in layers for part in layer.modules()}
        self._outside = {name: part for name, part in parts.items() if id(part) not in inside}

    def moments(self, *, only_norms: bool) -> Iterator[tuple[str, Any, Floats]]:
        """Yields each projection with x.T @ x / rows of what it is given, or the diagonal of that.

        Raises:
            BadInputError: None of the data reaches a projection.
        """
        # Two stacks, as of an encoder and a decoder, are in the order in which they run.
        states = self._captured() if self._layers else {}
        for number, layer in enumerate(self._layers):
            names = {id(part): name for name, part in self._parts.items()}
            own = {names[id(part)]: part for part in layer.modules() if id(part) in names}
            calls = states[number]
            if own:
                runs = [functools.partial(call.run, layer) for call in calls]
                yield from self._collected(own, runs, only_norms)
            if number + 1 < len(self._layers) and states[number + 1][0].follows:
                for one, following in zip(calls, states[number + 1], strict=True):
                    following.hidden = one.run(layer)
            # What it was given is not needed any more.
            states[number] = []
        if self._outside:
            runs = [functools.partial(self._call, self._module, batch) for batch in self._batches]
            yield from self._collected(self._outside, runs, only_norms)

    def _captured(self) -> dict[int, list[_LayerCall]]:
        """For each layer and batch how it is called."""
        found: dict[int, list[_LayerCall]] = {number: [] for number in range(len(self._layers))}
        last: list[Any] = [None]

        def before(number: int) -> Callable[..., None]:
            def hook(_part: Any, given: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
                hidden = given[0] if given else keywords["hidden_states"]
                follows = last[0] is not None and _is(last[0], hidden)
                call = _LayerCall(None if follows else hidden, given, keywords, follows)
                found[number].append(call)

            return hook

        def after(_part: Any, _given: Any, made: Any) -> None:
            last[0] = made[0] if isinstance(made, tuple) else made

        hooks = []
        for number, layer in enumerate(self._layers):
            hooks.append(layer.register_forward_pre_hook(before(number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(after))
        try:
            for batch in self._batches:
                last[0] = None
                self._call(self._module, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _collected(
        self, parts: Mapping[str, Any], runs: Sequence[Callable[[], Any]], only_norms: bool
    ) -> Iterator[tuple[str, Any, Floats]]:
        for group in _grouped(parts, only_norms):
            sums: dict[str, Any] = {}
            counts = dict.fromkeys(group, 0)
            # Projections that read one tensor, such as query, key and value, share its moments.
            seen: dict[int, tuple[Any, Any, int]] = {}
            mask: list[Any] = [None]
            hooks = [
                part.register_forward_pre_hook(_adding(name, sums, counts, seen, mask, only_norms))
                for name, part in group.items()
            ]
            try:
                for batch, run in zip(self._batches, runs, strict=True):
                    seen.clear()
                    mask[0] = batch.get("attention_mask")
                    run()
            finally:
                for hook in hooks:
                    hook.remove()
            for name, part in group.items():
                if not counts[name]:
                    raise BadInputError(
                        f"pruning of weights: {name}", got="no token of the data that reaches it",
                        expected="at least one", remedy="Name it in skip",
                    )  # fmt: skip
                yield name, part, (sums.pop(name) / counts[name]).cpu().numpy().astype(np.float32)


@dataclasses.dataclass
class _LayerCall:
    """How a layer is called with a batch."""

    hidden: torch.Tensor | None
    given: tuple[Any, ...]
    keywords: Mapping[str, Any]
    follows: bool

    def __post_init__(self) -> None:
        # What goes through the stack is not kept for each layer.
        if self.given:
            self.given = (None, *self.given[1:])
        else:
            self.keywords = {**self.keywords, "hidden_states": None}

    def run(self, layer: nn.Module) -> torch.Tensor:
        if self.given:
            made = layer(self.hidden, *self.given[1:], **self.keywords)
        else:
            made = layer(**{**self.keywords, "hidden_states": self.hidden})
        result: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return result


def _adding(
    name: str,
    sums: dict[str, Any],
    counts: dict[str, int],
    seen: dict[int, tuple[Any, Any, int]],
    mask: Sequence[Any],
    only_norms: bool,
) -> Callable[..., None]:
    def hook(_part: Any, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        known = seen.get(id(x))
        if known is None or known[0] is not x:
            rows = x.detach()
            tokens = mask[0]
            if tokens is not None and rows.shape[:-1] == tokens.shape:
                rows = rows[tokens.bool()]
            rows = rows.reshape(-1, rows.shape[-1]).float()
            known = (x, rows.square().sum(0) if only_norms else rows.T @ rows, len(rows))
            # The tensor is kept while its number is known, or another could get it.
            seen[id(x)] = known
        sums[name] = known[1].clone() if name not in sums else sums[name].add_(known[1])
        counts[name] += known[2]

    return hook


def _grouped(parts: Mapping[str, Any], only_norms: bool) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    used = 0
    for name, part in parts.items():
        size = 0 if only_norms else 4 * in_features(part) ** 2
        if group and used + size > _LIMIT_BYTES:
            yield group
            group, used = {}, 0
        group[name] = part
        used += size
    if group:
        yield group


def _is(made: Any, given: Any) -> bool:
    return made is given or (made.shape == given.shape and made.data_ptr() == given.data_ptr())
