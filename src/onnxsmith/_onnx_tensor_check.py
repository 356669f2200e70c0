"""Checks the tensors of an ONNX message: element type, shape, data length, and where external data lies."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from onnxsmith._onnx_text import check_pairs, file_kind, reason, require_text, show
from onnxsmith.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

__all__ = ["TensorCheck"]

# numpy's own bounds. A shape beyond them cannot be represented, even where a zero makes it empty.
_MAX_RANK = 64
_MAX_TENSOR_BYTES = 2**63 - 1

_STRING = 8

# TensorProto.DataType -> (bits per element, the typed field that may hold it, field entries per element as a
# ratio). A 4 bit element takes half a byte, and one byte per int32_data entry.
_ELEMENTS: Mapping[int, tuple[int, str, tuple[int, int]]] = {
    1: (32, "float_data", (1, 1)),  # FLOAT
    2: (8, "int32_data", (1, 1)),  # UINT8
    3: (8, "int32_data", (1, 1)),  # INT8
    4: (16, "int32_data", (1, 1)),  # UINT16
    5: (16, "int32_data", (1, 1)),  # INT16
    6: (32, "int32_data", (1, 1)),  # INT32
    7: (64, "int64_data", (1, 1)),  # INT64
    _STRING: (0, "string_data", (1, 1)),
    9: (8, "int32_data", (1, 1)),  # BOOL
    10: (16, "int32_data", (1, 1)),  # FLOAT16
    11: (64, "double_data", (1, 1)),  # DOUBLE
    12: (32, "uint64_data", (1, 1)),  # UINT32
    13: (64, "uint64_data", (1, 1)),  # UINT64
    14: (64, "float_data", (2, 1)),  # COMPLEX64
    15: (128, "double_data", (2, 1)),  # COMPLEX128
    16: (16, "int32_data", (1, 1)),  # BFLOAT16
    17: (8, "int32_data", (1, 1)),  # FLOAT8E4M3FN
    18: (8, "int32_data", (1, 1)),  # FLOAT8E4M3FNUZ
    19: (8, "int32_data", (1, 1)),  # FLOAT8E5M2
    20: (8, "int32_data", (1, 1)),  # FLOAT8E5M2FNUZ
    21: (4, "int32_data", (1, 2)),  # UINT4
    22: (4, "int32_data", (1, 2)),  # INT4
    23: (4, "int32_data", (1, 2)),  # FLOAT4E2M1
    24: (8, "int32_data", (1, 1)),  # FLOAT8E8M0
    25: (2, "int32_data", (1, 4)),  # UINT2
    26: (2, "int32_data", (1, 4)),  # INT2
    27: (6, "int32_data", (1, 1)),  # FLOAT6E2M3
    28: (6, "int32_data", (1, 1)),  # FLOAT6E3M2
}

_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


class TensorCheck:
    """Checks tensors of one model; see :func:`onnxsmith.onnx_file.load_model` for what.

    Args:
        path: The model's file, whose directory has to hold all external data.
    """

    def __init__(self, path: Path) -> None:
        self._directory = os.path.realpath(path.parent)
        self._file_bytes: dict[str, int] = {}

    def check(self, tensor: onnx.TensorProto, where: str) -> None:
        """Checks one tensor.

        Raises:
            ModelFileError: It breaks a rule.
        """
        require_text(tensor.name, where, "a tensor's name")
        require_text(tensor.doc_string, where, "a tensor's doc_string")
        check_pairs(tensor.metadata_props, where)
        if tensor.data_type not in _ELEMENTS:
            raise ModelFileError(
                where,
                got=f"unknown element type {tensor.data_type}",
                expected="a TensorProto.DataType that this onnx knows",
            )
        bits, _, _ = _ELEMENTS[tensor.data_type]
        elements = self._element_count(tensor.dims, bits, where)
        if tensor.HasField("segment"):
            raise ModelFileError(where, got="the tensor is a segment of another", expected="whole tensors")
        if tensor.data_location == 1:
            self._check_external(tensor, elements, where)
        else:
            self._check_inline(tensor, elements, where)

    def _element_count(self, dims: Sequence[int], bits: int, where: str) -> int:
        if len(dims) > _MAX_RANK:
            raise ModelFileError(where, got=f"a shape of {len(dims)} axes", expected=f"at most {_MAX_RANK}")
        bound = _MAX_TENSOR_BYTES // max(1, bits // 8)
        # Axes of size 0 left out: numpy bounds the strides of empty arrays as well.
        product = 1
        for dim in dims:
            if dim < 0:
                raise ModelFileError(where, got=f"shape {list(dims)}", expected="sizes of 0 or more")
            product *= max(dim, 1)
            if product > bound:
                raise ModelFileError(
                    where, got=f"shape {list(dims)} is absurdly large", expected="a tensor below 2**63 bytes"
                )
        return 0 if 0 in dims else product

    def _check_inline(self, tensor: onnx.TensorProto, elements: int, where: str) -> None:
        bits, field, (entries, per) = _ELEMENTS[tensor.data_type]
        filled = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
        raw = tensor.HasField("raw_data")
        if len(filled) + raw > 1:
            names = " and ".join([*filled, *(["raw_data"] if raw else [])])
            raise ModelFileError(where, got=f"data in both {names}", expected="data in one field")
        if raw and tensor.data_type != _STRING:
            got, expected, field = len(tensor.raw_data), _byte_count(elements, bits), "bytes of raw_data"
        elif raw or (filled and filled[0] != field):
            raise ModelFileError(
                where,
                got=f"data in {'raw_data' if raw else filled[0]}",
                expected=f"data of element type {tensor.data_type} in {field}",
            )
        else:
            got, expected = len(getattr(tensor, field)), -(-elements * entries // per)
        if got != expected:
            raise ModelFileError(
                where,
                got=f"{got} {field}",
                expected=f"{expected} for shape {list(tensor.dims)} of element type {tensor.data_type}",
                remedy="The file is damaged, or was not written completely.",
            )

    def _check_external(self, tensor: onnx.TensorProto, elements: int, where: str) -> None:
        if tensor.data_type == _STRING:
            raise ModelFileError(where, got="strings in external data", expected="strings inline")
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            if entry.key not in ("location", "offset", "length"):
                continue
            if entry.key in entries:
                raise ModelFileError(
                    where, got=f"two external data entries {entry.key!r}", expected="one of each"
                )
            entries[entry.key] = require_text(entry.value, where, f"external data {entry.key}")
        location = entries.get("location", "")
        nbytes = _byte_count(elements, _ELEMENTS[tensor.data_type][0])
        offset = self._external_number(entries, "offset", 0, where)
        length = self._external_number(entries, "length", nbytes, where)
        file_bytes = self._external_file(location, where)
        if length != nbytes:
            raise ModelFileError(
                where,
                got=f"external data of length {length}",
                expected=f"{nbytes} bytes for shape {list(tensor.dims)} of element type {tensor.data_type}",
            )
        if offset + length > file_bytes:
            raise ModelFileError(
                where,
                got=f"external data at offset {offset} with length {length}, but {show(location)} has "
                f"{file_bytes} bytes",
                expected=f"at least {offset + length}",
                remedy="The data file is truncated, or belongs to another model: copy it again.",
            )
        self._normalise_external(tensor, location, offset, length)

    def _normalise_external(self, tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
        """Leaves what was checked and nothing else, so that every reader after us reads the same."""
        del tensor.external_data[:]
        if length == 0:
            # onnx_ir cannot give the bytes of an empty external tensor.
            tensor.ClearField("data_location")
            for field in _TYPED_FIELDS:
                tensor.ClearField(field)
            tensor.raw_data = b""
            return
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    def _external_number(self, entries: Mapping[str, str], key: str, default: int, where: str) -> int:
        text = entries.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            raise ModelFileError(
                where, got=f"external data {key} {show(text)}", expected="a number of bytes, 0 or more"
            )
        return int(text)

    def _external_file(self, location: str, where: str) -> int:
        """The size of an external data file that may be read, in bytes."""
        if location in self._file_bytes:
            return self._file_bytes[location]
        if not location:
            raise ModelFileError(
                where, got="external data without a location", expected="the name of a file beside the model"
            )
        windows = PureWindowsPath(location)
        if PurePosixPath(location).is_absolute() or windows.anchor or ".." in windows.parts:
            raise ModelFileError(
                where,
                got=f"external data location {show(location)} leads out of the model's directory",
                expected="a relative path without '..'",
            )
        if not location.isprintable():
            raise ModelFileError(
                where,
                got=f"external data location {show(location)} has control characters",
                expected="a file name",
            )
        try:
            resolved = os.path.realpath(os.path.join(self._directory, location))
            if os.path.commonpath([resolved, self._directory]) != self._directory:
                raise ModelFileError(
                    where,
                    got=f"external data {show(location)} is a link that leads out of the model's directory",
                    expected="files within it",
                    remedy="If you trust the model (a Hugging Face hub cache holds links), copy its "
                    "directory with `cp -rL` and load the copy.",
                )
            status = os.stat(resolved)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                where,
                got=f"external data file {show(location)} cannot be read: {reason(error)}",
                expected=f"the file in {self._directory}",
                remedy="Copy the data files together with the .onnx file.",
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(
                where,
                got=f"external data {show(location)} is {file_kind(status.st_mode)}",
                expected="a regular file",
            )
        if status.st_nlink > 1:
            # onnx_ir refuses these when it reads, which is late: a hard link gets around the check above.
            raise ModelFileError(
                where,
                got=f"external data {show(location)} has {status.st_nlink} hard links",
                expected="a file of its own",
                remedy="If you trust the model, copy its directory with `cp -rL` and load the copy.",
            )
        self._file_bytes[location] = status.st_size
        return status.st_size


def _byte_count(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)
