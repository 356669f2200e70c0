"""Reads the header of a GGUF file that may be damaged or hostile.

The layout is that of the GGUF specification, versions 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The reader of the ``gguf`` package does not
bound its loops by the size of the file, so a short file that claims 2**60 array elements never returns;
here every count is checked against the bytes that are left before anything is read or allocated.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import ModelFileError, require

__all__ = ["GgufFile", "GgufTensor"]

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type -> struct code, little endian.
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
# The specification's limit; ggml itself has no tensor with more axes.
_MAX_AXES = 4
_MAX_ARRAY_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: As in the file.
        type: The block type's name, such as ``Q4_1``.
        shape: In numpy's order (the file has the fastest axis first).
        offset: Where its data begins, in bytes from the start of the file.
        nbytes: Length of its data in bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: metadata and where the tensors lie.

    Attributes:
        path: The file.
        metadata: Key to value; arrays are lists.
        tensors: In the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    def tensor_types(self) -> dict[str, int]:
        """How many tensors have each block type."""
        return dict(sorted(Counter(t.type for t in self.tensors).items()))

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Reads and checks the header.

        Raises:
            ModelFileError: Not a GGUF file, or one whose counts, lengths or offsets do not fit its size.
        """
        try:
            size = path.stat().st_size
            if size < 24:
                raise ModelFileError(
                    str(path), got=f"{size} bytes", expected="a GGUF file (24 bytes of header)"
                )
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
        except OSError as error:
            raise ModelFileError(str(path), got=f"cannot be opened: {error.strerror}") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, got: str, expected: str | None = None) -> ModelFileError:
        return ModelFileError(
            f"{self.path} at byte {self.at}",
            got=got,
            expected=expected,
            remedy="The file is damaged or was cut off; fetch it again",
        )

    def read(self) -> GgufFile:
        magic = self.data[:4]
        if magic != _MAGIC:
            raise ModelFileError(
                str(self.path), got=f"the first bytes are {magic!r}", expected=f"{_MAGIC!r}, a GGUF file"
            )
        self.at = 4
        version = self.scalar(4)
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version}", "version 2 or 3, little endian")
        # A tensor entry takes at least 32 bytes and a metadata entry at least 13.
        tensor_count = self.count(32, "tensors")
        entry_count = self.count(13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} a second time")
            metadata[key] = self.value(self.scalar(4), depth=0)
        entries = [self.tensor_entry() for _ in range(tensor_count)]
        return GgufFile(self.path, metadata, self.place(entries, metadata))

    def take(self, length: int) -> int:
        """Moves past ``length`` bytes and returns where they began."""
        begin = self.at
        if length > len(self.data) - begin:
            raise self.fail(f"{length} more bytes are announced", f"at most {len(self.data) - begin}")
        self.at = begin + length
        return begin

    def scalar(self, kind: int) -> Any:
        code = "<" + _SCALARS[kind]
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def count(self, smallest: int, what: str) -> int:
        number: int = self.scalar(10)
        if number * smallest > len(self.data) - self.at:
            raise self.fail(
                f"{number} {what} are announced", f"no more than fit in {len(self.data) - self.at} bytes"
            )
        return number

    def string(self) -> str:
        length = self.count(1, "bytes of text")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"text that is not UTF-8 ({error.reason})") from error

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind != _ARRAY:
            raise self.fail(f"value type {kind}", "0 to 12")
        if depth >= _MAX_ARRAY_DEPTH:
            raise self.fail("arrays nested too deeply", f"at most {_MAX_ARRAY_DEPTH} levels")
        inner = self.scalar(4)
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            number = self.count(width, "array elements")
            begin = self.take(number * width)
            return list(struct.unpack_from(f"<{number}{_SCALARS[inner]}", self.data, begin))
        # Strings carry an 8 byte length each, arrays a type and a length.
        number = self.count(8, "array elements")
        return (
            self.strings(number)
            if inner == _STRING
            else [self.value(inner, depth + 1) for _ in range(number)]
        )

    def strings(self, number: int) -> list[str]:
        """Strings one after the other: a tokenizer has a hundred thousand of them."""
        found, at, size, length_at = [], self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(number):
            begin = at + 8
            end = begin + length_at(self.data, at)[0] if begin <= size else size + 1
            try:
                text = self.data[begin:end].decode("utf-8") if end <= size else None
            except UnicodeDecodeError:
                text = None
            if text is None:
                # Says what is wrong with it.
                self.at = at
                text = self.string()
            found.append(text)
            at = end
        self.at = at
        return found

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        axes = self.scalar(4)
        if axes > _MAX_AXES:
            raise self.fail(f"tensor {name!r} has {axes} axes", f"at most {_MAX_AXES}")
        shape = tuple(self.scalar(10) for _ in range(axes))
        return name, shape[::-1], self.scalar(4), self.scalar(10)

    def place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> tuple[GgufTensor, ...]:
        constants = require("gguf", purpose=f"reading {self.path.name}").constants
        alignment = metadata.get("general.alignment", 32)
        # The specification wants a multiple of 8, and ggml itself a power of two. Beyond 2**31 the readers of
        # other projects overflow.
        if type(alignment) is not int or not 1 <= alignment <= 2**31 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}", "a power of two")
        begin = -(-self.at // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            where = f"{self.path}: tensor {name!r}"
            if name in placed:
                raise ModelFileError(where, got="it is there twice")
            try:
                block_type = constants.GGMLQuantizationType(kind)
                block_size, block_bytes = constants.GGML_QUANT_SIZES[block_type]
            except (ValueError, KeyError):
                raise ModelFileError(
                    where, got=f"block type {kind}", expected="one that the gguf package knows"
                ) from None
            elements = math.prod(shape)
            row = shape[-1] if shape else 1
            if row % block_size:
                raise ModelFileError(
                    where, got=f"rows of {row}", expected=f"a multiple of {block_size} ({block_type.name})"
                )
            if offset % alignment:
                raise ModelFileError(where, got=f"offset {offset}", expected=f"a multiple of {alignment}")
            nbytes = elements // block_size * block_bytes
            if begin + offset + nbytes > len(self.data):
                raise ModelFileError(
                    where,
                    got=f"{nbytes} bytes at offset {begin + offset} in a file of {len(self.data)} bytes",
                    expected="data inside the file",
                    remedy="The file is damaged or was cut off; fetch it again",
                )
            placed[name] = GgufTensor(name, block_type.name, shape, begin + offset, nbytes)
        return tuple(placed.values())
