"""What a session opens: a graph that is a file, with all that one must know to feed it.

It can be sent to another process, where neither onnx nor onnx_ir needs to be installed.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from onnxsmith._onnx_slots import weight_slots
from onnxsmith.errors import ModelFileError, UnknownNameError
from onnxsmith.known_graphs import recall, remember
from onnxsmith.own_operators import brings_own_operators, uses_own_operators
from onnxsmith.package import ModelPackage, TensorSpec, cache_is_shareable, reads_lengths
from onnxsmith.package_io import load_package, sole_graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GraphFile"]

Array = npt.NDArray[Any]
# To be changed with what ``to_json`` gives.
_NOTE = "graph-6"


@dataclasses.dataclass
class GraphFile:
    """One graph on disk. A context manager, because a graph that was not on disk is written there.

    Attributes:
        path: The ONNX file.
        inputs: What it takes.
        outputs: What it gives.
        limits: For integer inputs, one above the highest valid value.
        shares_cache: See ``cache_is_shareable``.
        needs_folding: See ``scales_are_computed``.
        most_alike: See ``most_positions_alike``.
        cache_scales: For inputs and outputs of a KV cache in 8 bits, what a code is multiplied with; see
            ``cache_scales_of``.
        rows_interact: See ``quantizes_by_range``.
        reads_lengths: See ``package.reads_lengths``.
        own_operators: See ``uses_own_operators``.
        brings_operators: See ``brings_own_operators``.
        temporary: The directory that goes when this is closed; None where the file is the user's.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Mapping[str, int]
    shares_cache: bool = False
    needs_folding: bool = False
    most_alike: int | None = None
    cache_scales: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    rows_interact: bool = False
    reads_lengths: bool = False
    own_operators: bool = False
    brings_operators: bool = False
    temporary: Path | None = None

    @classmethod
    def of(cls, package: ModelPackage, *, component: str | None = None, name: str = "model") -> GraphFile:
        """The file of a graph of a package; a graph without one is written to a temporary directory.

        Args:
            package: What to open.
            component: Which graph; the only one where None.
            name: For messages.

        Raises:
            UnknownNameError: No such component.
            ModelFileError: An input or output is no tensor.
            DestinationError: The graph cannot be written.
        """
        from onnxsmith.onnx_file import save_model
        from onnxsmith.runtime.samples import value_limits

        if component is not None and component not in package.components:
            raise UnknownNameError(name, name=component, known=package.components, kind="component")
        chosen = package.components[component] if component else package.main
        _require_tensors(chosen.model.graph, name)
        graph = cls(
            chosen.path or Path(), chosen.inputs, chosen.outputs, value_limits(package),
            cache_is_shareable(chosen.model), scales_are_computed(chosen.model),
            most_positions_alike(chosen.model), cache_scales_of(chosen.model),
            quantizes_by_range(chosen.model), reads_lengths(chosen.model), uses_own_operators(chosen.model),
            brings_own_operators(chosen.model),
        )  # fmt: skip
        if chosen.path is None:
            graph.temporary = Path(tempfile.mkdtemp(prefix="onnxsmith-session-"))
            graph.path = graph.temporary / "model.onnx"
            try:
                save_model(chosen.model, graph.path)
            except BaseException:
                graph.close()
                raise
        return graph

    @classmethod
    def open(cls, path: Path) -> GraphFile:
        """The graph of a model on disk that has one graph.

        What was checked before, by the hash of its bytes, is neither read nor checked again: see
        ``known_graphs``.

        Args:
            path: An artifact, a directory with one ONNX file, or the file.

        Raises:
            KeyError: The model has several graphs.
            OnnxsmithError: See ``load_package``.
        """
        known = cls.known(path)
        if known is not None:
            return known
        package = load_package(path)
        graph = cls.of(package)
        graph.remember(package)
        return graph

    @classmethod
    def known(cls, path: Path) -> GraphFile | None:
        """The graph, if these very bytes were checked before."""
        file = sole_graph(path)
        facts = None if file is None else recall(file, _NOTE)
        return None if facts is None else cls.from_json({**facts, "path": str(file)})

    def remember(self, package: ModelPackage) -> None:
        """Makes ``known`` find the only graph of a package, which was loaded and thereby checked."""
        component = package.main
        if component.path is None or component.path != self.path:
            return
        sizes: dict[str, int] = {}
        for slot in weight_slots(component.model):
            tensor: Any = slot.tensor
            location = getattr(tensor, "location", None)
            if location is not None:
                end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
                sizes[str(location)] = max(sizes.get(str(location), 0), end)
        facts = self.to_json()
        del facts["path"]
        remember(self.path, _NOTE, facts, sizes)

    def close(self) -> None:
        """Removes the file, where this made it."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def to_json(self) -> dict[str, Any]:
        """Plain data, for another process of this machine."""
        return {
            "path": str(self.path.resolve()),
            "inputs": [dataclasses.astuple(spec) for spec in self.inputs],
            "outputs": [dataclasses.astuple(spec) for spec in self.outputs],
            "limits": dict(self.limits),
            "shares_cache": self.shares_cache,
            "needs_folding": self.needs_folding,
            "most_alike": self.most_alike,
            "cache_scales": {name: scale.tolist() for name, scale in self.cache_scales.items()},
            "rows_interact": self.rows_interact,
            "reads_lengths": self.reads_lengths,
            "own_operators": self.own_operators,
            "brings_operators": self.brings_operators,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> GraphFile:
        """What ``to_json`` gave. Closing it removes nothing."""

        def specs(side: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(name, dtype, None if shape is None else tuple(shape))
                for name, dtype, shape in plain[side]
            )

        return cls(
            Path(plain["path"]),
            specs("inputs"),
            specs("outputs"),
            plain["limits"],
            plain["shares_cache"],
            plain["needs_folding"],
            plain["most_alike"],
            {name: np.array(scale, np.float32) for name, scale in plain["cache_scales"].items()},
            plain["rows_interact"],
            plain["reads_lengths"],
            plain["own_operators"],
            plain["brings_operators"],
        )


def _require_tensors(graph: ir.Graph, name: str) -> None:
    import onnx_ir as ir

    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                raise ModelFileError(
                    f"{name}: {kind} {value.name!r}",
                    got=f"a {type(value.type).__name__.removesuffix('Type').lower()}",
                    expected="a tensor",
                    remedy="Export it with tensors only, or cut the graph before it",
                )


def cache_scales_of(model: ir.Model) -> dict[str, Array]:
    """Input and output names of a KV cache in 8 bits to the scale of its codes.

    It is what GroupQueryAttention has for them: one number, or one for each head and channel.
    """
    found: dict[str, Array] = {}
    for node in model.graph:
        if node.op_type != "GroupQueryAttention" or len(node.inputs) < 14:
            continue
        for past, present, scale in ((3, 1, 12), (4, 2, 13)):
            value, cache = node.inputs[scale], node.inputs[past]
            if value is None or cache is None or value.const_value is None:
                continue
            if cache.dtype is not None and cache.dtype.name == "INT8":
                array = np.asarray(value.const_value.numpy(), np.float32)
                for name in (cache.name, node.outputs[present].name):
                    found[name or ""] = array
    return found


def scales_are_computed(model: ir.Model) -> bool:
    """Whether weights in blocks have scales that are no initializers, such as casts of float16.

    ONNX Runtime folds them when it loads the model. With its optimisation off altogether, its int8 kernels
    take them for missing (1.32: MatMulNBits gives zeros, without an error), so folding has to stay on.
    """
    return any(
        node.op_type == "MatMulNBits" and node.inputs[2] is not None and not node.inputs[2].is_initializer()
        for node in model.graph.all_nodes()
    )


def most_positions_alike(model: ir.Model) -> int | None:
    """Up to how many positions a call goes through the branch for single tokens; None without branches.

    A graph with a branch for prompts compares the number of positions with a constant.
    """
    for node in model.graph:
        condition = node.inputs[0].producer() if node.op_type == "If" and node.inputs[0] is not None else None
        if condition is None or condition.op_type != "Greater":
            continue
        size, bound = condition.inputs
        shape = None if size is None else size.producer()
        if shape is None or shape.op_type != "Shape" or bound is None or bound.const_value is None:
            continue
        if shape.inputs[0] is not None and shape.inputs[0].name == "input_ids":
            return int(bound.const_value.numpy().reshape(-1)[0])
    return None


def quantizes_by_range(model: ir.Model) -> bool:
    """Whether activations get a scale from the values of a whole batch, as dynamic quantization does.

    Then the result of a row depends on the rows beside it, and on padding.
    """
    return any(
        node.op_type in ("DynamicQuantizeLinear", "DynamicQuantizeMatMul") for node in model.graph.all_nodes()
    )
