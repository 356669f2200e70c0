"""Models without a cache: encoders from Hugging Face directories, and any ``nn.Module``."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, OnnxsmithError, require
from onnxsmith.exporters.tracing import line_of
from onnxsmith.package import TensorSpec
from onnxsmith.program import TorchProgram

if TYPE_CHECKING:
    import torch

    from onnxsmith.exporters.loading import LoadedModel

__all__ = ["plain_program"]

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 2, 7


def plain_program(loaded: LoadedModel) -> TorchProgram:
    """The model behind a flat signature, found by running it once on its example inputs.

    Outputs that are dicts, dataclasses or sequences are flattened: ``last_hidden_state``,
    ``hidden_states.0``. Axis 0 of every tensor is the batch; axis 1 of a text encoder is the sequence;
    axes of a plain module that change with nothing are sizes.

    Raises:
        ExportError: It does not run on its example inputs, or returns no tensor.
    """
    if loaded.task is None:
        return _module_program(loaded)
    return _text_program(loaded)


def _text_program(loaded: LoadedModel) -> TorchProgram:
    import torch

    model: Any = loaded.module
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in _TEXT_INPUTS if name in accepted]
    wanted = json.loads(loaded.files.get("tokenizer_config.json", b"{}")).get("model_input_names")
    if wanted:
        names = [name for name in names if name in wanted]
    if "token_type_ids" in names and getattr(model.config, "type_vocab_size", 0) < 2:
        names.remove("token_type_ids")
    if "input_ids" not in names:
        raise ExportError(
            type(model).__name__,
            got=f"forward() takes {', '.join(list(accepted)[:5])}",
            expected="a text model that takes input_ids",
            remedy="Wrap it in a factory with example inputs and name that as package.module:factory",
        )
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    shape = (_EXAMPLE_BATCH, _EXAMPLE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    makers = {
        "input_ids": lambda: torch.randint(0, vocabulary, shape, generator=generator),
        "attention_mask": lambda: torch.ones(shape, dtype=torch.int64),
        "token_type_ids": lambda: torch.zeros(shape, dtype=torch.int64),
    }
    examples = {name: makers[name]() for name in names}
    axes: tuple[str, ...] = ("batch", "sequence")
    inputs = tuple(TensorSpec(name, "int64", axes) for name in names)
    program = _finish(loaded, inputs, examples, {_EXAMPLE_BATCH: "batch", _EXAMPLE_LENGTH: "sequence"})
    program.limits |= {"input_ids": vocabulary}
    if "token_type_ids" in names:
        program.limits["token_type_ids"] = int(model.config.type_vocab_size)
    return program


def _module_program(loaded: LoadedModel) -> TorchProgram:
    import torch

    examples = dict(loaded.inputs)
    batches = {int(t.shape[0]) for t in examples.values() if t.ndim}
    if batches == {1}:
        # torch takes a size of one for a constant: trace with two rows, so that the batch stays free.
        examples = {n: torch.cat([t, t]) if t.ndim else t for n, t in examples.items()}
        batches = {2}
    shared = batches.pop() if len(batches) == 1 else None
    inputs = tuple(
        TensorSpec(
            name,
            str(t.dtype).removeprefix("torch."),
            tuple(
                "batch" if axis == 0 and size == shared else size
                for axis, size in enumerate(map(int, t.shape))
            ),
        )
        for name, t in examples.items()
    )
    names = {} if shared is None else {shared: "batch"}
    program = _finish(loaded, inputs, examples, names, batch_only=True)
    program.limits |= {n: max(int(t.max()) + 1, 1) for n, t in examples.items() if not t.is_floating_point()}
    return program


def _finish(
    loaded: LoadedModel,
    inputs: tuple[TensorSpec, ...],
    examples: dict[str, torch.Tensor],
    axis_names: dict[int, str],
    *,
    batch_only: bool = False,
) -> TorchProgram:
    torch = require("torch", purpose="exporting")
    module = _named_outputs(loaded.module, loaded.task is not None)
    name = type(loaded.module).__name__
    try:
        with torch.no_grad():
            results = module(**examples)
    except OnnxsmithError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ExportError(
            name,
            got=f"forward() fails on the example inputs{line_of(error)}: {type(error).__name__}: {text}",
            expected="example inputs that run",
        ) from error
    if not results:
        raise ExportError(name, got="forward() returns no tensor", expected="at least one")

    def axis(position: int, size: int) -> int | str:
        return axis_names.get(size, size) if position == 0 or not batch_only else size

    outputs = tuple(
        TensorSpec(
            output,
            str(t.dtype).removeprefix("torch."),
            tuple(axis(i, int(size)) if i < 2 else int(size) for i, size in enumerate(t.shape)),
        )
        for output, t in results.items()
    )
    return TorchProgram(module, inputs, outputs, examples, task=loaded.task, name=name)


def _named_outputs(module: torch.nn.Module, is_transformers: bool) -> torch.nn.Module:
    import torch

    options: dict[str, Any] = {}
    if is_transformers:
        options["return_dict"] = True
        # A decoder that is asked for features would give its cache as outputs.
        if "use_cache" in inspect.signature(module.forward).parameters:
            options["use_cache"] = False

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            result = self.inner(**tensors, **options)
            # A graph has one name space: an output may not be called as an input is.
            return {
                f"{name}_output" if name in tensors else name: tensor
                for name, tensor in _flatten("", result, type(module).__name__)
            }

    return Named().eval()


def _flatten(name: str, value: Any, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an output by dotted name: ``hidden_states.0``, and ``output_0`` for a bare number.

    Raises:
        ExportError: Something that may hold tensors and cannot be looked into.
    """
    import torch

    if isinstance(value, torch.Tensor):
        yield name or "output", value
        return
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        parts = [(str(index) if name else f"output_{index}", part) for index, part in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        raise ExportError(
            where,
            got=f"output {name or 'of forward()'} is a {type(value).__name__}",
            expected="tensors in tuples, lists, dicts or dataclasses",
            remedy="Wrap the module so that forward() returns tensors",
        )
    for key, part in parts:
        yield from _flatten(f"{name}.{key}" if name else key, part, where)
