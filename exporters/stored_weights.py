"""Weights that stay in their files until someone computes with them.

A decoder that is only exported needs the names, shapes and element types of its weights, and each weight
once, when the graph is written. So the module is built without memory (on torch's ``meta`` device), and a
table says how to read each weight: mapped from a safetensors file, or dequantised from a GGUF file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.errors import SourceError
from onnxsmith.stored_rows import StoredMatrix, StoredRows, note_rows

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from onnxsmith.gguf_file import GgufFile

__all__ = [
    "StoredWeights",
    "gguf_weights",
    "quick_gguf",
    "safetensors_weights",
    "skeleton",
    "stand_ins",
    "stored_matrices",
    "surplus_layers",
]

_MAX_HEADER_BYTES = 100_000_000
# Those of transformers' conversions that give one weight for one tensor, under the name in its table.
_PLAIN_PROCESSORS = frozenset(
    {"TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor"}
)
# safetensors' names of the element types that models are stored in.
_TYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredWeights:
    """The weights of a module, by their names in its state dict."""

    def __init__(
        self,
        readers: Mapping[str, Callable[[], torch.Tensor]],
        *,
        where: str,
        rows: Mapping[str, StoredRows] | None = None,
    ) -> None:
        """Keeps how to read each weight.

        Args:
            readers: Reads it, by name.
            where: For messages.
            rows: Which rows of the file a matrix has, by name, where it has the file's.
        """
        self._readers = readers
        self._rows = rows or {}
        self._where = where
        self._fills = 0
        # Owner, name there, what was there, what was put there.
        self._filled: list[tuple[Any, str, Any, Any]] = []

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """One weight, in the shape and element type of the module's own.

        Raises:
            SourceError: It has another shape in the file.
        """
        tensor = self._readers[name]()
        if tensor.shape != like.shape:
            raise SourceError(
                self._where, got=f"{name} of shape {list(tensor.shape)}", expected=str(list(like.shape))
            )
        return tensor.to(like.dtype)

    def fill(self, module: torch.nn.Module) -> None:
        """Gives the module its weights. What needs no conversion is mapped from the file, not copied."""
        import torch

        self._fills += 1
        filled: dict[int, Any] = {}
        for owner, name, full, parameter in list(_parameters(module)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in filled:
                tensor = self.read(full, parameter)
                filled[id(parameter)] = (torch.nn.Parameter(tensor, requires_grad=False), parameter)
            owner._parameters[name] = filled[id(parameter)][0]
            self._filled.append((owner, name, parameter, filled[id(parameter)][0]))

    def drop(self) -> None:
        """Takes the weights out of the module again, at the call that goes with its first ``fill``."""
        self._fills -= 1
        if self._fills:
            return
        for owner, name, parameter, put in self._filled:
            # What was changed since is not ours.
            if owner._parameters.get(name) is put:
                owner._parameters[name] = parameter
        self._filled = []

    def bind(self, model: ir.Model, module: torch.nn.Module) -> None:
        """Lets the initializers of a graph that have names of weights read them when they are written."""
        import onnx_ir as ir

        parameters = dict(module.named_parameters())
        for name, value in model.graph.initializers.items():
            if name in parameters and name in self and value.const_value is not None:
                known = value.const_value

                def read(_name: str = name, _like: Any = parameters[name]) -> ir.TensorProtocol:
                    return ir.tensor(self.read(_name, _like), name=_name)

                tensor = ir.LazyTensor(
                    read, dtype=known.dtype, shape=ir.Shape(known.shape.numpy()), name=name
                )
                if name in self._rows:
                    note_rows(tensor, [self._rows[name]])
                value.const_value = tensor


def _parameters(module: Any) -> Iterator[tuple[Any, str, str, Any]]:
    """Owner, name there, full name and parameter; a tied one comes again, under the name it had first."""
    names: dict[int, str] = {}
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                full = names.setdefault(id(parameter), f"{path}.{name}" if path else name)
                yield owner, name, full, parameter


@contextlib.contextmanager
def stand_ins(module: torch.nn.Module) -> Iterator[None]:
    """While open, weights without memory are tensors on the CPU that nobody has written to.

    Such a tensor takes addresses, not memory, until it is touched, and tracing does not touch it.
    """
    import torch

    made: dict[int, Any] = {}
    places = [place for place in _parameters(module) if place[3].is_meta]
    for owner, name, _, parameter in places:
        if id(parameter) not in made:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
        owner._parameters[name] = made[id(parameter)]
    try:
        yield
    finally:
        for owner, name, _, parameter in places:
            owner._parameters[name] = parameter


def skeleton(build: Callable[[], Any]) -> Any | None:
    """Builds a module whose parameters have no memory; None where that is not possible.

    Buffers, such as rotary frequencies, are computed as always: they are not in the files.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unallocated(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            options = dict(kwargs or {})
            if func is torch.empty and options.get("device") is None:
                options["device"] = "meta"
            return func(*args, **options)

    with Unallocated(), torch.no_grad():
        module = build()
    made: dict[int, Any] = {}
    for owner, name, _, parameter in list(_parameters(module)):
        if id(parameter) not in made:
            made[id(parameter)] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        owner._parameters[name] = made[id(parameter)]
    if any(buffer.is_meta for buffer in module.buffers()):
        return None
    persistent = module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
    return None if persistent else module


def safetensors_weights(directory: Path, module: torch.nn.Module) -> StoredWeights | None:
    """The weights of a module from the safetensors files of a directory.

    Returns:
        None where a weight is missing under its own name, or has another shape, or there are weights of more
        layers than the module has, or a file cannot be read: transformers then loads the model, which renames
        and converts, or says what is wrong.
    """
    entries = _directory_entries(directory)
    if entries is None or surplus_layers(entries, module):
        return None
    readers, rows = {}, {}
    for _, _, full, parameter in _parameters(module):
        if full not in entries or entries[full][2] != tuple(parameter.shape):
            return None
        readers[full] = _mapped_reader(*entries[full])
        if parameter.ndim == 2:
            rows[full] = StoredRows(entries[full][0], full, np.arange(len(parameter)))
    return StoredWeights(readers, where=str(directory), rows=rows)


def stored_matrices(directory: Path) -> list[StoredMatrix]:
    """The matrices in the safetensors files of a directory; none where these cannot be read."""
    return [
        StoredMatrix(file, name, dtype, (shape[0], shape[1]), offset)
        for name, (file, dtype, shape, offset) in (_directory_entries(directory) or {}).items()
        if len(shape) == 2 and min(shape) > 1 and dtype != "float64"
    ]


def _directory_entries(directory: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int]] | None:
    """File, element type, shape and offset by name; None where a file cannot be read."""
    try:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            files = {"model.safetensors"}
        entries: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for file in sorted(files):
            if Path(file).name != file:
                return None
            entries |= _safetensors_entries(directory / file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entries


def surplus_layers(names: Iterable[str], module: torch.nn.Module) -> list[str]:
    """Of names of weights, those of layers after the last one that a module has of their list.

    Without those that the architecture leaves out, such as layers that guess more than one token.
    """
    lists = {name: len(part) for name, part in module.named_modules() if type(part).__name__ == "ModuleList"}
    left_out = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = []
    for name in names:
        if any(re.search(pattern, name) for pattern in left_out):
            continue
        parts = name.split(".")
        for place, part in enumerate(parts):
            count = lists.get(".".join(parts[:place])) if part.isdecimal() else None
            if count is not None and int(part) >= count > 0:
                found.append(name)
    return sorted(found)


def _safetensors_entries(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int]]:
    """Path, element type, shape and offset by name. The format: https://github.com/huggingface/safetensors."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("header length")
        header = json.loads(stream.read(length))
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if entry["dtype"] not in _TYPES:
            continue
        width = {"F64": 8, "F32": 4}.get(entry["dtype"], 2)
        offset = 8 + length + begin
        if begin < 0 or end - begin != width * math.prod(shape) or 8 + length + end > size:
            raise ValueError("offsets")
        entries[name] = (path, _TYPES[entry["dtype"]], shape, offset)
    return entries


def _mapped_reader(path: Path, dtype: str, shape: tuple[int, ...], offset: int) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        import torch

        kind: torch.dtype = getattr(torch, dtype)
        if not math.prod(shape):
            return torch.empty(shape, dtype=kind)
        # A private mapping: writing to the tensor does not write to the file.
        data = np.memmap(path, np.uint8, "c", offset, (kind.itemsize * math.prod(shape),))
        return torch.from_numpy(data).view(kind).reshape(shape)

    return read


@contextlib.contextmanager
def quick_gguf() -> Iterator[None]:
    """Lets transformers read GGUF files in a third of the time, with the same results.

    It builds the whole map of names anew for each submodule, and reads each word of the header through
    ``np.memmap``, whose slices are a hundred times as costly as those of an array.
    """
    package: Any = importlib.import_module("gguf")
    reader, name_map = package.GGUFReader, package.get_tensor_name_map

    class Reader(reader):  # type: ignore[misc,valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            import numpy as np

            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

    package.GGUFReader, package.get_tensor_name_map = Reader, functools.lru_cache(name_map)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, name_map


def gguf_weights(gguf: GgufFile, module: Any) -> StoredWeights | None:
    """The weights of a module from a GGUF file, dequantised one at a time, as transformers does it.

    Returns:
        None where transformers has no plain mapping from the file's tensors to the module's weights.
    """
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    try:
        architecture = gguf.metadata.get("general.architecture")
        kind = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
        processor = kind(config=module.config.to_dict())
        map_names = reading.get_gguf_hf_weights_map
        # transformers 5 lets the processor of an architecture have a say in the names.
        takes_processor = "processor" in inspect.signature(map_names).parameters
        with quick_gguf():
            names = map_names(module, processor) if takes_processor else map_names(module)
    except (AttributeError, TypeError, NotImplementedError):
        return None
    if kind.__name__ not in _PLAIN_PROCESSORS:
        return None
    readers = {
        names[tensor.name]: _gguf_reader(gguf, tensor, processor, names)
        for tensor in gguf.tensors
        if tensor.name in names
    }
    if any(full not in readers for _, _, full, _ in _parameters(module)):
        return None
    rows = {
        names[tensor.name]: StoredRows(gguf.path, tensor.name, order)
        for tensor in gguf.tensors
        if tensor.name in names and (order := _row_order(tensor, processor, names)) is not None
    }
    return StoredWeights(readers, where=str(gguf.path), rows=rows)


def _row_order(tensor: Any, processor: Any, names: Mapping[str, str]) -> Any | None:
    """Which row of a tensor each row of the weight is; None where the weight is not the tensor's rows.

    Found by letting transformers' conversion work on a column of the numbers of rows.
    """
    if len(tensor.shape) != 2:
        return None
    numbers = np.arange(tensor.shape[0])
    processed = processor.process(
        weights=numbers[:, None],
        name=tensor.name,
        tensor_key_mapping=names,
        parsed_parameters={"tensors": {}},
    ).weights
    if processed.shape != (len(numbers), 1) or processed.dtype != numbers.dtype:
        return None
    order = processed.reshape(-1).copy()
    return order if np.array_equal(np.sort(order), numbers) else None


def _gguf_reader(gguf: Any, tensor: Any, processor: Any, names: Mapping[str, str]) -> Callable[[], Any]:
    def read() -> Any:
        import torch
        from gguf import GGMLQuantizationType, dequantize

        rows = math.prod(tensor.shape[:-1])
        data = np.memmap(gguf.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        blocks = data.reshape(*tensor.shape[:-1], tensor.nbytes // rows)
        kind = GGMLQuantizationType[tensor.type]
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(tensor.type)
        weights = blocks.view(plain) if plain else blocks
        processed = processor.process(
            weights=dequantize(weights, kind),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": {}},
        )
        return torch.from_numpy(np.array(processed.weights))

    return read
