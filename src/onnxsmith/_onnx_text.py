"""Text out of an ONNX file: required to be UTF-8, and shown in messages short and quoted."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from onnxsmith.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "chain",
    "check_pairs",
    "domain_of",
    "file_kind",
    "node_label",
    "reason",
    "require_text",
    "root_cause",
    "show",
]


def check_pairs(pairs: Iterable[onnx.StringStringEntryProto], where: str) -> None:
    """Requires that metadata is text."""
    for pair in pairs:
        require_text(pair.key, where, "a metadata key")
        require_text(pair.value, where, "a metadata value")


def require_text(text: object, where: str, what: str) -> str:
    """Gives the text back, or refuses it: protobuf hands out bytes where a string is not UTF-8."""
    if not isinstance(text, str):
        raise ModelFileError(where, got=f"{what} is not UTF-8: {show(text)}", expected="UTF-8 text")
    return text


def domain_of(domain: str) -> str:
    """Both names of ONNX's own domain are one."""
    return "" if domain == "ai.onnx" else domain


def node_label(node: onnx.NodeProto, index: int) -> str:
    """A node by its name, or by its place where it has none."""
    return show(node.name) if node.name else f"#{index} ({show(node.op_type)})"


def chain(names: Sequence[str]) -> str:
    """A cycle, its middle left out where it is long."""
    shown = [*names, names[0]]
    if len(shown) > 12:
        shown = [*shown[:6], f"... ({len(shown) - 10} more) ...", *shown[-4:]]
    return " -> ".join(shown)


def show(text: object) -> str:
    """A name out of the file, quoted, and short enough for a message."""
    if isinstance(text, str | bytes) and len(text) > 80:
        return f"{text[:60]!r}... ({len(text)} characters)"
    return repr(text)


def file_kind(mode: int) -> str:
    """What a file is that is not a regular one."""
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a device or socket"


def reason(error: Exception) -> str:
    """The system's own words, without the path, which the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def root_cause(error: BaseException) -> str:
    """The error at the start of a chain of causes, shortened."""
    # onnx_ir wraps an error once per level of nesting, each time with the whole message printed.
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
