"""What a pass is: a change of a graph that either happens whole or not at all, and says what it did."""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import gc
import inspect
import logging
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import onnx_ir as ir
import onnx_ir.passes

from onnxsmith.errors import BadInputError, OnnxsmithError, PassError, ResourceError, UnknownNameError
from onnxsmith.graph_passes.names import doubled_names, with_unique_names

__all__ = ["Changes", "GraphPass", "Outcome", "PreconditionError"]


class PreconditionError(PassError, ir.passes.PreconditionError):
    """The model is not one that the pass can work on; nothing was changed."""


@dataclasses.dataclass
class Changes:
    """What a pass did.

    Attributes:
        count: How many changes; 0 means that the model is as it was.
        details: Counts by kind, in plain data, for the manifest.
        skipped: What could have been changed and was not: name to reason.
    """

    count: int = 0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome(ir.passes.PassResult):
    """An ``onnx_ir`` pass result that also carries what was done."""

    changes: Changes = dataclasses.field(default_factory=Changes)


class GraphPass(ir.passes.InPlacePass):
    """Base of all passes.

    A subclass sets ``name`` and ``summary``, takes its parameters as keyword-only arguments of
    ``__init__`` and keeps each as an attribute of the same name, and implements ``apply``. ``apply`` works
    on a copy of the graph (structure only, weights are shared), which takes the model's place only when it
    succeeds, so a pass need not clean up after itself. The model object stays the same; its graph, nodes
    and values are new ones after a change. A pass that ``changes_at_once`` works on the model itself.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    layerwise: ClassVar[bool] = False
    """Whether it does to a layer what it would in a model with fewer of these, and goes by no names: see
    ``repeated_layers``."""
    changes_at_once: ClassVar[bool] = False
    """Whether ``apply`` cannot fail any more when it begins to change the model, which then needs no copy."""

    @classmethod
    def parameters(cls) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters, with defaults and annotations resolved."""
        hints = typing.get_type_hints(cls.__init__)
        return {
            name: parameter.replace(annotation=hints.get(name, Any))
            for name, parameter in inspect.signature(cls).parameters.items()
        }

    @classmethod
    def create(cls, arguments: Mapping[str, Any]) -> GraphPass:
        """Makes the pass from plain data, as it stands in a recipe or on a command line.

        Raises:
            UnknownNameError: A parameter that the pass does not have.
            BadInputError: A value of the wrong type or outside its range.
        """
        import pydantic

        known = cls.parameters()
        for key in arguments:
            if key not in known:
                raise UnknownNameError(f"pass {cls.name}", name=key, known=known, kind="parameter")
        values = {}
        for key, value in arguments.items():
            try:
                kind = known[key].annotation
                values[key] = pydantic.TypeAdapter(kind).validate_python(_plain(value, kind))
            except pydantic.ValidationError as error:
                raise BadInputError(
                    f"pass {cls.name}: {key}",
                    got=repr(value),
                    expected=error.errors()[0]["msg"].removeprefix("Input should be "),
                ) from error
        return cls(**values)

    def arguments(self) -> dict[str, Any]:
        """Every parameter with its value, defaults included."""
        return {name: getattr(self, name) for name in self.parameters()}

    @abc.abstractmethod
    def apply(self, model: ir.Model) -> Changes:
        """Changes the model in place and says what was done."""

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> Outcome:
        """Checks that the pass can work on the model, and runs it.

        Raises:
            PassError: It refused or failed; the model is as it was.
            ResourceError: It ran out of memory; the model is as it was.
        """
        try:
            result = super().__call__(model_or_result)
        except ir.passes.InvariantError as error:
            # onnx_ir wraps whatever requires() and ensures() raise in its own kind of error.
            if isinstance(error, OnnxsmithError):
                raise
            cause = error.__cause__
            if isinstance(cause, OnnxsmithError):
                raise cause from None
            raise self._failure(cause or error) from error
        assert isinstance(result, Outcome)
        return result

    def call(self, model: ir.Model) -> Outcome:
        """Runs the pass as a transaction: on a copy of the graph, which then takes the graph's place.

        Where nothing changed, the model keeps the graph objects that it had.

        Raises:
            PassError: It failed; the model is as it was.
            ResourceError: It ran out of memory; the model is as it was.
        """
        at_once = self.changes_at_once
        names = [] if at_once else _tensor_names(model)
        committed = False
        try:
            with _without_garbage_collection(), _quiet():
                trial = model if at_once else _copy(model)
                changes = self.apply(trial)
                # A pass names nodes without knowing what an earlier one, or an earlier run of it, has named.
                doubled = doubled_names(trial) if changes.count and not at_once else 0
                if doubled and doubled > doubled_names(model):
                    with_unique_names(trial)
            if changes.count and not at_once:
                _commit(model, trial)
                committed = True
        except MemoryError as error:
            raise ResourceError(
                f"pass {self.name}",
                got=f"ran out of memory: {_root_cause(error)}",
                remedy="The model is unchanged; use a machine with more memory",
            ) from error
        except OnnxsmithError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        finally:
            if not committed:
                for tensor, name in names:
                    if _name_of(tensor) != name:
                        tensor.name = name
        return Outcome(model, changes.count > 0, changes)

    def _failure(self, error: BaseException) -> PassError:
        return PassError(
            f"pass {self.name}",
            got=_root_cause(error),
            remedy="The model is unchanged; leave the pass out, or report this with the model",
        )


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps Python from searching the graph for cycles again and again while it grows.

    A graph is one large cycle: nothing of it can go before all of it can, and each search visits all of it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps onnx_ir from writing of what its passes leave as it is, with tracebacks."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _plain(value: Any, kind: Any) -> Any:
    """What a value means that comes from a command line, where everything is a string."""
    if isinstance(value, str) and typing.get_origin(kind) is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}.get(value, value)
    if isinstance(value, str) and typing.get_origin(kind) is tuple:
        return (value,)
    if isinstance(value, bool) and kind is not bool:
        # pydantic takes True for the number 1.
        return str(value)
    return value


def _copy(model: ir.Model) -> ir.Model:
    """A copy that shares nothing that a pass could change by accident, except names of tensors."""
    trial = model.clone()
    trial.meta.update(model.meta)
    for graph in _graphs(trial):
        for value in _values(graph):
            # Setting the dtype of a value changes its type object, which a clone shares.
            value.type = copy.copy(value.type)
    return trial


def _commit(model: ir.Model, trial: ir.Model) -> None:
    model.functions.clear()
    model.functions.update(trial.functions)
    model.metadata_props.clear()
    model.metadata_props.update(trial.metadata_props)
    model.meta.clear()
    model.meta.update(trial.meta)
    model.graph = trial.graph
    model.ir_version = trial.ir_version
    model.producer_name = trial.producer_name
    model.producer_version = trial.producer_version
    model.domain = trial.domain
    model.model_version = trial.model_version
    model.doc_string = trial.doc_string
    model.device_configurations = trial.device_configurations


def _tensor_names(model: ir.Model) -> list[tuple[ir.TensorProtocol, str | None]]:
    """The names of all tensors. Renaming a value renames its tensor, which other models may share."""
    tensors: dict[int, ir.TensorProtocol] = {}
    for graph in _graphs(model):
        for value in _values(graph):
            if value.const_value is not None:
                tensors[id(value.const_value)] = value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = attribute.as_tensor()
                    tensors[id(tensor)] = tensor
    return [(tensor, _name_of(tensor)) for tensor in tensors.values()]


def _name_of(tensor: ir.TensorProtocol) -> str | None:
    """The name, with none told from an empty one, which is another byte in the file."""
    if isinstance(tensor, ir.TensorProtoTensor) and not tensor.raw.HasField("name"):
        return None
    return tensor.name


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _root_cause(error: BaseException) -> str:
    # Passes of onnx_ir wrap an error once per level, each time with the whole message.
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
