"""Few bits where they cost least: what each weight loses is measured, then bits are given under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.bit_search import (
    Flags,
    Sensitivity,
    cheapest_within,
    measured_sensitivity,
    product_times,
)
from onnxsmith.graph_passes.block_operators import BlockFormat, BlockWriter, SharedWeight, find_weights
from onnxsmith.graph_passes.block_search import SEARCH_STEPS
from onnxsmith.graph_passes.context import context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.other_weights import open_gemm, other_weights
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.rounding import Choice, Rounding, entry_of
from onnxsmith.graph_passes.trial_bits import Option

__all__ = ["QuantizeMixed"]


class QuantizeMixed(GraphPass):
    """Gives each weight few or 8 bits, so that the model stays within a budget of loss, size or time.

    How much few bits cost is measured, see ``bit_search``; then as many weights get them as the budget
    allows, the cheapest for what they save first. What is reported is measured with all of them together.
    """

    name: ClassVar[str] = "quantize_mixed"
    summary: ClassVar[str] = (
        "4 or 8 bits for each weight by its measured cost, within a loss, a size or a time"
    )

    def __init__(
        self,
        *,
        max_loss_pct: float = 1.0,
        max_divergence: float = 0.0,
        size_mb: float = 0.0,
        latency_ms: float = 0.0,
        low_bits: Literal[2, 4] = 4,
        block_size: Literal[16, 32, 64, 128] = 32,
        samples: int = 2,
        sensitivity: Literal["attribution", "each"] = "attribution",
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the budget: the first of ``latency_ms``, ``size_mb``, ``max_divergence`` that is not 0.

        Args:
            max_loss_pct: How much worse the model may become, in percent of perplexity: what the float model
                expects to lose on the calibration text. It is a divergence of log(1 + percent / 100). Of
                another first output than ``logits``: its squared error, in percent of its square.
            max_divergence: Instead: highest mean KL divergence of the output ``logits`` from the float
                model's, in nats; of another first output its relative squared error. 0 is no such budget.
            size_mb: Instead: most megabytes of the quantized weights; 0 is no such budget.
            latency_ms: Instead: most milliseconds that the products with quantized weights take in one step
                (a decoder's single token), measured on this machine; 0 is no such budget.
            low_bits: Bits of the weights that can bear it; the others get 8.
            block_size: Weights that share a scale.
            samples: Samples of the calibration data that every measurement runs on.
            sensitivity: attribution runs the model once for all weights, and once for each of some two dozen
                groups of them; each runs it for every weight.
            accuracy_level: Of MatMulNBits.
            embeddings: Also quantize embeddings (Gather).
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: A budget below zero, no budget at all, or no samples.
        """
        budgets = {
            "max_loss_pct": max_loss_pct,
            "max_divergence": max_divergence,
            "size_mb": size_mb,
            "latency_ms": latency_ms,
        }
        for key, value in budgets.items():
            if not value >= 0:
                raise BadInputError(f"pass {self.name}: {key}", got=str(value), expected="0 or more")
        if not any(budgets.values()):
            raise BadInputError(f"pass {self.name}", got="no budget", expected=f"one of {', '.join(budgets)}")
        if samples < 1:
            raise BadInputError(f"pass {self.name}: samples", got=str(samples), expected="at least 1")
        self.max_loss_pct = max_loss_pct
        self.max_divergence = max_divergence
        self.size_mb = size_mb
        self.latency_ms = latency_ms
        self.low_bits = low_bits
        self.block_size = block_size
        self.samples = samples
        self.sensitivity = sensitivity
        self.accuracy_level = accuracy_level
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Measures, chooses, replaces.

        Raises:
            PreconditionError: There is nothing to quantize, no data, or no choice that keeps the budget.
        """
        kept = open_attention(model)
        open_gemm(model)
        weights, skipped = find_weights(model, embeddings=self.embeddings, skip_nodes=self.skip_nodes)
        skipped |= kept | other_weights(model)
        options: list[Option] = []
        for weight in weights:
            forms = self._forms(weight)
            if forms is None:
                skipped[weight.name] = f"rows of {weight.shape[1]} are no multiple of 16"
            else:
                options.append(Option(weight, *forms, accuracy_level=self.accuracy_level))
        if not options:
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix that fits",
                expected="at least one",
                remedy="The model may be quantized already; the model is unchanged",
            )
        context = context_of(model)
        if context.probe is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="no calibration data",
                expected="data to measure the loss on",
                remedy="Give --calibration-data, or the key calibration of the recipe",
            )
        details: dict[str, Any] = {}
        chosen: list[Flags] = []
        entries: list[dict[str, Any]] = []

        def choose(found: Sensitivity) -> None:
            low, divergence = self._within_budget(model, options, found, details)
            chosen.append(low)
            details.update(
                low_bits=int(low.sum()),
                weights=len(options),
                divergence=divergence,
                loss_pct=100 * math.expm1(min(divergence, 50.0)),
                divergence_all_8_bits=found.best,
                divergence_all_low_bits=found.worst,
                groups={
                    name: {"weights": len(members), "divergence": found.group_costs[name]}
                    for name, members in found.groups.items()
                },
            )
            for number in range(len(options)):
                entries.append(
                    {
                        "divergence_of_low_bits": found.costs[number],
                        "low_bits_output_error": found.attribution[number],
                    }
                )

        measured_sensitivity(
            model, options, probe=context.probe, activations=context.activations, samples=self.samples,
            each=self.sensitivity == "each", use=choose,
        )  # fmt: skip
        writer = BlockWriter(model, accuracy_level=self.accuracy_level)
        layers: dict[str, dict[str, Any]] = {}
        for option, low, entry in zip(options, chosen[0], entries, strict=True):
            form = option.low if low else option.high
            layers[option.weight.name] = entry_of(option.weight, form, "rtn") | entry
            choice = Choice(option.weight, form, "rtn", layers[option.weight.name])
            writer.replace(option.weight, form, Rounding(choice, SEARCH_STEPS))
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault("com.microsoft", 1)
        details["megabytes"] = _bytes(options, chosen[0]) / 1e6
        details |= {"calibration": dict(context.calibration), "layers": layers}
        return Changes(len(options), details, skipped)

    def _forms(self, weight: SharedWeight) -> tuple[BlockFormat, BlockFormat] | None:
        columns, size = weight.shape[1], int(self.block_size)
        while columns % size and size > 16:
            size //= 2
        if columns % size:
            return None
        wide = weight.tensor.dtype == ir.DataType.FLOAT
        bits = 4 if weight.gathers else self.low_bits
        low = BlockFormat(bits, size, minimums=wide, half_scales=wide)
        return low, BlockFormat(8, size, symmetric=True, half_scales=wide)

    def _within_budget(
        self, model: ir.Model, options: Sequence[Option], found: Sensitivity, details: dict[str, Any]
    ) -> tuple[Flags, float]:
        """The weights that get few bits, and the divergence of the model with them."""
        saved = [float(option.bytes(low=False) - option.bytes(low=True)) for option in options]
        if self.latency_ms:
            low = self._fast_enough(model, options, found, details)
        elif self.size_mb:
            low = self._small_enough(options, found, saved)
        else:
            budget = self.max_divergence or math.log1p(self.max_loss_pct / 100)
            if found.best > budget:
                raise PreconditionError(
                    f"pass {self.name}",
                    got=f"a divergence of {found.best:.3g} with 8 bits everywhere",
                    expected=f"at most {budget:.4g}",
                    remedy="Allow more loss, or set accuracy_level=1, which does not round activations",
                )
            return cheapest_within(found, saved, budget)
        return low, found.measure(low)

    def _small_enough(self, options: Sequence[Option], found: Sensitivity, saved: Sequence[float]) -> Flags:
        low = np.zeros(len(options), np.bool_)
        size = float(_bytes(options, low))
        for number in found.order(saved):
            if size <= self.size_mb * 1e6:
                return low
            low[number] = True
            size -= saved[number]
        if size > self.size_mb * 1e6:
            raise PreconditionError(
                f"pass {self.name}",
                got=f"{size / 1e6:.4g} MB with {self.low_bits} bits everywhere",
                expected=f"at most {self.size_mb:g} MB",
                remedy="Raise size_mb, or take larger blocks",
            )
        return low

    def _fast_enough(
        self, model: ir.Model, options: Sequence[Option], found: Sensitivity, details: dict[str, Any]
    ) -> Flags:
        timings = context_of(model).timings
        if timings is None:
            raise PreconditionError(
                f"pass {self.name}", got="latency_ms, and nobody to measure it", expected="calibration data"
            )
        times = product_times(model, options, timings)
        low = np.zeros(len(options), np.bool_)
        total = sum(high for _, high in times)
        details["latency_all_8_bits_ms"] = total
        for number in found.order([high - few for few, high in times]):
            if total <= self.latency_ms:
                break
            low[number] = True
            total -= times[number][1] - times[number][0]
        if total > self.latency_ms:
            raise PreconditionError(
                f"pass {self.name}",
                got=f"{total:.3g} ms at best, with few bits wherever they are faster",
                expected=f"at most {self.latency_ms:g} ms for the products with these weights",
                remedy="Allow more time, or give the runtime more threads",
            )
        details["latency_ms"] = total
        return low


def _bytes(options: Sequence[Option], low: Flags) -> int:
    return sum(option.bytes(low=bool(few)) for option, few in zip(options, low, strict=True))
