"""Weight-only quantization to blocks of few bits, for ONNX Runtime's MatMulNBits and GatherBlockQuantized.

The formats are those of the operators' definitions
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NoReturn, get_args

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.graph_passes.balance import balance_columns
from onnxsmith.graph_passes.block_operators import (
    ARITHMETIC,
    BlockFormat,
    BlockWriter,
    SharedWeight,
    find_weights,
    node_label,
)
from onnxsmith.graph_passes.block_search import SEARCH_STEPS
from onnxsmith.graph_passes.blocks import QuantizedBlocks, dequantize_blocks, quantize_blocks
from onnxsmith.graph_passes.context import activations_for, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.other_weights import open_gemm, other_weights
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.rounding import (
    NEEDS_DATA,
    Choice,
    Rounding,
    calibrated,
    entry_of,
    method_for,
)
from onnxsmith.graph_passes.weights import MatMulWeight

__all__ = ["QuantizeWeights", "QuantizedBlocks", "dequantize_blocks", "quantize_blocks"]

_DOMAIN = "com.microsoft"
# What may differ from weight to weight.
_SETTINGS = ("method", "bits", "block_size", "symmetric", "minimums", "half_scales")


class QuantizeWeights(GraphPass):
    """Replaces MatMul and Gather on constant weights by MatMulNBits and GatherBlockQuantized.

    A weight that is tied, such as an embedding that is also the output head, is quantized once and stored
    once. Weights are quantized when they are written, one at a time.
    """

    name: ClassVar[str] = "quantize_weights"
    summary: ClassVar[str] = "round weights to blocks of 2, 4 or 8 bits (MatMulNBits, GatherBlockQuantized)"

    def __init__(
        self,
        *,
        method: Literal["rtn", "hqq", "gptq", "awq"] = "rtn",
        bits: Literal[2, 4, 8] = 4,
        block_size: Literal[16, 32, 64, 128, 256] = 32,
        symmetric: bool = False,
        minimums: bool = False,
        half_scales: bool = False,
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        search_steps: int = SEARCH_STEPS,
        embeddings: bool = True,
        embedding_block_size: Literal[0, 16, 32, 64, 128, 256] = 0,
        balance: bool = False,
        skip_nodes: tuple[str, ...] = (),
        overrides: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Sets the format.

        Args:
            method: rtn rounds to nearest, on the best of several grids; hqq makes the error sparse; gptq and
                awq look at activations, and need calibration data.
            bits: Bits of a weight.
            block_size: Weights that share a scale; half as many, and so on, where rows do not divide by it.
            symmetric: Without zero points.
            minimums: A float minimum to each block in place of an integer zero point: more exact, and as
                fast (a second, small product adds it). See docs/quantization.md.
            half_scales: Store scales and minimums in float16; they are cast where the model is loaded.
            accuracy_level: What MatMulNBits may compute in: 0 the input's type, 4 int8 (much faster on a
                CPU; activations are rounded to 8 bits in blocks).
            search_steps: Grids tried for each block; 0 is plain round to nearest.
            embeddings: Also quantize embeddings (Gather).
            embedding_block_size: Of embeddings, and of output heads that are the same weight; 0 is that of
                the others. An error there is an error of the logits at once.
            balance: Bring columns of weights and of the activations that normalisations give them to the same
                spread first; needs calibration data. For 8 bits, where rounding activations costs more than
                rounding weights. See ``balance_columns``.
            skip_nodes: Patterns of node or weight names that keep their precision.
            overrides: Pattern of node or weight names to what is different for them: any of method, bits,
                block_size, symmetric, minimums and half_scales. The first pattern that fits counts.

        Raises:
            BadInputError: A value that is not among those listed, ``search_steps`` below 0 or above 100, or
                both ``symmetric`` and ``minimums``.
        """
        if not 0 <= search_steps <= 100:
            raise BadInputError(
                "pass quantize_weights: search_steps", got=str(search_steps), expected="0 to 100"
            )
        self.method = method
        self.bits = bits
        self.block_size = block_size
        self.symmetric = symmetric
        self.minimums = minimums
        self.half_scales = half_scales
        self.accuracy_level = accuracy_level
        self.search_steps = search_steps
        self.embeddings = embeddings
        self.embedding_block_size = embedding_block_size
        self.balance = balance
        self.skip_nodes = tuple(skip_nodes)
        self.overrides = dict(overrides or {})
        self._check(
            {name: getattr(self, name) for name in (*_SETTINGS, "accuracy_level", "embedding_block_size")}, ""
        )
        for pattern, changes in self.overrides.items():
            for key in changes:
                if key not in _SETTINGS:
                    raise UnknownNameError(
                        f"pass {self.name}: overrides of {pattern!r}", name=key, known=_SETTINGS, kind="key"
                    )
            self._check(self._settings() | changes, f"overrides of {pattern!r}: ")

    def _check(self, given: Mapping[str, Any], where: str) -> None:
        known = self.parameters()
        for name, value in given.items():
            kind = known[name].annotation
            choices = get_args(kind) if kind is not bool else (False, True)
            if not any(value is c if isinstance(value, bool) else value == c for c in choices):
                raise BadInputError(
                    f"pass {self.name}: {where}{name}",
                    got=repr(value),
                    expected=f"one of {', '.join(map(str, choices))}",
                )
        if given["symmetric"] and given["minimums"]:
            raise BadInputError(
                f"pass {self.name}{': ' + where.rstrip(': ') if where else ''}",
                got="symmetric and minimums",
                expected="one of them, or neither",
            )

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def apply(self, model: ir.Model) -> Changes:
        """Replaces what can be replaced; the weights themselves are rounded when they are written.

        Raises:
            PreconditionError: There is nothing to quantize, or everything was skipped.
        """
        kept = open_attention(model)
        open_gemm(model)
        weights, skipped = find_weights(model, embeddings=self.embeddings, skip_nodes=self.skip_nodes)
        changes = Changes(skipped=kept | skipped | other_weights(model))
        choices: list[Choice] = []
        for weight in weights:
            settings = self._settings_of(weight)
            form = self._format(weight, settings)
            if isinstance(form, BlockFormat):
                method, why = method_for(weight, settings["method"])
                entry = entry_of(weight, form, method) | ({"why": why} if why else {})
                choices.append(Choice(weight, form, method, entry))
                continue
            for user in weight.users:
                node = user.node if isinstance(user, MatMulWeight) else user
                changes.skipped[node_label(node)] = form
        if not choices:
            self._refuse(changes.skipped)
        if self.balance:
            activations = activations_for(model, self.name, method="balance")
            found = [choice.weight for choice in choices]
            scaled = balance_columns(model, found, activations, block_size=self.block_size)
            for choice in choices:
                # The exponent of the factors; 0 is none.
                choice.entry["balanced"] = scaled.get(choice.weight.name, 0.0)
        made = self._calibrated(model, [c for c in choices if c.method in NEEDS_DATA])
        writer, ahead = BlockWriter(model, accuracy_level=self.accuracy_level), context_of(model).ahead
        for choice in choices:
            blocks = made.get(choice.weight.name) or Rounding(choice, self.search_steps, ahead=ahead)
            compute = blocks if isinstance(blocks, Rounding) else _given(blocks)
            writer.replace(choice.weight, choice.form, compute)
            changes.count += len(choice.weight.users)
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
        users = [user for choice in choices for user in choice.weight.users]
        changes.details = {
            "bits": self.bits,
            "matmuls": sum(isinstance(u, MatMulWeight) for u in users),
            "embeddings": sum(isinstance(u, ir.Node) for u in users),
            "tied": sum(len(choice.weight.users) > 1 for choice in choices),
            "arithmetic": ARITHMETIC[self.accuracy_level],
            "layers": {choice.weight.name: choice.entry for choice in choices},
        }
        if made or self.balance:
            changes.details["calibration"] = dict(context_of(model).calibration)
        return changes

    def _calibrated(self, model: ir.Model, choices: list[Choice]) -> dict[str, QuantizedBlocks | Rounding]:
        if not choices:
            return {}
        activations = activations_for(model, self.name, method=choices[0].method)
        return calibrated(model, choices, activations, search_steps=self.search_steps)

    def _settings_of(self, weight: SharedWeight) -> dict[str, Any]:
        nodes = [user.node if isinstance(user, MatMulWeight) else user for user in weight.users]
        names = [weight.name, *(node.name or "" for node in nodes)]
        settings = self._settings()
        if weight.gathers and self.embedding_block_size:
            settings["block_size"] = self.embedding_block_size
        for pattern, changed in self.overrides.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return settings | changed
        return settings

    def _format(self, weight: SharedWeight, settings: Mapping[str, Any]) -> BlockFormat | str:
        """The format of a weight, or why there is none."""
        columns, size = weight.shape[1], int(settings["block_size"])
        while columns % size and size > 16:
            size //= 2
        if columns % size:
            return f"rows of {columns} are no multiple of block_size {settings['block_size']}"
        if settings["bits"] == 2 and weight.gathers:
            return "GatherBlockQuantized has no kernel for 2 bits"
        # What is added beside MatMulNBits has kernels in float32.
        wide = weight.tensor.dtype == ir.DataType.FLOAT
        half, minimums = wide and settings["half_scales"], wide and settings["minimums"]
        return BlockFormat(settings["bits"], size, settings["symmetric"], minimums, half)

    def _refuse(self, skipped: dict[str, str]) -> NoReturn:
        if not skipped:
            raise PreconditionError(
                f"pass {self.name}",
                got="no MatMul or Gather with a constant float matrix",
                expected="at least one",
                remedy="The model may be quantized already",
            )
        shown = [f"{name}: {reason}" for name, reason in list(skipped.items())[:5]]
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise PreconditionError(
            f"pass {self.name}",
            got=f"nothing to quantize, because every candidate was skipped ({'; '.join(shown)}{more})",
            expected="at least one MatMul or Gather with a constant float matrix that fits",
            remedy="Change block_size or skip_nodes, or leave the pass out; the model is unchanged",
        )


def _given(blocks: QuantizedBlocks) -> Callable[[], QuantizedBlocks]:
    return lambda: blocks
