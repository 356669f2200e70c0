"""Weights become zero, where they matter least. Tensors keep their size: see what a report says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_operators import SharedWeight, find_weights
from onnxsmith.graph_passes.context import Activations, activations_for, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.gptq import output_error, second_moments
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.observers import Channels
from onnxsmith.graph_passes.pruning_choice import Scope
from onnxsmith.graph_passes.sparse_rounding import prune_magnitude, prune_sparsegpt, prune_wanda
from onnxsmith.graph_passes.spilled_weights import spilled

__all__ = ["NOT_FASTER", "PruneWeights"]

Floats = npt.NDArray[np.float32]
_PATTERN = re.compile(r"(\d+):(\d+)")
NOT_FASTER = (
    "not smaller and not faster: ONNX Runtime stores zeros and multiplies with them like with other numbers, "
    "on the CPU and on all other providers but TensorRT with 2:4 and trt_sparsity_enable. Remove heads, "
    "neurons or layers to save time."
)
# Of each layer's weights, to find a threshold for all layers.
_SAMPLE = 1 << 16


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
            skip_nodes: Patterns of names of weights or nodes to leave alone.

        Raises:
            BadInputError: A ratio that is not from 0 to below 1, a pattern that is none, or a scope or
                threshold that does not go with the method.
        """
        if not 0 <= ratio < 1:
            raise BadInputError(f"pass {self.name}: ratio", got=f"{ratio:g}", expected="0 to below 1")
        match = _PATTERN.fullmatch(pattern)
        known = match is not None and 0 < int(match[1]) < int(match[2]) and 128 % int(match[2]) == 0
        if pattern != "unstructured" and not known:
            raise BadInputError(
                f"pass {self.name}: pattern",
                got=pattern,
                expected="unstructured, or N:M such as 2:4, with N below M and M a power of two up to 128",
            )
        if (scope == "global" or threshold is not None) and (method != "magnitude" or match is not None):
            raise BadInputError(
                f"pass {self.name}",
                got=f"scope global or a threshold with method {method} and pattern {pattern}",
                expected="method magnitude, unstructured",
            )
        if threshold is not None and not threshold >= 0:
            raise BadInputError(f"pass {self.name}: threshold", got=f"{threshold:g}", expected="0 or more")
        self.method = method
        self.ratio = ratio
        self.pattern = pattern
        self.scope = scope
        self.threshold = threshold
        self.skip_nodes = tuple(skip_nodes)
        self._group = (int(match[1]), int(match[2])) if match is not None else None

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
            threshold = self.threshold if self.threshold is not None else self._global_threshold(weights)
            for weight in weights:
                made = self._by_magnitude(weight.rows(), threshold)
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

    def _global_threshold(self, weights: Sequence[SharedWeight]) -> float | None:
        """The magnitude below which the ratio of all weights lies, from samples of large matrices."""
        if self.scope == "layer":
            return None
        sizes = np.array([weight.tensor.size for weight in weights], np.float64)
        parts = []
        for weight in weights:
            flat = np.abs(weight.rows().reshape(-1))
            parts.append(flat[:: max(1, len(flat) // _SAMPLE)])
        values = np.concatenate(parts)
        shares = np.concatenate([np.full(len(p), s / len(p)) for p, s in zip(parts, sizes, strict=True)])
        order = np.argsort(values)
        reached = np.cumsum(shares[order])
        index = min(int(np.searchsorted(reached, self.ratio * sizes.sum())), len(values) - 1)
        return float(values[order][index])

    def _by_magnitude(self, matrix: Floats, threshold: float | None) -> Floats:
        if threshold is not None:
            return np.where(np.abs(matrix) < threshold, np.float32(0), matrix)
        return prune_magnitude(matrix, self.ratio, self._group)

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
                made = prune_sparsegpt(matrix, moments, self.ratio, self._group)
                error = output_error(matrix, made, moments)
                layers[weight.name] = {"zeros": float((made == 0).mean()), "relative_error": error}
                _put(weight, made)

    def _details(
        self, weights: Sequence[SharedWeight], layers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        total = sum(weight.tensor.size for weight in weights)
        zeros = sum(layers[weight.name]["zeros"] * weight.tensor.size for weight in weights)
        stored = sum(weight.tensor.nbytes for weight in weights)
        return {
            "matrices": len(weights),
            "zeros": zeros / total,
            # A bit for each weight, and the weights that stay.
            "mb": stored / 1e6,
            "mb_if_packed": (stored * (1 - zeros / total) + total / 8) / 1e6,
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
