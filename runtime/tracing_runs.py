"""Every intermediate tensor of a model, in pieces that fit in memory: of an ONNX graph and of PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import require
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.backend import Backend
from onnxsmith.runtime.graph_parts import GIVEN_SUFFIX, GivenValue, GraphValues, build_part
from onnxsmith.runtime.samples import Case, numpy_dtype
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.tensor_store import TensorStore

if TYPE_CHECKING:
    import torch

__all__ = ["Forced", "Weighted", "trace_graph", "trace_torch", "weighted_nodes", "without_wrappers"]

# Outputs that are tapped at once, at most. They are held in memory together, and each piece costs a session.
_GROUP = 64
_GROUP_BYTES = 256e6
# Of the first piece, before anything is known of how large outputs are.
_FIRST = 16


@dataclasses.dataclass(frozen=True)
class Weighted:
    """What is computed with a weight: the key to the same place in another graph.

    Attributes:
        output: Name of the result.
        input: Name of the tensor that it is computed from; None where that is not known.
    """

    output: str
    input: str | None = None


@dataclasses.dataclass(frozen=True)
class Forced:
    """A value that is replaced before anything reads it.

    Attributes:
        value: Its type, as the graph has it.
        array: Gives the replacement for the number of a case.
    """

    value: GivenValue
    array: Callable[[int], Array]


def trace_graph(
    values: GraphValues,
    backend: Backend[ModelPackage],
    cases: Sequence[Case],
    store: TensorStore,
    *,
    forced: Mapping[str, Forced] | None = None,
    group: int = _GROUP,
    group_bytes: float = _GROUP_BYTES,
    on_piece: Callable[[int, int], None] | None = None,
    kernels: dict[str, str] | None = None,
    of: str = "the graph",
) -> None:
    """Runs a graph piece by piece and keeps every floating-point value.

    A piece holds only its own weights, so the whole model is never in memory.

    Args:
        values: Of the graph.
        backend: What runs the pieces.
        cases: Inputs.
        store: Takes the tensors.
        forced: Values that each node which reads one is given in place of what was computed. Without, every
            piece goes on with what the pieces before it computed.
        group: Values that a piece computes, at most.
        group_bytes: About the most bytes that they have together, judged by the piece before.
        on_piece: Called with the values done and their number, for progress.
        kernels: Takes the nodes that ran in the pieces, where the backend records them; see
            ``OrtSession.kernels``.
        of: What the graph is called in messages.
    """
    given: dict[str, Forced] = dict(forced or {})
    done, count = 0, min(group, _FIRST)
    while wanted := values.names[done : done + count]:
        part = build_part(values.model, given={n: f.value for n, f in given.items()}, outputs=wanted)
        taken = {spec.name for spec in part.main.inputs}
        largest = 1
        with backend.open(part, name=f"a part of {of}") as session:
            for index, case in enumerate(cases):
                feeds = {name: array for name, array in case.feeds.items() if name in taken}
                for name, source in given.items():
                    key = f"{name}{GIVEN_SUFFIX}"
                    if key in taken:
                        feeds[key] = source.array(index).astype(numpy_dtype(source.value.dtype), copy=False)
                results = session.run(feeds)
                largest = max(largest, sum(array.nbytes for array in results.values()))
                for name, array in results.items():
                    store.put(name, index, array, case)
                del results
            if kernels is not None:
                kernels.update(session.kernels())
        if forced is None:
            given |= {name: _as_computed(store, name) for name in wanted if name in store}
        done += len(wanted)
        count = max(1, min(group, int(group_bytes * len(wanted) / largest)))
        if on_piece is not None:
            on_piece(done, len(values.names))


def _as_computed(store: TensorStore, name: str) -> Forced:
    first = store.get(name, 0)
    return Forced(GivenValue(first.dtype, len(first.shape)), lambda case: store.get(name, case).load())


def weighted_nodes(values: GraphValues) -> dict[str, Weighted]:
    """Name of a weight to what a graph computes with it, where only one node does."""
    found: dict[str, list[Weighted]] = {}
    for name in values.names:
        node = values.producers[name]
        if node.outputs[0].name != name or values.does_more(node):
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name:
                inputs = values.inputs_of(node)
                found.setdefault(value.name, []).append(Weighted(name, inputs[0] if inputs else None))
    return {name: uses[0] for name, uses in found.items() if len(uses) == 1}


def trace_torch(
    session: Session, module: torch.nn.Module, cases: Sequence[Case], store: TensorStore
) -> dict[str, Weighted]:
    """Runs a PyTorch model and keeps the result of every operator that computes floating-point numbers.

    A result is called after the module in which it was computed: ``model.layers.0.mlp/mul#0``.

    Args:
        session: The model, open.
        module: Its module, which gets hooks as long as it runs.
        cases: Inputs.
        store: Takes the tensors, and the outputs of the session under their own names.

    Returns:
        Path of a module with weights of its own to the tensors that it gave and took.
    """
    require("torch", purpose="tracing a PyTorch model")
    path: list[str] = [""]
    outputs: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for index, case in enumerate(cases):
        recorder = _recorder(path, lambda name, array: store.put(name, index, array, case))  # noqa: B023
        with _paths(module, path, recorder, inputs, outputs), recorder:
            results = session.run(case.feeds)
        for name, array in results.items():
            store.put(name, index, array, case)
    owners = {
        without_wrappers(name)
        for name, one in module.named_modules()
        if next(one.parameters(recurse=False), None) is not None
    }
    return {of: Weighted(name, inputs.get(of)) for of, name in outputs.items() if of in owners}


def _recorder(path: list[str], keep: Callable[[str, Array], None]) -> Any:
    """A mode of torch's dispatcher that names the result of each operator and keeps it."""
    import torch
    from torch.utils import _python_dispatch as dispatch

    class Recorder(dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.counts: Counter[str] = Counter()
            # By identity, as long as the tensor lives: two tensors are never compared.
            self.known: dict[int, tuple[weakref.ref[Any], str]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not _is_view(func):
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    self.name_of(tensor, func.overloadpacket.__name__, again=True)
            return result

        def name_of(self, tensor: Any, operator: str, *, again: bool = False) -> str | None:
            """The name of a tensor; one that is not known, or is new ``again``, is kept."""
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.numel():
                return None
            reference, known = self.known.get(id(tensor), (None, ""))
            if not again and reference is not None and reference() is tensor:
                return known
            place = f"{path[-1]}/{operator}"
            name = f"{place}#{self.counts[place]}"
            self.counts[place] += 1
            with dispatch._disable_current_modes():
                plain = tensor.detach()
                plain = plain.float() if plain.dtype == torch.bfloat16 else plain
                keep(name, plain.contiguous().numpy())
            self.known[id(tensor)] = (weakref.ref(tensor), name)
            return name

    return Recorder()


def _is_view(function: Any) -> bool:
    """Whether an operator gives back memory that was there before."""
    if function.overloadpacket.__name__ in ("_unsafe_view", "detach"):
        return True
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in function._schema.returns
    )


@contextlib.contextmanager
def _paths(
    module: torch.nn.Module, path: list[str], recorder: Any, inputs: dict[str, str], outputs: dict[str, str]
) -> Iterator[None]:
    """Keeps the path of the module that is running at the end of a list, and notes what goes in and out."""
    handles = []

    def watch(name: str, one: torch.nn.Module) -> None:
        def enter(_: Any, arguments: tuple[Any, ...]) -> None:
            path.append(name)
            taken = recorder.name_of(arguments[0], "input") if arguments else None
            if taken:
                inputs[name] = taken

        def leave(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            given = recorder.name_of(first, "output")
            if given:
                outputs[name] = given
            path.pop()

        handles.append(one.register_forward_pre_hook(enter))
        handles.append(one.register_forward_hook(leave))

    for name, one in module.named_modules():
        clean = without_wrappers(name)
        if clean:
            watch(clean, one)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_wrappers(name: str) -> str:
    """A module's path in the user's model; what wraps it to give it a flat signature is called ``inner``."""
    parts = name.split(".")
    while parts and parts[0] == "inner":
        parts = parts[1:]
    return ".".join(parts)
