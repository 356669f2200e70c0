"""Few bits where they cost least: what each weight loses is measured, then bits are given under a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.comparison import kl_divergence
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.block_operators import BlockFormat, BlockWriter, SharedWeight, find_weights
from onnxsmith.graph_passes.context import Probe, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.integer_operators import GraphWriter
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.rounding import Choice, Rounding, entry_of
from onnxsmith.graph_passes.weights import MatMulWeight

__all__ = ["QuantizeMixed"]

_FLAGS = "onnxsmith_low_bits"
_STEPS = 9
# Sets of weights that are measured after each weight was.
_TRIES = 8


class QuantizeMixed(GraphPass):
    """Gives each weight 4 or 8 bits, so that the model stays within a budget of divergence or of size.

    A trial graph computes every weight both ways and chooses by a flag, so all of it is one session: first
    each weight alone is switched to few bits, which says what that costs; then as many as the budget allows,
    the cheapest for what they save first. What is reported is measured with all of them switched together.
    """

    name: ClassVar[str] = "quantize_mixed"
    summary: ClassVar[str] = (
        "4 or 8 bits for each weight by its measured cost, under a budget of loss or size"
    )

    def __init__(
        self,
        *,
        max_divergence: float = 0.01,
        size_mb: float = 0.0,
        low_bits: Literal[2, 4] = 4,
        block_size: Literal[16, 32, 64, 128] = 32,
        samples: int = 2,
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets the budget.

        Args:
            max_divergence: Highest mean KL divergence of the output ``logits`` from the float model's, in
                nats: 0.01 is about 1 % of perplexity. Of another first output: its relative squared error.
            size_mb: Instead: most megabytes of the quantized weights; 0 is no such budget.
            low_bits: Bits of the weights that can bear it; the others get 8.
            block_size: Weights that share a scale.
            samples: Samples of the calibration data that every measurement runs on.
            accuracy_level: Of MatMulNBits.
            embeddings: Also quantize embeddings (Gather).
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: A budget below zero, or no samples.
        """
        for key, value in (("max_divergence", max_divergence), ("size_mb", size_mb)):
            if not value >= 0:
                raise BadInputError(f"pass {self.name}: {key}", got=str(value), expected="0 or more")
        if samples < 1:
            raise BadInputError(f"pass {self.name}: samples", got=str(samples), expected="at least 1")
        self.max_divergence = max_divergence
        self.size_mb = size_mb
        self.low_bits = low_bits
        self.block_size = block_size
        self.samples = samples
        self.accuracy_level = accuracy_level
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Measures, chooses, replaces.

        Raises:
            PreconditionError: There is nothing to quantize, no data, or no choice that keeps the budget.
        """
        kept = open_attention(model)
        weights, skipped = find_weights(model, embeddings=self.embeddings, skip_nodes=self.skip_nodes)
        skipped |= kept
        options: list[_Option] = []
        for weight in weights:
            forms = self._forms(weight)
            if forms is None:
                skipped[weight.name] = f"rows of {weight.shape[1]} are no multiple of 16"
            else:
                options.append(_Option(weight, *forms))
        if not options:
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix that fits",
                expected="at least one",
                remedy="The model may be quantized already; the model is unchanged",
            )
        probe = context_of(model).probe
        if probe is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="no calibration data",
                expected="data to measure the loss on",
                remedy="Give --calibration-data, or the key calibration of the recipe",
            )
        found = self._search(model, options, probe)
        writer = BlockWriter(model, accuracy_level=self.accuracy_level)
        layers: dict[str, dict[str, Any]] = {}
        for number, option in enumerate(options):
            form = option.low if found.low[number] else option.high
            entry = layers[option.weight.name] = entry_of(option.weight, form, "rtn")
            entry["divergence_of_low_bits"] = found.costs[number]
            choice = Choice(option.weight, form, "rtn", entry)
            writer.replace(option.weight, form, Rounding(choice, _STEPS))
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault("com.microsoft", 1)
        return Changes(
            len(options),
            {
                "low_bits": int(found.low.sum()),
                "weights": len(options),
                "divergence": found.divergence,
                "divergence_all_8_bits": found.best,
                "divergence_all_low_bits": found.worst,
                "megabytes": sum(
                    o.bytes(low=bool(low)) for o, low in zip(options, found.low, strict=True)
                ) / 1e6,
                "calibration": dict(context_of(model).calibration),
                "layers": layers,
            },
            skipped,
        )  # fmt: skip

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

    def _search(self, model: ir.Model, options: Sequence[_Option], probe: Probe) -> _Found:
        reference_model = model.clone()
        with probe(reference_model, self.samples) as run:
            expected = run({})
        trial = model.clone()
        _switchable(trial, self, len(options))
        with probe(trial, self.samples) as run:

            def measure(low: npt.NDArray[np.bool_]) -> float:
                return _divergence(run, low, expected, is_logits=trial.graph.outputs[0].name == "logits")

            none = np.zeros(len(options), np.bool_)
            best, worst = measure(none), measure(~none)
            costs = []
            for number in range(len(options)):
                flags = none.copy()
                flags[number] = True
                costs.append(max(measure(flags) - best, 0.0))
            saved = [option.bytes(low=False) - option.bytes(low=True) for option in options]
            # The cheapest for what it saves first.
            order = sorted(range(len(options)), key=lambda i: costs[i] / saved[i])

            def chosen(budget: float) -> npt.NDArray[np.bool_]:
                """As many as fit, if costs just add up."""
                flags, total = none.copy(), 0.0
                for number in order:
                    if total + costs[number] <= budget:
                        flags[number] = True
                        total += costs[number]
                return flags

            if self.size_mb:
                low = self._small_enough(options, order, saved)
                return _Found(low, costs, measure(low), best, worst)
            if worst <= self.max_divergence:
                return _Found(~none, costs, worst, best, worst)
            self._require_possible(best)
            # Costs do not just add up, so the budget that they are given is adjusted to what is measured.
            found, divergence = none, best
            keeps, breaks = 0.0, None
            budget = self.max_divergence - best
            for _ in range(_TRIES):
                low = chosen(budget)
                measured = measure(low)
                if measured <= self.max_divergence:
                    keeps = budget
                    if np.dot(low, saved) >= np.dot(found, saved):
                        found, divergence = low, measured
                else:
                    breaks = budget
                budget = 2 * keeps if breaks is None else (keeps + breaks) / 2
            return _Found(found, costs, divergence, best, worst)

    def _small_enough(
        self, options: Sequence[_Option], order: Sequence[int], saved: Sequence[int]
    ) -> npt.NDArray[np.bool_]:
        low = np.zeros(len(options), np.bool_)
        size = sum(option.bytes(low=False) for option in options)
        for number in order:
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

    def _require_possible(self, best: float) -> None:
        if best > self.max_divergence:
            raise PreconditionError(
                f"pass {self.name}",
                got=f"a divergence of {best:.3g} with 8 bits everywhere",
                expected=f"at most {self.max_divergence:g}",
                remedy="Raise max_divergence, or set accuracy_level=1, which does not round activations",
            )


@dataclasses.dataclass(frozen=True)
class _Option:
    weight: SharedWeight
    low: BlockFormat
    high: BlockFormat

    def bytes(self, *, low: bool) -> int:
        form = self.low if low else self.high
        rows, columns = self.weight.shape
        blocks = -(-columns // form.block_size)
        scales = (1 + form.minimums) * (2 if form.half_scales else 4)
        zeros = 0 if form.symmetric or form.minimums else form.bits / 8
        return int(rows * (columns * form.bits / 8 + blocks * (scales + zeros)))


@dataclasses.dataclass(frozen=True)
class _Found:
    """Which weights have few bits, what each alone costs, and the divergences."""

    low: npt.NDArray[np.bool_]
    costs: list[float]
    divergence: float
    best: float
    worst: float


def _switchable(trial: ir.Model, settings: QuantizeMixed, count: int) -> None:
    """Lets a flag for each weight choose between few and many bits."""
    writer = GraphWriter(trial)
    flags = ir.Value(name=_FLAGS, shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.BOOL))
    trial.graph.inputs.append(flags)
    # The same weights in the same order as in the model that this is a copy of.
    weights, _ = find_weights(trial, embeddings=settings.embeddings, skip_nodes=settings.skip_nodes)
    fitting = [(weight, forms) for weight in weights if (forms := settings._forms(weight)) is not None]
    doubles: list[SharedWeight] = []
    for number, (weight, _forms) in enumerate(fitting):
        users: list[MatMulWeight | ir.Node] = []
        for user in weight.users:
            node = user.node if isinstance(user, MatMulWeight) else user
            twin = ir.Node(
                node.domain,
                node.op_type,
                list(node.inputs),
                list(node.attributes.values()),
                name=writer.name(f"{node.name or node.outputs[0].name}_low"),
            )
            twin.outputs[0].name = writer.name(f"{node.outputs[0].name}_low")
            twin.outputs[0].type, twin.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            trial.graph.insert_before(node, twin)
            (flag,) = writer.add(
                node, "Gather", [flags, writer.constant(np.array(number), "number")], "flag",
                (ir.DataType.BOOL,),
            )  # fmt: skip
            output = node.outputs[0]
            (chosen,) = writer.add(
                node, "Where", [flag, twin.outputs[0], output], f"{output.name}_chosen", after=True
            )
            chosen.type, chosen.shape = output.type, output.shape
            where = chosen.producer()
            for reader, index in list(output.uses()):
                if reader is not where:
                    reader.replace_input_with(index, chosen)
            if output.is_graph_output():
                name = output.name
                trial.graph.outputs[:] = [chosen if o is output else o for o in trial.graph.outputs]
                output.name, chosen.name = writer.name(f"{name}_high"), name
            users.append(dataclasses.replace(user, node=twin) if isinstance(user, MatMulWeight) else twin)
        doubles.append(SharedWeight(weight.value, weight.is_transposed, users))
    blocks = BlockWriter(trial, accuracy_level=settings.accuracy_level)
    for (weight, (low, high)), double in zip(fitting, doubles, strict=True):
        for one, form in ((double, low), (weight, high)):
            entry = entry_of(one, form, "rtn")
            blocks.replace(one, form, Rounding(Choice(one, form, "rtn", entry), _STEPS))
    common.RemoveUnusedNodesPass()(trial)
    trial.opset_imports.setdefault("com.microsoft", 1)


def _divergence(
    run: Callable[[dict[str, Any]], list[npt.NDArray[Any]]],
    low: npt.NDArray[np.bool_],
    expected: Sequence[npt.NDArray[Any]],
    *,
    is_logits: bool,
) -> float:
    total = count = 0.0
    for got, want in zip(run({_FLAGS: low}), expected, strict=True):
        if not np.isfinite(got).all():
            return float("inf")
        if is_logits:
            # Some positions at a time: float64 copies of all of them may take gigabytes.
            ours, theirs = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
            for begin in range(0, len(ours), 32):
                part = slice(begin, begin + 32)
                total += float(kl_divergence(theirs[part].astype(float), ours[part].astype(float)).sum())
            count += len(ours)
        else:
            total += float(np.square(got.astype(float) - want).sum())
            count += float(np.square(want.astype(float)).sum())
    return total / count if count else 0.0
