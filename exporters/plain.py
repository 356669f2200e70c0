"""Any ``nn.Module`` with example inputs: its flat signature, found by running it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, OnnxsmithError, require
from onnxsmith.exporters.axes import find_axes, resized
from onnxsmith.exporters.flattening import flatten, rebuild
from onnxsmith.exporters.tracing import line_of, silence
from onnxsmith.package import TensorSpec
from onnxsmith.program import TorchProgram

if TYPE_CHECKING:
    import torch

    from onnxsmith.exporters.loading import LoadedModel

__all__ = ["fix_axes", "flat_program", "module_program"]


def module_program(loaded: LoadedModel) -> TorchProgram:
    """The module behind a flat signature.

    Nested inputs and outputs get dotted names (``state.0``, ``hidden_states.1``); dynamic axes are found by
    running the module with other sizes and are named after their meaning (``batch``, ``sequence``,
    ``height``).

    Raises:
        ExportError: It does not run on its example inputs, or returns no tensor.
    """
    module = loaded.module
    where = type(module).__name__
    examples = {
        name: tensor
        for parameter, value in loaded.inputs.items()
        for name, tensor in flatten(parameter, value, where=where, kind="input")
    }
    call = _caller(module, loaded.inputs)
    return flat_program(module, call, examples, name=where, task=loaded.task)


def flat_program(
    module: torch.nn.Module,
    call: Callable[[torch.nn.Module, dict[str, Any]], Any],
    examples: Mapping[str, torch.Tensor],
    *,
    name: str,
    task: str | None = None,
    keep: Callable[[str], bool] | None = None,
    static: Collection[tuple[str, int]] = (),
) -> TorchProgram:
    """The program of a module that is called on named tensors.

    Args:
        module: What is traced.
        call: Calls the module on tensors by name.
        examples: Inputs that run.
        name: For messages.
        task: The task.
        keep: Which outputs are wanted, by name; all where None.
        static: Axes of inputs, by name and number, that are known to have one size.

    Raises:
        ExportError: It does not run on its example inputs, or returns no tensor.
    """
    torch = require("torch", purpose="exporting")
    named = _named_outputs(module, call, name, keep)
    # What it keeps of its inputs, such as a table for their length, would be a fact while it is traced.
    ran = named if _is_lazy(module) else _twin(named)
    with _same_randomness():
        first = _first_run(ran, examples, name)
    named.changed_inputs = ran.changed_inputs
    if not first:
        raise ExportError(name, got="forward() returns no tensor", expected="at least one")

    def run(tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            results: dict[str, Any] = _twin(named)(**tensors)
        return results

    if task is None:
        _refuse_memory(ran, examples, first, name)
    # What is only tried may fail: torch.cond says so on the terminal.
    with _same_randomness(), silence():
        axes = find_axes(run, examples, static=static)
    inputs = tuple(
        TensorSpec(key, str(t.dtype).removeprefix("torch."), axes.inputs[key])
        for key, t in axes.examples.items()
    )
    outputs = tuple(
        TensorSpec(key, str(t.dtype).removeprefix("torch."), axes.outputs.get(key))
        for key, t in first.items()
    )
    return TorchProgram(
        named,
        inputs,
        outputs,
        axes.examples,
        task=task,
        name=name,
        limits={key: max(int(t.max()) + 1, 1) for key, t in examples.items() if _is_integer(t) and t.numel()},
        axis_limits=axes.limits,
        natural_sizes=axes.natural,
    )


def _refuse_memory(
    named: Any, examples: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor], where: str
) -> None:
    """Refuses a module whose second run gives something else than its first, with the same random numbers.

    Args:
        named: What ran once.
        examples: What it ran on.
        first: What it gave.
        where: For messages.

    Raises:
        ExportError: It does.
    """
    import torch

    twin = _twin(named)
    before = {name: (id(buffer), buffer._version) for name, buffer in twin.inner.named_buffers()}
    with _same_randomness(), torch.no_grad():
        second = twin(**{name: tensor.clone() for name, tensor in examples.items()})
    for name, tensor in first.items():
        again = second.get(name)
        if again is not None and again.shape == tensor.shape and _alike(tensor, again):
            continue
        after = {key: (id(buffer), buffer._version) for key, buffer in twin.inner.named_buffers()}
        changed = sorted(key for key, state in after.items() if before.get(key) != state)
        raise ExportError(
            where,
            got=f"forward() changes its buffer {', '.join(changed[:3])}"
            if changed
            else f"forward() gives another {name} when it is called again with the same inputs",
            expected="a module without state",
            remedy="Take what it remembers as an input and return it as an output",
        )


def _is_lazy(module: torch.nn.Module) -> bool:
    """Whether its first run gives it parameters."""
    from torch.nn.parameter import is_lazy

    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for rounding: sums in threads may be in another order."""
    import torch

    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _twin(module: Any) -> Any:
    """A module with the same tensors and attributes of its own.

    Some keep what they saw of their inputs, such as a window that was too large for an image: what is only
    tried must not change the model.
    """
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, shared)
    # Attributes that cannot be copied: files, locks, modules of C.
    except Exception:
        return module


def fix_axes(program: TorchProgram, names: set[str]) -> None:
    """Makes sizes of dynamic axes: those that the example inputs had."""
    for spec in program.inputs:
        for axis, size in enumerate(spec.shape or ()):
            if size in names:
                program.examples[spec.name] = resized(
                    program.examples[spec.name], axis, program.natural_sizes[str(size)]
                )
    sizes = {name: program.natural_sizes[name] for name in names}
    program.inputs = tuple(_fixed(spec, sizes) for spec in program.inputs)
    program.outputs = tuple(_fixed(spec, sizes) for spec in program.outputs)
    program.axis_limits = {k: v for k, v in program.axis_limits.items() if k not in names}


def _fixed(spec: TensorSpec, sizes: Mapping[str, int]) -> TensorSpec:
    if spec.shape is None:
        return spec
    return TensorSpec(spec.name, spec.dtype, tuple(sizes.get(str(a), a) for a in spec.shape))


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and str(tensor.dtype) != "torch.bool"


def _caller(
    module: torch.nn.Module, inputs: Mapping[str, Any]
) -> Callable[[torch.nn.Module, dict[str, Any]], Any]:
    """What calls ``forward`` with the example's structure, positional where its parameters are."""
    kinds = {name: p.kind for name, p in inspect.signature(module.forward).parameters.items()}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    # A parameter before *args cannot be given by name.
    by_place = any(kinds.get(name) in positional for name in inputs)

    def call(module: torch.nn.Module, tensors: dict[str, Any]) -> Any:
        given = {name: rebuild(name, value, tensors) for name, value in inputs.items()}
        args: list[Any] = []
        for name in list(given) if by_place else ():
            kind = kinds.get(name)
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args += given.pop(name)
            elif kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
                args.append(given.pop(name))
        return module(*args, **given)

    return call


def _named_outputs(
    module: torch.nn.Module,
    call: Callable[[torch.nn.Module, dict[str, Any]], Any],
    where: str,
    keep: Callable[[str], bool] | None,
) -> torch.nn.Module:
    import torch

    class Named(torch.nn.Module):
        """Takes tensors by name, gives tensors by name, and leaves those that it takes as they are."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.changed_inputs: frozenset[str] = frozenset()

        def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            given = {n: t.clone() if n in self.changed_inputs else t for n, t in tensors.items()}
            with _as_traced():
                result = call(self.inner, given)
            # A graph has one name space: an output may not be called as an input is.
            return {
                f"{name}_output" if name in tensors else name: tensor
                for name, tensor in flatten("", result, where=where)
                if keep is None or keep(name)
            }

    return Named().eval()


def _first_run(named: Any, examples: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Runs the module once, and finds out which of its inputs it writes to."""
    import torch

    tensors = {name: tensor.clone() for name, tensor in examples.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            results: dict[str, torch.Tensor] = named(**tensors)
    except (OnnxsmithError, MemoryError):
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ExportError(
            where,
            got=f"forward() fails on the example inputs{line_of(error)}: {type(error).__name__}: {text}",
            expected="example inputs that run",
        ) from error
    # A graph's inputs are constant: what is written to is a copy.
    named.changed_inputs = frozenset(n for n, t in tensors.items() if t._version != versions[n])
    return results


@contextlib.contextmanager
def _as_traced() -> Iterator[None]:
    """Turns off torch's fast path of attention, which cannot be traced and differs where all is padding."""
    from torch.backends import mha

    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    import torch

    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
