"""Weights become zero, where they matter least. Tensors keep their size: see what a report says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.graph_passes.block_operators import SharedWeight, find_weights
from onnxsmith.graph_passes.context import Activations, activations_for, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.gptq import second_moments
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.observers import Channels
from onnxsmith.graph_passes.pruning_choice import Scope
from onnxsmith.graph_passes.spilled_weights import spilled
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

__all__ = ["PruneWeights"]

Floats = npt.NDArray[np.float32]


class PruneWeights(GraphPass):
    """Sets weights of MatMul to zero, unstructured or N of M.

    Embeddings, and heads that share their weight with one, keep theirs.
    """

    name: ClassVar[str] = "prune_weights"
    summary: ClassVar[str] = "set weights to zero by magnitude, Wanda or SparseGPT, unstructured or N:M"

    def __init__(
        self,
        *,
        method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude",
        ratio: float = 0.5,
        pattern: str = "unstructured",
        scope: Scope = "layer",
        threshold: float | None = None,
        damping: float = 0.01,
        skip_nodes: tuple[str, ...] = ("lm_head*",),
    ) -> None:
        """Sets which weights go.

        Args:
            method: magnitude, wanda or sparsegpt; the last two look at activations and need calibration data.
            ratio: The share of each matrix that goes.
            pattern: unstructured, or N:M such as 2:4: N of each M weights in a row stay, whatever the ratio.
            scope: layer takes the ratio of each matrix; global ranks the weights of all matrices together
                (magnitude only).
            threshold: Take weights whose magnitude is below this, in place of a ratio (magnitude only).
            damping: What is added to the diagonal of x.T @ x, as a part of its mean (sparsegpt). With fewer
                than about ten rows of data for each column 0.1 is better.
            skip_nodes: Patterns of names of weights or nodes to leave alone.

        Raises:
            BadInputError: A ratio that is not from 0 to below 1, a pattern that is none, or a scope or
                threshold that does not go with the method.
        """
        self._group = check_sparsity(
            f"pass {self.name}", method=method, ratio=ratio, pattern=pattern, scope=scope,
            threshold=threshold, damping=damping,
        )  # fmt: skip
        self.method = method
        self.ratio = ratio
        self.pattern = pattern
        self.scope = scope
        self.threshold = threshold
        self.damping = damping
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Sets weights to zero; by magnitude when they are written, else now.

        Raises:
            PreconditionError: There is no weight to prune, or data is missing.
        """
        found, skipped = find_weights(model, embeddings=True, skip_nodes=self.skip_nodes)
        changes = Changes(skipped=skipped)
        for node in model.graph:
            if (node.domain, node.op_type) == ("com.microsoft", "Attention"):
                changes.skipped[label(node)] = "its projections are inside of it; prune before fuse_attention"
        weights: list[SharedWeight] = []
        for weight in found:
            reason = self._reason(weight)
            if reason:
                changes.skipped[weight.name] = reason
            else:
                weights.append(weight)
        if not weights:
            shown = "; ".join(f"{name}: {why}" for name, why in list(changes.skipped.items())[:3])
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul with a constant float matrix to prune" + (f" ({shown})" if shown else ""),
                expected="at least one",
                remedy="Prune before quantization",
            )
        layers: dict[str, dict[str, Any]] = {}
        if self.method == "magnitude":
            threshold = self.threshold
            if threshold is None and self.scope == "global":
                threshold = magnitude_threshold((weight.rows() for weight in weights), self.ratio)
            for weight in weights:
                made = prune_magnitude(weight.rows(), self.ratio, self._group, threshold=threshold)
                layers[weight.name] = {"zeros": float((made == 0).mean())}
                _put(weight, made)
        else:
            self._with_data(model, weights, layers)
            changes.details["calibration"] = dict(context_of(model).calibration)
        changes.count = len(weights)
        changes.details |= self._details(weights, layers)
        return changes

    def _reason(self, weight: SharedWeight) -> str:
        if weight.gathers:
            return "an embedding" + (", and the head that shares it" if len(weight.users) > 1 else "")
        if self._group is not None and weight.shape[1] % self._group[1]:
            return f"rows of {weight.shape[1]} are no multiple of {self._group[1]}"
        return ""

    def _with_data(
        self, model: ir.Model, weights: Sequence[SharedWeight], layers: dict[str, dict[str, Any]]
    ) -> None:
        activations = activations_for(model, self.name, method=self.method)
        readers: dict[str, list[SharedWeight]] = {}
        for weight in weights:
            # What a weight is used on twice is measured where it is used first.
            readers.setdefault(weight.activations[0].name or "", []).append(weight)
        widths = {name: found[0].shape[1] for name, found in readers.items()}
        # The model runs as it was, whatever was pruned already: what runs it clones it for each group.
        source = model.clone()

        if self.method == "wanda":
            for name, norms in _norms(source, widths, activations).items():
                for weight in readers[name]:
                    made = prune_wanda(weight.rows(), norms, self.ratio, self._group)
                    layers[weight.name] = {"zeros": float((made == 0).mean())}
                    _put(weight, made)
            return
        for name, moments in second_moments(source, widths, activations):
            for weight in readers[name]:
                matrix = weight.rows()
                made = prune_sparsegpt(matrix, moments, self.ratio, self._group, damping=self.damping)
                error = output_error(matrix, made, moments)
                layers[weight.name] = {"zeros": float((made == 0).mean()), "relative_error": error}
                _put(weight, made)

    def _details(
        self, weights: Sequence[SharedWeight], layers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        total = sum(weight.tensor.size for weight in weights)
        zeros = sum(layers[weight.name]["zeros"] * weight.tensor.size for weight in weights)
        stored = sum(int(weight.tensor.nbytes) for weight in weights)
        return {
            "matrices": len(weights),
            "zeros": zeros / total,
            **stored_mb(total, zeros / total, stored),
            "speed": NOT_FASTER,
            "layers": dict(layers),
        }


def _norms(model: ir.Model, widths: Mapping[str, int], activations: Activations) -> dict[str, Floats]:
    seen = {name: Channels(width) for name, width in widths.items()}
    for batch in activations(model, list(widths)):
        for name, channels in seen.items():
            channels.update(batch[name])
    return {name: np.sqrt(channels.mean_square).astype(np.float32) for name, channels in seen.items()}


def _put(weight: SharedWeight, matrix: Floats) -> None:
    """Gives a weight new numbers of the same shape; they wait on disk until they are written."""
    tensor, value = weight.tensor, weight.value
    array = matrix if weight.is_transposed else matrix.T
    value.const_value = spilled(array.astype(tensor.dtype.numpy()), tensor.dtype, value.name)
