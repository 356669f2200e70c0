"""GGUF blocks kept as they are: from the file into MatMulNBits, without rounding anything again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.gguf_file import GgufFile
from onnxsmith.graph_passes.block_operators import (
    ARITHMETIC,
    BlockFormat,
    BlockWriter,
    SharedWeight,
    find_weights,
)
from onnxsmith.graph_passes.block_search import SEARCH_STEPS
from onnxsmith.graph_passes.blocks import QuantizedBlocks, pack_codes, packed_blocks, quantize_blocks
from onnxsmith.graph_passes.context import context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.gguf_blocks import BLOCK_TYPES, Codes, GgufRows, RowMatch
from onnxsmith.graph_passes.other_weights import other_weights
from onnxsmith.graph_passes.packed_attention import open_attention
from onnxsmith.graph_passes.weights import matrix_rows, rows_tensor
from onnxsmith.source import resolve_path
from onnxsmith.stored_rows import known_rows

__all__ = ["KeepGgufBlocks"]

_DOMAIN = "com.microsoft"


class KeepGgufBlocks(GraphPass):
    """Stores weights that came from a GGUF file in the blocks that they have there.

    The exporter notes which rows of the file a weight is made of. Every row of every other weight is looked
    up in the file by its content, so it does not matter what a loader or an earlier pass did with rows, and
    only weights that are equal to the last bit are taken for the file's. Codes and scales are then copied.
    What is not in the file in blocks that an operator can express is rounded anew, and listed.
    """

    name: ClassVar[str] = "keep_gguf_blocks"
    summary: ClassVar[str] = "take the blocks of a GGUF source over without loss (MatMulNBits)"

    def __init__(
        self,
        *,
        gguf: str = "",
        rest: Literal["quantize", "keep"] = "quantize",
        rest_bits: Literal[4, 8] = 8,
        accuracy_level: Literal[0, 1, 2, 3, 4] = 4,
        embeddings: bool = True,
        skip_nodes: tuple[str, ...] = (),
    ) -> None:
        """Sets where the blocks are.

        Args:
            gguf: The file, or ``pkg:package/file``; the one that the model was exported from where empty.
            rest: What is done with weights that the file does not have in blocks: rounded, or kept in float.
            rest_bits: Bits of those that are rounded.
            accuracy_level: What MatMulNBits may compute in: 0 the input's type, 4 int8 (much faster on a
                CPU; activations are rounded to 8 bits in blocks).
            embeddings: Also embeddings (Gather).
            skip_nodes: Patterns of node or weight names that keep their precision.
        """
        self.gguf = gguf
        self.rest = rest
        self.rest_bits = rest_bits
        self.accuracy_level = accuracy_level
        self.embeddings = embeddings
        self.skip_nodes = tuple(skip_nodes)

    def apply(self, model: ir.Model) -> Changes:
        """Looks up every weight in the file and replaces it.

        Raises:
            PreconditionError: There is no file, or nothing in it is a weight of this model.
            ModelFileError: The file is damaged.
        """
        rows = GgufRows(GgufFile.open(self._path(model)))
        kept_whole = open_attention(model)
        weights, skipped = find_weights(model, embeddings=self.embeddings, skip_nodes=self.skip_nodes)
        skipped |= kept_whole | other_weights(model)
        writer = BlockWriter(model, accuracy_level=self.accuracy_level)
        layers: dict[str, dict[str, Any]] = {}
        kept = 0
        for weight in weights:
            match = _noted(rows, weight) or rows.find(matrix_rows(weight.tensor, weight.is_transposed))
            entry: dict[str, Any] = {"shape": list(weight.shape)}
            types = sorted({t.type for t in match.tensors}) if match else []
            if match is not None and all(kind in BLOCK_TYPES for kind in types):
                source = _Source(rows, match)
                writer.replace(weight, source.format, source.blocks)
                entry |= {"method": "copied", "exact": True, "type": "+".join(types)}
                entry |= dataclasses.asdict(source.format) | {"tensors": [t.name for t in match.tensors]}
                layers[weight.name] = entry
                kept += 1
                continue
            reason = (
                f"{'+'.join(types)} has no counterpart"
                if match
                else f"no rows of {rows.file.path.name} are equal to its rows"
            )
            form = _rest_format(weight, self.rest_bits) if self.rest == "quantize" else None
            if form is None:
                why = reason if self.rest == "keep" else f"{reason}, and its rows fit no block size"
                skipped[weight.name] = why
                continue
            writer.replace(weight, form, _Rounded(weight, form).blocks)
            layers[weight.name] = (
                entry | {"method": "rounded", "exact": False, "why": reason} | dataclasses.asdict(form)
            )
        if not kept:
            raise PreconditionError(
                f"pass {self.name}",
                got=f"none of the {len(weights)} weights is in {rows.file.path.name} in blocks",
                expected="a model that was exported from this file, not quantized yet",
                remedy="Give the file that the model was made from, or use quantize_weights",
            )
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports.setdefault(_DOMAIN, 1)
        return Changes(
            len(layers),
            {
                "file": rows.file.path.name,
                "copied": kept,
                "rounded": [name for name, entry in layers.items() if not entry["exact"]],
                "arithmetic": ARITHMETIC[self.accuracy_level],
                "layers": layers,
            },
            skipped,
        )

    def _path(self, model: ir.Model) -> Path:
        if self.gguf:
            path = resolve_path(self.gguf)
            if not path.is_file():
                raise BadInputError(f"pass {self.name}: gguf", got=f"no file {path}", expected="a GGUF file")
            return path
        known = context_of(model).gguf
        if known is None:
            raise PreconditionError(
                f"pass {self.name}",
                got="a model whose source is no GGUF file",
                expected="a GGUF source, or the parameter gguf",
                remedy="Give gguf=PATH, or use quantize_weights",
            )
        return known


class _Source:
    """The blocks of one weight, from as many tensors as it was put together of."""

    def __init__(self, rows: GgufRows, match: RowMatch) -> None:
        self._rows, self._match = rows, match
        kinds = [BLOCK_TYPES[t.type] for t in match.tensors]
        minimums = any(kind.minimums for kind in kinds)
        # One weight has one format: the widest codes and the smallest blocks, which the others fit into.
        self.format = BlockFormat(
            bits=max(kind.bits for kind in kinds),
            block_size=min(kind.block_size for kind in kinds),
            symmetric=not minimums,
            minimums=minimums,
            half_scales=all(kind.half_scales for kind in kinds),
        )

    def blocks(self) -> QuantizedBlocks:
        form, match = self.format, self._match
        columns = match.tensors[0].shape[1]
        count, blocks = len(match.row), columns // form.block_size
        codes = np.empty((count, columns), np.uint8)
        scales = np.empty((count, blocks), np.float32)
        minimums = np.empty((count, blocks), np.float32) if form.minimums else None
        for number, tensor in enumerate(match.tensors):
            at = np.flatnonzero(match.tensor == number)
            part = _widened(self._rows.decode(tensor, match.row[at]), tensor.type, form)
            codes[at], scales[at] = part[0], part[1]
            if minimums is not None:
                minimums[at] = part[2]
        packed = pack_codes(codes.reshape(count, blocks, form.block_size), form.bits)
        zeros = np.zeros((count, blocks), np.uint8) if minimums is None else minimums
        return packed_blocks(
            packed, scales, zeros, bits=form.bits, block_size=form.block_size, columns=columns,
            symmetric=form.symmetric,
        )  # fmt: skip


def _widened(decoded: Codes, type_name: str, form: BlockFormat) -> Codes:
    """The same weights in wider codes and smaller blocks."""
    kind = BLOCK_TYPES[type_name]
    codes, scales, minimums = decoded
    if minimums is None:
        if form.minimums:
            minimums = scales * np.float32(-(1 << (kind.bits - 1)))
        else:
            codes = codes + np.uint8((1 << (form.bits - 1)) - (1 << (kind.bits - 1)))
    times = kind.block_size // form.block_size
    scales = np.repeat(scales, times, axis=1)
    return codes, scales, None if minimums is None else np.repeat(minimums, times, axis=1)


class _Rounded:
    def __init__(self, weight: SharedWeight, form: BlockFormat) -> None:
        self._weight, self._form = weight, form

    def blocks(self) -> QuantizedBlocks:
        return quantize_blocks(
            self._weight.rows(),
            bits=self._form.bits,
            block_size=self._form.block_size,
            symmetric=self._form.symmetric,
            search_steps=SEARCH_STEPS,
            scale_type=self._weight.tensor.dtype.numpy(),
            name=self._weight.name,
        )


def _rest_format(weight: SharedWeight, bits: int) -> BlockFormat | None:
    columns = weight.shape[1]
    size = next((size for size in (32, 16) if columns % size == 0), None)
    return None if size is None else BlockFormat(bits, size, symmetric=bits == 8)


def _noted(rows: GgufRows, weight: SharedWeight) -> RowMatch | None:
    """The rows of the file that the exporter has made a weight of, where it said so."""
    straight = rows_tensor(weight.tensor, weight.is_transposed)
    return None if straight is None else rows.place(known_rows(straight))
