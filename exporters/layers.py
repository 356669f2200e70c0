"""Which layers of a decoder are alike, found by watching one forward pass on tensors without data.

Layers are taken for alike only if they run the same operators with the same arguments: their own weights and
cache, the hidden state that the layer before them made, and tensors from outside that are the very same.
Nothing is concluded from names or configurations, so a layer with another window, another mask or another
scale is another kind. A model in which anything else flows between layers is not taken apart at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import OnnxsmithError
from onnxsmith.exporters.decomposition import without_autocast

if TYPE_CHECKING:
    import torch

__all__ = [
    "ENTRY",
    "EXIT",
    "MARKER_DOMAIN",
    "LayerKinds",
    "NotAlikeError",
    "layer_kinds",
    "on_meta",
    "shortened",
]

MARKER_DOMAIN = "onnxsmith"
ENTRY, EXIT = "LayerEntry", "LayerExit"
# A constant of at most this many elements is compared by its value.
_SMALL = 4096


class NotAlikeError(Exception):
    """The decoder cannot be taken apart into layers; the text says why. Never leaves this package."""


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """The layers of a decoder.

    Attributes:
        path: Where the list of layers is in the model, such as ``model.layers``.
        first: For each layer, the first layer that is like it.
        length: Number of elements of the tuple that a layer returns; 0 where it returns a tensor.
    """

    path: str
    first: tuple[int, ...]
    length: int

    @property
    def distinct(self) -> list[int]:
        """The first layer of each kind, in order."""
        return sorted(set(self.first))

    def prefix(self, layer: int) -> str:
        """What the names of a layer's weights begin with."""
        return f"{self.path}.{layer}."


def layer_kinds(
    model: Any, count: int, run: Callable[[Any], Mapping[str, Any]], inputs: Mapping[str, torch.Tensor]
) -> LayerKinds:
    """Runs the model once on tensors without data and says which layers are alike.

    Args:
        model: The decoder.
        count: How many layers have a cache.
        run: Runs the decoder on named tensors and gives its outputs by name.
        inputs: Example inputs.

    Raises:
        NotAlikeError: The layers cannot be told apart from the rest of the model, or none is like another.
    """
    path, layers = _layer_list(model, count)
    try:
        recorder = _record(model, path, layers, count, run, inputs, meta=True)
    except (NotAlikeError, OnnxsmithError):
        raise
    except Exception:
        # Some models ask for values or mix devices; tensors that only pretend to be on the CPU are slower.
        try:
            recorder = _record(model, path, layers, count, run, inputs, meta=False)
        except (NotAlikeError, OnnxsmithError):
            raise
        except Exception as error:
            raise NotAlikeError(f"it does not run without data: {type(error).__name__}") from error
    firsts: dict[Any, int] = {}
    first = tuple(firsts.setdefault(tuple(recorder.logs[i]), i) for i in range(count))
    if len(firsts) == count:
        raise NotAlikeError("no two layers are alike")
    return LayerKinds(path, first, recorder.length)


def _record(
    model: Any,
    path: str,
    layers: Any,
    count: int,
    run: Callable[[Any], Mapping[str, Any]],
    inputs: Mapping[str, torch.Tensor],
    *,
    meta: bool,
) -> Any:
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if meta:
            stack.enter_context(on_meta(model))
        else:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in inputs.items()}
        recorder = _recorder(_owners(model, path), tensors, count)
        stack.enter_context(_watched(layers, recorder))
        stack.enter_context(_noted_constants(recorder))
        with recorder:
            outputs = run(tensors)
        recorder.finish(outputs)
    return recorder


@contextlib.contextmanager
def on_meta(module: Any) -> Iterator[None]:
    """Puts stand-ins without data in the place of all parameters and buffers while open.

    New tensors have no data either. Autocast, which does not know that device, is left out.
    """
    import torch

    made: dict[int, Any] = {}
    places = [
        (tensors, name, tensor)
        for owner in module.modules()
        for tensors in (owner._parameters, owner._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    # Some modules keep tensors that are neither, and move them to where they are called.
    kept = [
        (vars(owner), name, value)
        for owner in module.modules()
        for name, value in vars(owner).items()
        if isinstance(value, torch.Tensor)
    ]
    for tensors, name, tensor in places:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        tensors[name] = made[id(tensor)]
    try:
        with torch.device("meta"), without_autocast():
            yield
    finally:
        for tensors, name, tensor in (*places, *kept):
            tensors[name] = tensor


@contextlib.contextmanager
def _noted_constants(recorder: Any) -> Iterator[None]:
    """Adds the values of constants that a layer makes to its log: no operator has them as arguments."""
    import torch
    from torch.overrides import TorchFunctionMode

    makers = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}

    class Constants(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            if func in makers and recorder.current is not None:
                values = [value for value in args if not isinstance(value, torch.Tensor)]
                recorder.logs[recorder.current].append((func.__name__, repr(values)))
            return func(*args, **(kwargs or {}))

    with Constants():
        yield


def _layer_list(model: Any, count: int) -> tuple[str, Any]:
    import torch

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count > 1
    ]
    # Lists inside the layers (of experts, say) may have the same length by chance.
    outer = [pair for pair in found if not any(pair[0].startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise NotAlikeError(f"{len(outer)} lists of {count} layers")
    return outer[0]


def _owners(model: Any, path: str) -> dict[int, tuple[int | None, str]]:
    """For each weight and buffer, by identity, the layer that has it, and its name there."""
    owners: dict[int, tuple[int | None, str]] = {}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        inside = name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else ""
        index, _, rest = inside.partition(".")
        owner = (int(index), rest) if inside else (None, name)
        known = owners.setdefault(id(tensor), owner)
        if known[0] != owner[0]:
            raise NotAlikeError(f"{name} is shared between layers")
    return owners


@contextlib.contextmanager
def _watched(layers: Any, recorder: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):

            def forward(*args: Any, _index: int = index, _inner: Any = layer.forward, **options: Any) -> Any:
                recorder.enter(_index, args, options)
                result = _inner(*args, **options)
                recorder.leave(_index, result)
                return result

            stack.enter_context(_replaced_forward(layer, forward))
        yield


@contextlib.contextmanager
def _replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _hidden(args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return args[0] if args else options.get("hidden_states")


def _recorder(
    owners: dict[int, tuple[int | None, str]], tensors: Mapping[str, torch.Tensor], count: int
) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    plain = frozenset({bool, int, float, str, torch.dtype, torch.device, type(None)})
    bare = (torch.Tensor, torch.nn.Parameter)
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.logs: list[list[Any]] = [[] for _ in range(count)]
            self.current: int | None = None
            self.done = -1
            self.hidden: Any = None
            self.last: Any = None
            self.length = -1
            # By identity; the tensors are kept, or an identity would be used again.
            self.made: dict[int, tuple[int | None, int]] = {}
            self.kept: list[Any] = list(tensors.values())
            self.symbols: dict[str, int] = {}
            # What an operator gave for arguments of these sizes: the layers repeat each other.
            self.known: dict[Any, tuple[type | None, list[Any]]] = {}
            self.past = {}
            for name, tensor in tensors.items():
                if name.startswith("past_key_values."):
                    _, layer, part = name.split(".")
                    self.past[id(tensor)] = (int(layer), part)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            form: list[Any] = []
            given: list[Any] = []
            self.take_apart(args, form, given)
            if kwargs:
                self.take_apart(kwargs, form, given)
            described = (func, tuple(form))
            names = tuple(map(self.describe_tensor, given))
            result, results = self.result(func, args, kwargs or {}, described, given)
            if self.current is not None:
                self.logs[self.current].append((described, names, results))
            return result

        def take_apart(self, value: Any, form: list[Any], found: list[Any]) -> None:
            """Adds an argument to a form, in which tensors are left out and added to a list instead."""
            kind = type(value)
            if kind in plain:
                # With the type: 1, 1.0 and True are equal.
                form.append((kind, value))
            elif isinstance(value, torch.Tensor):
                form.append(torch.Tensor)
                found.append(value)
            elif kind in (tuple, list, torch.Size, dict):
                form.append((kind, len(value)))
                for one in value:
                    if kind is dict:
                        form.append(str(one))
                        one = value[one]  # the value in the place of its key
                    self.take_apart(one, form, found)
            else:
                form.append(self.describe(value))

        def result(self, func: Any, args: Any, kwargs: Any, described: Any, given: list[Any]) -> Any:
            """What an operator gives; tensors without data are made anew where their sizes are known."""
            key = None
            if given and all(type(x) in bare and x.is_meta for x in given):
                sizes = tuple((x.shape, x.stride(), x.dtype, x.storage_offset()) for x in given)
                key = (described, sizes)
                known = self.known.get(key)
                if known is not None:
                    sequence, forms = known
                    new = []
                    for size, stride, dtype in forms:
                        tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
                        self.keep(tensor)
                        new.append(tensor)
                    return (sequence(new) if sequence else new[0]), self.sizes(new)
            result = func(*args, **kwargs)
            sequence = type(result) if type(result) in (tuple, list) else None
            every = list(result) if sequence else [result]
            if key is not None and all(
                type(x) is torch.Tensor and x.is_meta and not any(x is y for y in given) for x in every
            ):
                self.known[key] = (sequence, [(x.shape, x.stride(), x.dtype) for x in every])
            tensors = [x for x in every if isinstance(x, torch.Tensor)]
            for tensor in tensors:
                if id(tensor) not in self.made and not self.is_input(tensor):
                    self.keep(tensor)
            return result, self.sizes(tensors)

        def keep(self, tensor: Any) -> None:
            self.made[id(tensor)] = (self.current, len(self.kept))
            self.kept.append(tensor)

        def sizes(self, tensors: list[Any]) -> Any:
            return tuple((self.describe_tensor(x), x.dtype, *map(self.describe, x.shape)) for x in tensors)

        def is_input(self, tensor: Any) -> bool:
            return id(tensor) in owners or id(tensor) in self.past or tensor is self.hidden

        def describe(self, value: Any) -> Any:
            if type(value) is int:
                return value
            if isinstance(value, symbolic):
                # Sizes that depend on data have a new name in each layer.
                return ("symbol", self.symbols.setdefault(str(value), len(self.symbols)))
            return (
                str(value)
                if isinstance(value, (torch.layout, torch.memory_format))
                else ("object", id(value))
            )

        def describe_tensor(self, tensor: Any) -> Any:
            if self.current is not None and tensor is self.hidden:
                return "hidden"
            layer, name = self.origin(tensor)
            if layer is None:
                return ("outside", name)
            if layer != self.current and not (tensor is self.last and self.done == count - 1):
                place = "the rest of the model" if self.current is None else f"layer {self.current}"
                raise NotAlikeError(f"{place} uses a tensor of layer {layer}")
            return ("own", name)

        def origin(self, tensor: Any) -> tuple[int | None, Any]:
            """The layer that a tensor belongs to, and its name there; for others, what identifies it."""
            if id(tensor) in owners:
                return owners[id(tensor)]
            if id(tensor) in self.past:
                return self.past[id(tensor)]
            if id(tensor) in self.made:
                layer, number = self.made[id(tensor)]
                return (layer, number - self.start if layer is not None else number)
            if type(tensor) is torch.Tensor and tensor.device.type != "meta" and tensor.numel() <= _SMALL:
                with torch._C._DisableTorchDispatch():
                    return (None, (str(tensor.dtype), tuple(tensor.shape), repr(tensor.tolist())))
            self.kept.append(tensor)
            return (None, id(tensor))

        def enter(self, index: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = _hidden(args, options)
            if self.current is not None or index != self.done + 1:
                raise NotAlikeError(f"layer {index} runs after layer {self.done}")
            if not isinstance(hidden, torch.Tensor) or (index and hidden is not self.last):
                raise NotAlikeError(f"layer {index} does not take what the layer before it returns")
            self.current, self.hidden, self.start, self.symbols = index, hidden, len(self.kept), {}
            form: list[Any] = []
            given: list[Any] = []
            self.take_apart((args, options), form, given)
            self.logs[index].append((tuple(form), *map(self.describe_tensor, given)))

        def leave(self, index: int, result: Any) -> None:
            values = result if isinstance(result, tuple) else (result,)
            length = len(values) if isinstance(result, tuple) else 0
            if not isinstance(values[0], torch.Tensor) or any(value is not None for value in values[1:]):
                raise NotAlikeError(f"layer {index} returns more than the hidden state")
            if values[0] is self.hidden or self.length not in (-1, length):
                raise NotAlikeError(f"layer {index} returns something else than the others")
            self.logs[index].append(self.describe_tensor(values[0]))
            self.current, self.done, self.last, self.length = None, index, values[0], length

        def finish(self, outputs: Mapping[str, Any]) -> None:
            if self.done != count - 1:
                raise NotAlikeError(f"{self.done + 1} of {count} layers ran")
            for name, tensor in outputs.items():
                layer, where = self.made.get(id(tensor), (None, -1))
                wanted = int(name.split(".")[1]) if name.startswith("present.") else None
                if where < 0 or layer != wanted:
                    raise NotAlikeError(f"{name} does not come from its layer")

    return Recorder()


@contextlib.contextmanager
def shortened(model: Any, kinds: LayerKinds) -> Iterator[None]:
    """Leaves one layer of each kind in the model while open, marked for stitching.

    The others hand the hidden state on. They keep their attributes, by which models choose masks, but have
    no weights.
    """
    import torch

    layers = model.get_submodule(kinds.path)
    kept = list(layers)

    class Skipped(torch.nn.Module):
        def __init__(self, original: Any) -> None:
            super().__init__()
            self.__dict__["original"] = original

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["original"], name)

        def forward(self, *args: Any, **options: Any) -> Any:
            hidden = _hidden(args, options)
            return (hidden, *[None] * (kinds.length - 1)) if kinds.length else hidden

    def mark(hidden: Any, kind: str, layer: int) -> Any:
        return torch.onnx.ops.symbolic(
            f"{MARKER_DOMAIN}::{kind}", [hidden], {"layer": layer}, dtype=hidden.dtype, shape=hidden.shape
        )

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(kept):
            if kinds.first[index] != index:
                layers[index] = Skipped(layer)
                continue

            def forward(*args: Any, _index: int = index, _inner: Any = layer.forward, **options: Any) -> Any:
                entered = mark(_hidden(args, options), ENTRY, _index)
                if args:
                    args = (entered, *args[1:])
                else:
                    options["hidden_states"] = entered
                result = _inner(*args, **options)
                if isinstance(result, tuple):
                    return (mark(result[0], EXIT, _index), *result[1:])
                return mark(result, EXIT, _index)

            stack.enter_context(_replaced_forward(layer, forward))
        try:
            yield
        finally:
            for index, layer in enumerate(kept):
                layers[index] = layer
