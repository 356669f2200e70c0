"""Lets transformers take the configuration of a GGUF file from a header that was read already.

It reads the header with the ``gguf`` package, word by word, and with it two hundred thousand words of a
tokenizer that the configuration has no use for: a second of every conversion.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsmith.gguf_file import GgufFile

__all__ = ["header_known"]


@contextlib.contextmanager
def header_known(gguf: GgufFile) -> Iterator[None]:
    """While open, transformers finds the fields of a file's header without reading it.

    For what needs the header alone: tensors have names and no content. Where transformers reads headers in
    another way than this knows, it reads this one as it does.

    Args:
        gguf: The header; other files are read as always.
    """
    package: Any = importlib.import_module("gguf")
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    parse = getattr(reading, "_gguf_parse_value", None)
    if parse is None:
        yield
        return
    reader = package.GGUFReader

    def read(path: Any, *arguments: Any, **options: Any) -> Any:
        return _Header(gguf) if str(path) == str(gguf.path) else reader(path, *arguments, **options)

    def parsed(value: Any, kind: Any) -> Any:
        return value.value if type(value) is _Parsed else parse(value, kind)

    package.GGUFReader, reading._gguf_parse_value = read, parsed
    try:
        yield
    finally:
        package.GGUFReader, reading._gguf_parse_value = reader, parse


class _Parsed:
    """A value of the header, where transformers expects its bytes."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Header:
    """What transformers asks of the ``gguf`` package's reader."""

    def __init__(self, gguf: GgufFile) -> None:
        self.fields = {name: _field(value) for name, value in gguf.metadata.items()}
        self.tensors = [SimpleNamespace(name=tensor.name) for tensor in gguf.tensors]


def _field(value: Any) -> Any:
    parts = [_Parsed(one) for one in _flat(value)]
    return SimpleNamespace(parts=parts, data=range(len(parts)), types=[])


def _flat(value: Any) -> Iterator[Any]:
    """Arrays of arrays are one to the ``gguf`` package."""
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    else:
        yield value
