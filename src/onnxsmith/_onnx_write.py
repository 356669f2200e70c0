"""Writes a model's weights and graph into files that nobody reads yet."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from onnxsmith._onnx_slots import Slot, Substitute, identity
from onnxsmith._onnx_text import reason, root_cause, show
from onnxsmith.errors import DestinationError, ModelFileError, OnnxsmithError, ResourceError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "PROTOBUF_LIMIT_BYTES",
    "destination_error",
    "require_destination",
    "serialize",
    "stale_substitutes",
    "write_data",
]

PROTOBUF_LIMIT_BYTES = 2**31 - 1

# Tensors up to this size stay in the graph: shape inference reads shapes and axes from there.
_ALWAYS_INLINE_BYTES = 1024

# What ExternalData.md recommends, so that a reader can map a tensor alone.
_DATA_ALIGNMENT_BYTES = 4096

# Only tensors up to this size are computed ahead of time.
_AHEAD_BYTES = 32 * 1024 * 1024

_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


def write_data(
    slots: Sequence[Slot], external: bool, staged_data: Path, data_path: Path, *, hashed: bool
) -> tuple[list[Substitute], str | None]:
    """Writes the data file, and gives what has to stand in the slots for the graph file to be right.

    Returns:
        The substitutes; and the SHA-256 of the data file where it is wanted and all of it was in memory.
    """
    import onnx_ir

    outside = [slot.tensor for slot in slots if external and _goes_outside(slot.tensor)]
    placed, digest = _write_tensors(outside, staged_data, hashed=hashed) if outside else ({}, None)
    directory = os.path.realpath(data_path.parent)
    substitutes: list[Substitute] = []
    for slot in slots:
        tensor: Any = slot.tensor
        if external and _goes_outside(tensor):
            new: Any = onnx_ir.ExternalTensor(
                data_path.name,
                placed[identity(tensor)],
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                doc_string=tensor.doc_string or None,
                metadata_props=dict(tensor.metadata_props) or None,
                base_dir=directory,
            )
        elif isinstance(tensor, onnx_ir.ExternalTensor | onnx_ir.LazyTensor):
            new = _in_memory(tensor)
        else:
            continue
        substitutes.append(Substitute(slot, new))
    return substitutes, digest


def _goes_outside(tensor: Any) -> bool:
    import onnx_ir

    return bool(tensor.dtype != onnx_ir.DataType.STRING and tensor.nbytes > _ALWAYS_INLINE_BYTES)


def _write_tensors(
    tensors: Sequence[Any], path: Path, *, hashed: bool
) -> tuple[dict[tuple[Any, ...], int], str | None]:
    """Writes each tensor once, at the next aligned place; gives the offsets, and perhaps the file's SHA-256.

    While one is written, a thread computes the next, one after the other: computing (reading, transposing,
    rounding) and writing take about as long, and so does hashing, in another thread.
    """
    import onnx_ir

    once = list({identity(tensor): tensor for tensor in tensors}.values())
    # What is mapped from a file is copied from there, and not seen here.
    hashed = hashed and not any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in once)
    state = hashlib.sha256()
    offsets: dict[tuple[Any, ...], int] = {}
    with open(path, "wb") as file, ThreadPoolExecutor(1) as computing, ThreadPoolExecutor(1) as hashing:

        def begin(index: int) -> Future[bytes | memoryview] | None:
            if isinstance(once[index], onnx_ir.ExternalTensor):
                return None
            return computing.submit(_bytes_of, once[index])

        ahead: Future[bytes | memoryview] | None = None
        behind: Future[None] | None = None
        for index, tensor in enumerate(once):
            end = file.tell()
            offset = -(-end // _DATA_ALIGNMENT_BYTES) * _DATA_ALIGNMENT_BYTES
            file.seek(offset)
            computed, ahead = ahead or begin(index), None
            if computed is None:
                _copy_external(tensor, file)
            else:
                content = computed.result()
                if behind is not None:
                    behind.result()
                if hashed:
                    behind = hashing.submit(_hash, state, offset - end, content)
                # Two large tensors at a time would take the memory of a larger model.
                following = once[index + 1 : index + 2]
                small = bool(following) and max(len(content), following[0].nbytes) <= _AHEAD_BYTES
                if small:
                    ahead = begin(index + 1)
                # Not tofile(), because numpy reports a full disk by an OSError without a number.
                file.write(content)
                if behind is not None and not small:
                    behind.result()
                    behind = None
                computed = content = None  # type: ignore[assignment]  # lets the memory go
            _require_length(tensor, file.tell() - offset)
            offsets[identity(tensor)] = offset
    return offsets, state.hexdigest() if hashed else None


def _hash(state: Any, padding: int, content: bytes | memoryview) -> None:
    state.update(bytes(padding))
    state.update(content)


def _copy_external(tensor: ir.ExternalTensor, file: Any) -> None:
    """Copies an external tensor's bytes without loading the tensor, which would keep it in memory."""
    try:
        tensor.tofile(file)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        raise ModelFileError(
            tensor.path,
            got=f"the data of tensor {show(tensor.name)} cannot be read: {reason(error)}",
            expected="the file that the model was loaded with",
            remedy="Load the model again.",
        ) from error


def _bytes_of(tensor: Any) -> bytes | memoryview:
    """What is written; without a copy where the tensor lies in memory as ONNX wants it."""
    try:
        if sys.byteorder == "little" and tensor.dtype.itemsize >= 1:
            array = tensor.numpy()
            if array.flags.c_contiguous and array.nbytes == tensor.nbytes:
                return memoryview(array.reshape(-1).view("uint8"))
        return bytes(tensor.tobytes())
    except OSError as error:
        # Kept apart from an OSError of the destination.
        raise ModelFileError(
            f"tensor {show(tensor.name)}", got=f"its data cannot be read: {reason(error)}"
        ) from error


def _require_length(tensor: Any, length: int) -> None:
    if length != tensor.nbytes:
        raise OnnxsmithError(
            f"tensor {show(tensor.name)}",
            got=f"it gave {length} bytes",
            expected=f"{tensor.nbytes} for shape {tensor.shape} of element type {tensor.dtype}",
        )


def _in_memory(tensor: Any) -> Any:
    """A copy of an external or lazy tensor that depends on no file."""
    import onnx
    import onnx_ir

    proto = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    for key, text in tensor.metadata_props.items():
        proto.metadata_props.add(key=key, value=text)
    if tensor.dtype == onnx_ir.DataType.STRING:
        strings = tensor.numpy().ravel().tolist()
        proto.string_data.extend(s.encode() if isinstance(s, str) else s for s in strings)
        return onnx_ir.serde.deserialize_tensor(proto)
    if isinstance(tensor, onnx_ir.ExternalTensor):
        buffer = io.BytesIO()
        _copy_external(tensor, buffer)
        proto.raw_data = buffer.getvalue()
    else:
        proto.raw_data = bytes(_bytes_of(tensor))
    _require_length(tensor, len(proto.raw_data))
    return onnx_ir.serde.deserialize_tensor(proto)


def serialize(model: ir.Model, substitutes: Sequence[Substitute], path: Path) -> bytes:
    """The bytes of the graph file, with the substitutes standing in their slots."""
    import onnx_ir

    try:
        for substitute in substitutes:
            substitute.slot.replace(substitute.tensor)
        proto = onnx_ir.serde.serialize_model(model)
        content: bytes = proto.SerializeToString(deterministic=True)
    except (MemoryError, OnnxsmithError):
        raise
    except Exception as error:
        raise OnnxsmithError(str(path), got=f"the model cannot be serialised: {root_cause(error)}") from error
    finally:
        for substitute in substitutes:
            substitute.slot.replace(substitute.slot.tensor)
    if len(content) > PROTOBUF_LIMIT_BYTES:
        raise ModelFileError(
            str(path),
            got=f"the graph without external data has {len(content)} bytes",
            expected=f"at most {PROTOBUF_LIMIT_BYTES}, protobuf's limit of 2 GiB",
            remedy="Lower inline_limit_bytes, or turn large constants into initializers.",
        )
    return content


def stale_substitutes(substitutes: Sequence[Substitute], finals: Sequence[Path]) -> list[Substitute]:
    """The substitutes of tensors that read, or may read, a file which is about to be replaced."""
    import onnx_ir

    replaced = {key for final in finals if (key := _file_key(final)) is not None}
    if not replaced:
        return []
    keys: dict[str, tuple[int, int] | None] = {}
    stale: list[Substitute] = []
    for substitute in substitutes:
        tensor = substitute.slot.tensor
        if isinstance(tensor, onnx_ir.ExternalTensor):
            if tensor.path not in keys:
                keys[tensor.path] = _file_key(tensor.path)
            if keys[tensor.path] in replaced:
                stale.append(substitute)
        elif isinstance(tensor, onnx_ir.LazyTensor):
            stale.append(substitute)
    return stale


def _file_key(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def require_destination(path: Path, data_path: Path, data_name: str) -> None:
    """Requires a directory that exists and a plain name for the data file."""
    plain = PurePosixPath(data_name).name == data_name and PureWindowsPath(data_name).name == data_name
    if not plain or data_name in ("", "..", path.name) or not data_name.isprintable():
        raise DestinationError(
            str(path),
            got=f"external data name {show(data_name)}",
            expected="a file name, without a directory, that differs from the model's",
        )
    try:
        if not path.parent.is_dir():
            raise DestinationError(
                str(path),
                got=f"there is no directory {str(path.parent)!r}",
                expected="a directory that exists",
                remedy="Create it first.",
            )
        for final in (path, data_path):
            if final.is_dir():
                raise DestinationError(str(final), got="it is a directory", expected="a file name")
    except OSError as error:
        raise destination_error(error, path, 0) from error


def destination_error(error: OSError, path: Path, needed: int) -> OnnxsmithError:
    """What an operating system's error says about a destination."""
    if error.errno in _FULL:
        return ResourceError(
            str(path),
            got=f"cannot be written: {reason(error)}",
            expected=f"room for about {needed} bytes",
            remedy="Free space, or write elsewhere. Nothing was left behind.",
        )
    return DestinationError(
        str(path),
        got=f"cannot be written: {reason(error)}",
        expected="a path in a directory that can be written to",
    )
