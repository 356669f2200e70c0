"""8 bit weights and activations whose ranges were measured before: static quantization."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.awq import divide_activation
from onnxsmith.graph_passes.context import Activations, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.convolutions import (
    Convolution,
    find_convolutions,
    ranges_needed,
)
from onnxsmith.graph_passes.dynamic import quantize_embeddings, refuse_nothing, weight_error
from onnxsmith.graph_passes.integer_operators import (
    LinearNode,
    biases_to_products,
    find_linear_nodes,
    integer_weight,
)
from onnxsmith.graph_passes.matching import label
from onnxsmith.graph_passes.observers import Channels, Observer, Range
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.static_writer import ACTIVATION_TYPES, StaticWriter
from onnxsmith.onnx_file import drop_pages

__all__ = ["QuantizeStatic"]

Floats = npt.NDArray[np.float32]

_STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)
# What is left of the error has to be less than the first for each 5 % of a product's time that scaling costs;
# the second is worth any time. On 8 bit integers and AVX-512 VNNI, a Mul takes as long as 50 columns.
_WORTH = 0.4
_WORTH_ANY = 0.05
_COLUMNS_OF_A_MUL = 50


class QuantizeStatic(GraphPass):
    """Computes MatMul and Gemm on integers, with ranges of activations from calibration data.

    Only what is multiplied with a weight is rounded: the scores of attention, with their mask of -3.4e38,
    stay in float, and a mask that reaches an activation is left out of its range.
    """

    name: ClassVar[str] = "quantize_static"
    summary: ClassVar[str] = "MatMul and Gemm on 8 bit integers; ranges of activations from calibration data"

    def __init__(
        self,
        *,
        form: Literal["qdq", "qoperator", "integer"] = "integer",
        activations: Literal["uint8", "int8", "uint16", "int16"] = "uint8",
        calibration: Literal["minmax", "moving_average", "percentile", "entropy", "mse"] = "mse",
        percentile: float = 99.99,
        smoothing: Literal["auto", "none"] = "auto",
        strengths: dict[str, float] | None = None,
        bias_correction: bool = True,
        per_channel: bool = True,
        symmetric: bool = True,
        reduce_range: bool = False,
        embeddings: bool = True,
        ranges: dict[str, tuple[float, float]] | None = None,
        table: str = "",
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets formats and methods.

        Args:
            form: integer writes what ONNX Runtime's CPU is fastest with, MatMulIntegerToFloat with the bias
                inside; qdq writes QuantizeLinear and DequantizeLinear around float operators, which every
                provider knows; qoperator writes QLinearMatMul, which rounds results too.
            activations: Type of the activations. With 16 bits ONNX Runtime's CPU computes in float.
            calibration: How a range follows from what was seen.
            percentile: Of the values that are inside, for that method.
            smoothing: auto moves range from activations to weights (SmoothQuant), as strongly as is best for
                each activation; none leaves them.
            strengths: Pattern of names of nodes or activations to the strength of smoothing, 0 to 1, in place
                of the one that would be found.
            bias_correction: Add what rounding a weight shifts the mean of its output by.
            per_channel: A scale for each output channel; else one for the weight.
            symmetric: int8 weights around zero; else uint8 with a zero point.
            reduce_range: 7 bits for weights, for x86 processors without VNNI.
            embeddings: Also store embeddings (Gather) in 8 bits.
            ranges: Pattern of tensor names to (low, high), in place of what was seen.
            table: A calibration table, or the manifest of an artifact that this pass made: its ranges and
                smoothing are used, and no data is needed. Means are not kept, so bias is not corrected.
            skip_nodes: Patterns of node or weight names that keep their precision.

        Raises:
            BadInputError: A percentile not between 50 and 100, a range without zero inside, or integer
                operators with 16 bits.
        """
        if not 50 < percentile <= 100:
            raise BadInputError(
                "pass quantize_static: percentile", got=str(percentile), expected="above 50, up to 100"
            )
        for pattern, (low, high) in (ranges or {}).items():
            if not low <= 0 <= high or low == high:
                raise BadInputError(
                    f"pass quantize_static: ranges of {pattern!r}", got=f"{low} to {high}",
                    expected="a range with 0 inside, because 0 has to be exact",
                )  # fmt: skip
        if form != "qdq" and activations not in ("uint8", "int8"):
            raise BadInputError(
                "pass quantize_static", got=f"{form} with {activations}", expected="uint8 or int8, or qdq"
            )
        self.form = form
        self.activations = activations
        self.calibration = calibration
        self.percentile = percentile
        for pattern, strength in (strengths or {}).items():
            if not 0 <= strength <= 1:
                raise BadInputError(
                    f"pass quantize_static: strengths of {pattern!r}", got=str(strength), expected="0 to 1"
                )
        self.smoothing = smoothing
        self.strengths = dict(strengths or {})
        self.bias_correction = bias_correction
        self.per_channel = per_channel
        self.symmetric = symmetric
        self.reduce_range = reduce_range
        self.embeddings = embeddings
        self.ranges = {pattern: (float(low), float(high)) for pattern, (low, high) in (ranges or {}).items()}
        self.table = table
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Measures, then replaces.

        Raises:
            PreconditionError: There is nothing to quantize, or neither data nor a table.
            BadInputError: The table cannot be read, or has no range for an activation.
        """
        kept = open_attention(model, apart=True)
        linear, skipped = find_linear_nodes(model, self.skip_nodes)
        biases_to_products(model, linear)
        convolutions = self._convolutions(model, skipped)
        skipped |= kept
        if not any(one.is_conv for one in convolutions):
            refuse_nothing(self.name, linear, skipped)
        layers: dict[str, dict[str, Any]] = {
            one.label: {"shape": list(one.shape), "method": "static"} for one in linear
        }
        details: dict[str, Any] = {
            "integer": len(linear),
            "convolutions": sum(one.is_conv for one in convolutions),
        }
        means: dict[str, npt.NDArray[np.float64]] = {}
        groups: dict[ir.Value, list[LinearNode]] = {}
        for one in linear:
            groups.setdefault(one.activation, []).append(one)
        if self.table:
            found, factors = _read_table(self.table)
            for value, users in groups.items():
                if value.name in factors:
                    self._scale(model, value, users, factors[value.name])
        else:
            activations = context_of(model).activations
            if activations is None:
                raise PreconditionError(
                    f"pass {self.name}",
                    got="no calibration data and no table",
                    expected="data to run the model on",
                    remedy="Give --calibration-data, or the key calibration of the recipe, or table=FILE",
                )
            factors, means = self._smooth(model, groups, activations, layers)
            found = self._measure(model, linear, convolutions, activations)
            details["calibration"] = dict(context_of(model).calibration)
        writer = StaticWriter(model, self)
        layers |= writer.convolutions(convolutions, lambda value: self._range(value.name or "", found))
        for one in linear:
            x = one.activation
            known = writer.known(x)
            wide = known or self._range(x.name or "", found)
            weight = integer_weight(
                one.columns(), per_channel=self.per_channel, symmetric=self.symmetric,
                reduce_range=self.reduce_range,
            )  # fmt: skip
            layers[one.label] |= {
                "bits": 7 if self.reduce_range else 8,
                "weight_error": weight_error(one, weight),
                "range": [wide.low, wide.high],
            }
            if wide.masked:
                layers[one.label]["masked_values_left_out"] = wide.masked
            shift = None
            if x.name in means and self.bias_correction:
                shift = means[x.name] @ (one.columns() - weight.dequantized())
            out = None
            if self.form == "qoperator":
                out = self._range(one.node.outputs[0].name or "", found)
            writer.write(one, weight, wide, out, shift)
            drop_pages(one.source.const_value)
        details |= {"layers": layers, "ranges": {name: r.to_json() for name, r in found.items()}}
        details["factors"] = {name: [float(f"{x:.7g}") for x in value] for name, value in factors.items()}
        layers |= quantize_embeddings(model, self.skip_nodes, skipped) if self.embeddings else {}
        common.RemoveUnusedNodesPass()(model)
        return Changes(len(layers), details, skipped)

    def _smooth(
        self,
        model: ir.Model,
        groups: Mapping[ir.Value, list[LinearNode]],
        activations: Activations,
        layers: dict[str, dict[str, Any]],
    ) -> tuple[dict[str, Floats], dict[str, npt.NDArray[np.float64]]]:
        """Scales activations where that helps.

        Returns:
            Factors by the name of the activation that was scaled, and the means of the channels by the name
            of what is then multiplied.
        """
        if not groups or (self.smoothing == "none" and not self.strengths and not self.bias_correction):
            return {}, {}
        channels = {value.name or "": Channels(users[0].shape[1]) for value, users in groups.items()}
        for batch in activations(model, list(channels)):
            for name, watcher in channels.items():
                watcher.update(batch[name])
        factors, means = {}, {}
        for value, users in groups.items():
            seen, name = channels[value.name or ""], value.name or ""
            sources = {one.source for one in users}
            alone = all(len(source.uses()) == sum(o.source is source for o in users) for source in sources)
            strength, scale, how = 0.0, np.ones(len(seen.largest), np.float32), "none needed"
            wanted = self._wanted(name, users)
            if alone and (wanted is not None or self.smoothing == "auto"):
                strength, scale = self._strength(seen, [one.columns() for one in users], wanted)
            if strength:
                factors[name] = scale
                how = self._scale(model, value, users, scale)
            for one in users:
                layers[one.label] |= {"smoothing": strength, "scaling": how}
            means[users[0].activation.name or ""] = seen.mean / scale
            for source in sources:
                drop_pages(source.const_value)
        return factors, means

    @staticmethod
    def _scale(model: ir.Model, value: ir.Value, users: Sequence[LinearNode], factors: Floats) -> str:
        how = divide_activation(model, value, [one.node for one in users], factors)
        for source in {one.source for one in users}:
            _scale_rows(source, factors, next(o for o in users if o.source is source).is_transposed)
        return how

    def _wanted(self, activation: str, users: Sequence[LinearNode]) -> float | None:
        names = (activation, *(one.node.name or "" for one in users))
        for pattern, strength in self.strengths.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return strength
        return None

    def _strength(
        self, seen: Channels, weights: Sequence[Floats], wanted: float | None
    ) -> tuple[float, Floats]:
        """The exponent of SmoothQuant with the least expected error of the outputs.

        Rounding an activation with step d adds an error of d * d / 12 to each channel, and rounding a weight
        adds its own, weighted by the channel's mean square.
        """
        levels = ACTIVATION_TYPES[self.activations][2] - ACTIVATION_TYPES[self.activations][1]
        largest = np.maximum(seen.largest, np.float32(1e-6))
        ceiling = np.maximum(np.max([np.abs(w).max(1) for w in weights], axis=0), np.float32(1e-6))
        columns = sum(weight.shape[1] for weight in weights)
        worth = max(_WORTH ** (_COLUMNS_OF_A_MUL / (0.05 * columns)), _WORTH_ANY)
        best = (0.0, np.ones_like(largest))
        smallest = np.inf
        for strength in _STRENGTHS if wanted is None else (wanted,):
            scale = np.power(largest, np.float32(strength)) / np.power(ceiling, np.float32(1 - strength))
            scale = np.clip(scale / np.exp(np.log(scale).mean()), 1e-2, 1e2).astype(np.float32)
            if not strength:
                scale = np.ones_like(largest)
            step = 2 * float((largest / scale).max()) / levels
            error = 0.0
            for weight in weights:
                scaled = weight * scale[:, None]
                made = integer_weight(
                    scaled, per_channel=self.per_channel, symmetric=self.symmetric,
                    reduce_range=self.reduce_range, search_steps=0,
                )  # fmt: skip
                lost = np.square(made.dequantized() - scaled).sum(1) / np.square(scale)
                error += step * step / 12 * float(np.square(scaled).sum())
                error += float((lost * seen.mean_square).sum())
            # A Mul costs time, so it has to be worth it.
            if error < smallest * (1.0 if best[0] else worth):
                smallest, best = error, (strength, scale)
        return best

    def _measure(
        self,
        model: ir.Model,
        linear: Sequence[LinearNode],
        convolutions: Sequence[Convolution],
        activations: Activations,
    ) -> dict[str, Range]:
        observers = {one.activation.name or "": Observer() for one in linear}
        observers |= {name: Observer() for name in ranges_needed(convolutions)}
        if self.form == "qoperator":
            observers |= {one.node.outputs[0].name or "": Observer() for one in linear}
        for batch in activations(model, list(observers)):
            for name, observer in observers.items():
                observer.update(batch[name])
        levels = ACTIVATION_TYPES[self.activations][2] - ACTIVATION_TYPES[self.activations][1] + 1
        return {
            name: observer.range(self.calibration, percentile=self.percentile, levels=levels)
            for name, observer in observers.items()
        }

    def _convolutions(self, model: ir.Model, skipped: dict[str, str]) -> list[Convolution]:
        if self.activations.endswith("16"):
            # ONNX Runtime has no integer convolution for 16 bits; the reason why they stay is there already.
            return []
        found, reasons = find_convolutions(model, self.skip_nodes)
        for one in found:
            skipped.pop(label(one.node), None)
        skipped |= reasons
        return found if any(one.is_conv for one in found) else []

    def _range(self, name: str, found: Mapping[str, Range]) -> Range:
        for pattern, (low, high) in self.ranges.items():
            if fnmatch.fnmatchcase(name, pattern):
                return Range(low, high)
        if name not in found:
            raise BadInputError(
                f"pass {self.name}: table {self.table}",
                got=f"no range for {name!r}",
                expected="a table of this model, made with the same passes before",
            )
        return found[name]


def _scale_rows(source: ir.Value, factors: Floats, is_transposed: bool) -> None:
    """Multiplies what each channel is multiplied with; read when it is needed."""
    tensor = source.const_value
    assert tensor is not None
    shape = (1, -1) if is_transposed else (-1, 1)

    def compute() -> ir.TensorProtocol:
        scaled = tensor.numpy() * factors.reshape(shape)
        drop_pages(tensor)
        return ir.Tensor(scaled, dtype=tensor.dtype, name=source.name)

    source.const_value = ir.LazyTensor(
        compute, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=source.name
    )


def _read_table(path: str) -> tuple[dict[str, Range], dict[str, Floats]]:
    """Ranges and factors: ``{"ranges": {name: {"low": ..., "high": ...}}}``, or of a manifest's step."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if "ranges" not in content:
            steps = [s for s in content["steps"] if s["name"] == QuantizeStatic.name]
            content = steps[-1]["details"]
        ranges = {
            name: Range(float(entry["low"]), float(entry["high"]), int(entry.get("masked", 0)))
            for name, entry in content["ranges"].items()
        }
        factors = {n: np.array(v, np.float32) for n, v in content.get("factors", {}).items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"pass quantize_static: table {path}",
            got=f"cannot be read: {type(error).__name__}: {error}",
            expected="a calibration table, or the manifest.json of a model that this pass made",
        ) from error
    return ranges, factors
