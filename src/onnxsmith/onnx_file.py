"""Reading and writing ONNX files: nothing in a file that a stranger made is believed before it was checked.

:func:`load_model` checks the protobuf message itself, before anything follows a path, allocates a size or
recurses into a structure that the message only claims. What passes is handed to ``onnx_ir``, which maps
weights from the file where they lie. :func:`save_model` writes next to the destination and renames.

The rules are those of https://github.com/onnx/onnx/blob/main/docs/IR.md and
https://github.com/onnx/onnx/blob/main/docs/ExternalData.md.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from onnxsmith._onnx_model_check import MAX_GRAPH_DEPTH, ModelCheck
from onnxsmith._onnx_slots import graphs, slots, total_bytes, weight_slots
from onnxsmith._onnx_text import file_kind, reason, root_cause
from onnxsmith._onnx_write import (
    PROTOBUF_LIMIT_BYTES,
    destination_error,
    require_destination,
    serialize,
    stale_substitutes,
    write_data,
)
from onnxsmith.errors import ModelFileError, ResourceError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "check_model",
    "drop_pages",
    "load_model",
    "save_model",
    "weight_bytes",
]


def load_model(path: Path) -> ir.Model:
    """Reads an ONNX file; weights in external data stay on disk, memory-mapped.

    The message is read once, checked, and that same message becomes the model. Checked are: every tensor's
    element type, shape and data length; every external data location (inside the model's own directory,
    links resolved, a regular file that is long enough); names (defined once, defined before use, no
    shadowing); the order of nodes; nesting depth; and that model-local functions do not call themselves.
    Operators and their types are not checked, so models with contrib or custom operators load.

    Time and memory are linear in the size of the file, external data not counted.

    Args:
        path: The ``.onnx`` file.

    Returns:
        The model. Its :class:`onnx_ir.ExternalTensor` objects hold absolute paths.

    Raises:
        ModelFileError: The file cannot be read, is not an ONNX model, or breaks one of the rules above.
        ResourceError: There is not enough memory for the message.
    """
    path = Path(path)
    try:
        proto = _read_proto(path)
        ModelCheck(path, proto).run()
        return _deserialize(path, proto)
    except MemoryError as error:
        raise ResourceError(
            str(path), got="not enough memory to read it", remedy="Use a machine with more memory."
        ) from error


def save_model(
    model: ir.Model,
    path: Path,
    *,
    external_data_name: str | None = None,
    inline_limit_bytes: int = 64 * 1024 * 1024,
    hashes: MutableMapping[Path, str] | None = None,
) -> int:
    """Writes a model, with its weights in one data file beside it where they are large.

    Weights up to ``inline_limit_bytes`` in total go into the ``.onnx`` file itself. Above it, every
    initializer of more than 1 KiB goes to the data file, each at a multiple of 4096 bytes; weights that
    several initializers share are written once. External tensors in node attributes and in functions are
    carried over too. One tensor at a time is in memory. The same model gives the same bytes.

    Files appear under their names only when complete; a failure leaves the previous ones. Where two files
    have to be replaced, the old ``.onnx`` file steps aside first, so that a process that is killed between
    the two leaves no model rather than an old model with new weights. A data file of an earlier save is
    not deleted where the new model needs none.

    The model object stays valid and, in general, unchanged. The exception: where one of its tensors is
    mapped from a file that was replaced, the model afterwards maps the new file, and the old tensor object
    is invalidated, so that another model that shares it gets an error and not wrong weights. Lazy tensors
    may hide such a mapping, so wherever a file is replaced they too give way to what was written.
    Not to be called for one model from two threads at a time.

    Args:
        model: The model to write.
        path: The ``.onnx`` file, in a directory that exists.
        external_data_name: File name of the data file; ``<name of path>.data`` by default.
        inline_limit_bytes: Total bytes of weights up to which there is no data file.
        hashes: Takes the SHA-256 of the data file, where one is written and none of it was only copied from
            another file: while it is written the hash costs less.

    Returns:
        The number of bytes written, both files together.

    Raises:
        DestinationError: The path cannot be written.
        ResourceError: The disk, a quota or a file size limit is too small.
        ModelFileError: A file that a tensor is mapped from is gone or was cut, or more than 2 GiB would
            have to stand in the ``.onnx`` file.
        OnnxsmithError: The model cannot be serialised.
    """
    path = Path(path)
    data_name = f"{path.name}.data" if external_data_name is None else external_data_name
    data_path = path.parent / data_name
    require_destination(path, data_path, data_name)
    places = weight_slots(model)
    needed = total_bytes(place.tensor for place in places)
    external = needed > inline_limit_bytes
    try:
        # In the same directory, so that renaming does not copy; a name of its own, so that two writers do
        # not meet; and file names that are already the final ones.
        with tempfile.TemporaryDirectory(
            prefix=".onnxsmith-", dir=path.parent, ignore_cleanup_errors=True
        ) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            old.mkdir()
            staged_model, staged_data = new / path.name, new / data_name
            substitutes, digest = write_data(
                places, external, staged_data, data_path, hashed=hashes is not None
            )
            if digest is not None and hashes is not None:
                hashes[data_path] = digest
            content = serialize(model, substitutes, path)
            needed = len(content) + (needed if external else 0)
            staged_model.write_bytes(content)
            staged = [(staged_model, path)]
            if staged_data.exists():
                staged.insert(0, (staged_data, data_path))
            written = sum(source.stat().st_size for source, _ in staged)
            # Before the names change hands: afterwards nothing tells whose file a tensor was mapped from.
            stale = stale_substitutes(substitutes, [final for _, final in staged])
            _publish(staged, old)
    except OSError as error:
        raise destination_error(error, path, needed) from error
    for substitute in stale:
        substitute.slot.replace(substitute.tensor)
        invalidate = getattr(substitute.slot.tensor, "invalidate", None)
        if invalidate is not None:
            invalidate()
    return written


def check_model(path: Path) -> None:
    """Checks an ONNX file with ``onnx.checker``, after everything that :func:`load_model` checks.

    Operators of the standard domains are checked against their definitions; operators of other domains,
    such as ``com.microsoft``, are accepted as they are. Types and shapes are not inferred. Works for
    models of any size, since the weights are not read.

    Args:
        path: The ``.onnx`` file.

    Raises:
        ModelFileError: The model breaks a rule; the message repeats what the checker said.
    """
    import onnx

    path = Path(path)
    # First our own checks: the checker is C++ that follows paths and recurses.
    ModelCheck(path, _read_proto(path)).run()
    try:
        with _runtime_operators():
            onnx.checker.check_model(str(path))
    except Exception as error:
        raise ModelFileError(
            str(path), got=f"onnx.checker refuses the model: {root_cause(error)}", expected="a valid model"
        ) from error


def drop_pages(tensor: ir.TensorProtocol | None) -> None:
    """Gives back the memory of a tensor that is mapped from a file; what is read again is mapped again.

    Without it everything that was ever read counts as memory of this process, until the system needs it.
    """
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, mmap.mmap) and hasattr(raw, "madvise"):
        with contextlib.suppress(OSError, ValueError):
            raw.madvise(mmap.MADV_DONTNEED)


def weight_bytes(model: ir.Model) -> int:
    """The bytes of all initializers, those of subgraphs and functions included, shared ones counted once.

    Takes sizes from shapes and element types; no data is read.
    """
    tensors = (value.const_value for graph in graphs(model) for value in graph.initializers.values())
    return total_bytes(tensor for tensor in tensors if tensor is not None)


def _read_proto(path: Path) -> onnx.ModelProto:
    """Reads and parses the file, once."""
    import onnx

    proto = onnx.ModelProto()
    content = _read_file(path)
    try:
        proto.ParseFromString(content)
    except MemoryError:
        raise
    except Exception as error:
        # DecodeError, whose package has no types.
        if "MaxDepth" in str(error):
            raise ModelFileError(
                str(path),
                got="subgraphs are nested too deeply for protobuf",
                expected=f"at most {MAX_GRAPH_DEPTH} levels",
            ) from error
        _refuse_content(path, content, error)
    # Random text often parses, as a message of unknown fields.
    if not proto.HasField("graph"):
        _refuse_content(path, content, None)
    return proto


def _read_file(path: Path) -> bytes:
    try:
        # Opening a FIFO would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(
                    str(path),
                    got=f"it is {file_kind(status.st_mode)}",
                    expected="an .onnx file",
                    remedy="Name the .onnx file itself." if stat.S_ISDIR(status.st_mode) else None,
                )
            if status.st_size > PROTOBUF_LIMIT_BYTES:
                raise ModelFileError(
                    str(path),
                    got=f"the file has {status.st_size} bytes",
                    expected=f"at most {PROTOBUF_LIMIT_BYTES}, protobuf's limit of 2 GiB",
                    remedy="Save the model with its weights as external data.",
                )
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(PROTOBUF_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        raise ModelFileError(
            str(path), got=f"cannot be read: {reason(error)}", expected="a readable .onnx file"
        ) from error
    if not content:
        raise ModelFileError(str(path), got="the file is empty: not an ONNX model, or truncated")
    return content


def _refuse_content(path: Path, content: bytes, error: Exception | None) -> NoReturn:
    """Refuses a file, saying what it seems to be instead."""
    start = content[:256].lstrip().lower()
    remedy = "Copy or export the file again."
    looks = ""
    if start.startswith(b"version https://git-lfs"):
        looks, remedy = " (it is a git-lfs pointer)", "Fetch the file itself with `git lfs pull`."
    elif start.startswith((b"<!doctype", b"<html")):
        looks, remedy = " (it is an HTML page)", "Download the file itself, not the page that shows it."
    elif start.startswith(b"pk\x03\x04"):
        looks, remedy = " (it is a zip archive)", "Unpack it and name the .onnx file."
    raise ModelFileError(
        str(path), got=f"not an ONNX model, or truncated{looks}", expected="an ONNX ModelProto", remedy=remedy
    ) from error


def _deserialize(path: Path, proto: onnx.ModelProto) -> ir.Model:
    import onnx_ir

    for holder in (proto, *proto.functions):
        for entry in holder.opset_import:
            # The two names mean the same. onnx_ir rewrites that of nodes, but not that of imports.
            if entry.domain == "ai.onnx":
                entry.domain = ""
    try:
        model = onnx_ir.serde.deserialize_model(proto)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelFileError(
            str(path), got=f"onnx_ir cannot represent it: {root_cause(error)}", expected="a valid ONNX model"
        ) from error
    # Absolute and free of links, or the tensors would change their meaning with the working directory, and
    # onnx_ir skips its own containment check where the directory is "". Its set_base_dir() omits functions.
    directory = os.path.realpath(path.parent)
    for slot in slots(model):
        if isinstance(slot.tensor, onnx_ir.ExternalTensor):
            slot.tensor.base_dir = directory
    return model


def _publish(staged: Sequence[tuple[Path, Path]], aside_directory: Path) -> None:
    """Renames finished files to their names, data before model; undoes it where that fails."""
    if len(staged) == 1:
        os.replace(*staged[0])
        return
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for _, final in reversed(staged):
            if os.path.lexists(final):
                backup = aside_directory / final.name
                os.replace(final, backup)
                aside.append((backup, final))
        for source, final in staged:
            os.replace(source, final)
            placed.append(final)
    except BaseException:
        for final in placed:
            final.unlink()
        for backup, final in reversed(aside):
            os.replace(backup, final)
        raise


_SCHEMA_LOCK = threading.Lock()


@contextlib.contextmanager
def _runtime_operators() -> Iterator[None]:
    """Makes known to ``onnx.checker`` what ONNX Runtime, by an old mistake, has in ONNX's own domain.

    That is SimplifiedLayerNormalization, which every fused language model contains.
    """
    import onnx.defs

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    floats = [("T", ["tensor(float16)", "tensor(float)", "tensor(double)", "tensor(bfloat16)"], "")]
    name = "SimplifiedLayerNormalization"
    with _SCHEMA_LOCK:
        if onnx.defs.has(name):
            yield
            return
        onnx.defs.register_schema(
            schema(
                name,
                "",
                1,
                inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "T")],
                outputs=[
                    schema.FormalParameter("Y", "T"),
                    schema.FormalParameter("inv_std_var", "T", param_option=optional),
                ],
                type_constraints=floats,
                attributes=[
                    schema.Attribute("axis", schema.AttrType.INT, required=False),
                    schema.Attribute("epsilon", schema.AttrType.FLOAT, required=False),
                    schema.Attribute("stash_type", schema.AttrType.INT, required=False),
                ],
            )
        )
        try:
            yield
        finally:
            onnx.defs.deregister_schema(name, 1, "")
