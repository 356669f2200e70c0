"""Structured pruning: heads, neurons and channels of convolutions are removed, and tensors shrink.

The scores (see ``docs/pruning.md``), with W what reads a unit, c its columns of W, and x what W reads:

- ``l1``, ``l2``: the norm of all weights of the unit (Li et al., 2017, https://arxiv.org/abs/1608.08710);
- ``wanda``: ``sum over c of ||x_c||_2 * sum_i |W_ic|``, summed over the weights that go (Sun et al., 2023,
  https://arxiv.org/abs/2306.11695);
- ``hessian``: ``trace(W_c inv(inv(H)_cc) W_c.T)`` with ``H = x.T @ x`` damped: the squared error of the
  output without the unit, when all other columns are adapted to its absence (Frantar and Alistarh, Optimal
  Brain Compression, 2022, https://arxiv.org/abs/2208.11580; for structures Kurtic et al., ZipLM, 2023,
  https://arxiv.org/abs/2302.04089). The columns k that stay are adapted: ``W H_:k inv(H_kk)``;
- ``random``: a control.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.compensation import adapt_readers, hessian_scores
from onnxsmith.graph_passes.context import Activations, activations_for, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.gptq import second_moments
from onnxsmith.graph_passes.observers import Channels
from onnxsmith.graph_passes.package_config import CONFIG
from onnxsmith.graph_passes.pruning_choice import Scope, excluded, lowest_units
from onnxsmith.graph_passes.unit_groups import (
    GraphUnits,
    UnitKind,
    WeightGroup,
    find_graph_units,
    magnitudes,
    reader_scores,
)
from onnxsmith.graph_passes.unit_removal import remove_units

__all__ = ["PruneChannels", "PruneHeads", "PruneNeurons"]

Method = Literal["l1", "l2", "wanda", "hessian", "random"]
Floats = npt.NDArray[np.float64]
_NEEDS_DATA = ("wanda", "hessian")


def _refuse_gradients(name: str, method: object) -> None:
    if method == "taylor":
        raise BadInputError(
            f"pass {name}: method", got="taylor, which needs gradients, and ONNX Runtime computes none",
            expected=", ".join(get_args(Method)),
            remedy="Prune in PyTorch: `prune: {method: taylor}` in `training.steps` of a recipe",
        )  # fmt: skip


class _PruneUnits(GraphPass):
    @property
    @abc.abstractmethod
    def kind(self) -> UnitKind:
        """What goes."""

    def __init__(
        self,
        *,
        ratio: float = 0.5,
        method: Method = "l2",
        scope: Scope = "layer",
        threshold: float | None = None,
        skip_nodes: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        """Sets how many go.

        Args:
            ratio: The share of units to remove.
            method: Their score: l1, l2, wanda, hessian or random; wanda and hessian need calibration data.
            scope: layer removes the share from each layer; global ranks all layers together.
            threshold: Besides, remove units whose score is below this part of the mean of their layer.
            skip_nodes: Patterns of names of weights, or of nodes that use them, that keep their units.
            seed: Of random.

        Raises:
            BadInputError: A ratio that is not from 0 to below 1, or a threshold below 0.
        """
        _refuse_gradients(self.name, method)
        if not 0 <= ratio < 1:
            raise BadInputError(f"pass {self.name}: ratio", got=f"{ratio:g}", expected="0 to below 1")
        if threshold is not None and not threshold >= 0:
            raise BadInputError(f"pass {self.name}: threshold", got=f"{threshold:g}", expected="0 or more")
        self.ratio = ratio
        self.method = method
        self.scope = scope
        self.threshold = threshold
        self.skip_nodes = tuple(skip_nodes)
        self.seed = seed

    @classmethod
    def create(cls, arguments: Mapping[str, Any]) -> GraphPass:
        """Makes the pass from plain data.

        Raises:
            BadInputError: A value that it does not take; of ``taylor``, where that can be had.
            UnknownNameError: A parameter that the pass does not have.
        """
        _refuse_gradients(cls.name, arguments.get("method"))
        return super().create(arguments)

    def apply(self, model: ir.Model) -> Changes:
        """Removes the units with the lowest scores.

        Raises:
            PreconditionError: There are none that can go, or data is missing.
        """
        common.ShapeInferencePass()(model)
        found = find_graph_units(model)
        changes = Changes(skipped=dict(found.skipped))
        groups: list[WeightGroup] = []
        for group in (group for group in found.groups if group.kind == self.kind):
            nodes = [side.node for side in group.sides]
            names = [group.name, *(n.name or "" for n in nodes), *(s.source.name or "" for s in group.sides)]
            if excluded(names, self.skip_nodes):
                changes.skipped[group.name] = "excluded by skip_nodes"
            else:
                groups.append(group)
        if not groups:
            shown = "; ".join(f"{name}: {why}" for name, why in list(changes.skipped.items())[:3])
            raise PreconditionError(
                f"pass {self.name}",
                got=f"no {self.kind} that can be removed" + (f" ({shown})" if shown else ""),
                expected="at least two of them in some layer",
                remedy="Prune before quantization, on a graph that cleanup has run on",
            )
        moments: dict[str, npt.NDArray[np.float32]] = {}
        scores = self._scores(model, found, groups, moments)
        gone = lowest_units(
            [scores[g.name] for g in groups], self.ratio, scope=self.scope, threshold=self.threshold
        )
        if not any(part.any() for part in gone):
            return changes
        before = _parameters(model)
        if self.method == "hessian":
            adapt_readers(found, groups, gone, moments)
        units = {
            unit
            for group, part in zip(groups, gone, strict=True)
            for unit, goes in zip(group.units, part, strict=True)
            if goes
        }
        remove_units(model, found.graph, units)
        changes.count = len(units)
        after = _parameters(model)
        changes.details = {
            "removed": len(units),
            "of": sum(group.count for group in groups),
            "parameters_before": before,
            "parameters_after": after,
            "parameters_left": after / before,
            "layers": {
                group.name: {"left": int((~part).sum()), "of": group.count}
                for group, part in zip(groups, gone, strict=True)
            },
        }
        sizes = {(g.count, g.count - int(part.sum())) for g, part in zip(groups, gone, strict=True)}
        if len(sizes) == 1 and self.kind != "channels":
            changes.details[CONFIG] = {self.kind: list(sizes.pop())}
        if self.method in _NEEDS_DATA:
            changes.details["calibration"] = dict(context_of(model).calibration)
        return changes

    def _scores(
        self,
        model: ir.Model,
        found: GraphUnits,
        groups: Sequence[WeightGroup],
        moments: dict[str, npt.NDArray[np.float32]],
    ) -> Mapping[str, Floats]:
        if self.method == "random":
            generator = np.random.default_rng(self.seed)
            return {group.name: generator.random(group.count) for group in groups}
        if self.method in ("l1", "l2"):
            power = 1 if self.method == "l1" else 2
            return {group.name: magnitudes(found, group, power=power) for group in groups}
        activations = activations_for(model, self.name, method=self.method)
        widths: dict[str, int] = {}
        for side in (side for group in groups for side in group.readers):
            given = side.node.inputs[0]
            if side.node.op_type == "Conv" or given is None:
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"method {self.method} for the Conv {side.node.name!r}",
                    expected="l1, l2 or random where convolutions read the units",
                )
            widths[given.name or ""] = len(side.ids)
        if self.method == "wanda":
            squares = _mean_squares(model, widths, activations)
            return {group.name: reader_scores(found, group, squares) for group in groups}
        moments.update(second_moments(model, widths, activations))
        return {group.name: hessian_scores(found, group, moments) for group in groups}


def _mean_squares(model: ir.Model, widths: Mapping[str, int], activations: Activations) -> dict[str, Floats]:
    seen = {name: Channels(width) for name, width in widths.items()}
    for batch in activations(model, list(widths)):
        for name, channels in seen.items():
            channels.update(batch[name])
    return {name: channels.mean_square for name, channels in seen.items()}


def _parameters(model: ir.Model) -> int:
    tensors = {id(v.const_value): v.const_value for v in model.graph.initializers.values()}
    return sum(t.size for t in tensors.values() if t is not None and t.dtype.is_floating_point())


class PruneHeads(_PruneUnits):
    """Removes heads of attention: with grouped queries, a key and value with all heads that share it.

    Projections, biases and the KV cache shrink, in fused attention and in attention that is written out.
    """

    name: ClassVar[str] = "prune_heads"
    summary: ClassVar[str] = "remove attention heads; projections and the KV cache shrink"

    @property
    def kind(self) -> UnitKind:
        """What goes."""
        return "heads"


class PruneNeurons(_PruneUnits):
    """Removes neurons of MLPs, with their gates and biases."""

    name: ClassVar[str] = "prune_neurons"
    summary: ClassVar[str] = "remove neurons of MLPs with their gates; the matrices shrink"

    @property
    def kind(self) -> UnitKind:
        """What goes."""
        return "neurons"


class PruneChannels(_PruneUnits):
    """Removes channels of convolutions, through norms, residual sums, concatenations and what reads them."""

    name: ClassVar[str] = "prune_channels"
    summary: ClassVar[str] = "remove channels of convolutions; kernels shrink through residuals and norms"

    @property
    def kind(self) -> UnitKind:
        """What goes."""
        return "channels"
