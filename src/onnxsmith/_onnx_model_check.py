"""Checks an ONNX message: names, order of nodes, nesting, functions and tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from onnxsmith._onnx_tensor_check import TensorCheck
from onnxsmith._onnx_text import chain, check_pairs, domain_of, node_label, require_text, show
from onnxsmith.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

__all__ = ["MAX_GRAPH_DEPTH", "ModelCheck"]

# protobuf refuses messages more than 100 deep, which is 33 graphs inside each other. Ours is lower, because
# onnx_ir needs some nine Python frames per level and the caller's stack is not ours to fill.
MAX_GRAPH_DEPTH = 24

# AttributeProto.AttributeType
_TENSOR, _GRAPH, _TENSORS, _GRAPHS, _SPARSE_TENSOR, _SPARSE_TENSORS = 4, 5, 9, 10, 11, 12

_Key = TypeVar("_Key")
_FunctionKey = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A graph or function body whose nodes are being walked."""

    where: str
    nodes: Sequence[onnx.NodeProto]
    producers: Mapping[str, int]


class ModelCheck:
    """Checks one message; see :func:`onnxsmith.onnx_file.load_model` for what.

    Recursion goes with the nesting of graphs, which is bounded; everything that goes with the number of
    nodes or functions is a loop.
    """

    def __init__(self, path: Path, proto: onnx.ModelProto) -> None:
        self._path = path
        self._proto = proto
        self._tensors = TensorCheck(path)
        # All names that a node at the present point may use, and the bodies around that point.
        self._visible: set[str] = set()
        self._scopes: list[_Scope] = []
        # What each function calls; the main graph is the key of three empty strings.
        self._caller: _FunctionKey = ("", "", "")
        self._calls: dict[_FunctionKey, dict[_FunctionKey, None]] = {}

    def run(self) -> None:
        """Checks all of it.

        Raises:
            ModelFileError: It breaks a rule.
        """
        proto, where = self._proto, str(self._path)
        if not proto.ir_version > 0:
            raise ModelFileError(
                where,
                got="not an ONNX model, or truncated: it has no ir_version",
                expected="a positive ir_version",
            )
        for text in (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string):
            require_text(text, where, "a model property")
        check_pairs(proto.metadata_props, where)
        self._check_opsets(proto.opset_import, where)
        functions = self._function_keys()
        self._calls[self._caller] = {}
        self._check_graph(proto.graph, f"{where}: graph", 1)
        for key, function in functions.items():
            self._caller = key
            self._calls[key] = {}
            self._check_function(function, f"{where}: function {show(function.name)}")
        self._check_calls(functions)

    def _check_opsets(self, imports: Iterable[onnx.OperatorSetIdProto], where: str) -> None:
        versions: dict[str, int] = {}
        for entry in imports:
            domain = require_text(entry.domain, where, "an opset domain")
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ModelFileError(
                    where,
                    got=f"opset_import names domain {show(domain)} with versions {versions[domain]} "
                    f"and {entry.version}",
                    expected="one version per domain",
                )
            if entry.version < 1:
                raise ModelFileError(
                    where,
                    got=f"opset version {entry.version} of domain {show(domain)}",
                    expected="1 or more",
                )
        if not versions:
            raise ModelFileError(
                where,
                got="not an ONNX model, or truncated: it has no opset_import",
                expected="at least one opset",
                remedy="Files from before ONNX 1.0 (IR version 1 and 2) cannot be read.",
            )

    def _function_keys(self) -> dict[_FunctionKey, onnx.FunctionProto]:
        functions: dict[_FunctionKey, onnx.FunctionProto] = {}
        for function in self._proto.functions:
            for text in (function.domain, function.name, function.overload, function.doc_string):
                require_text(text, str(self._path), "a function's name or text")
            key = (domain_of(function.domain), function.name, function.overload)
            if not function.name:
                raise ModelFileError(str(self._path), got="a function has no name", expected="a name")
            if key in functions:
                raise ModelFileError(
                    str(self._path),
                    got=f"function {show(function.name)} of domain {show(function.domain)}, overload "
                    f"{show(function.overload)}, is defined twice",
                    expected="one definition",
                )
            functions[key] = function
        return functions

    def _check_calls(self, functions: Collection[_FunctionKey]) -> None:
        cycle = _find_cycle(
            {key: [k for k in called if k in functions] for key, called in self._calls.items()}
        )
        if cycle:
            names = chain([show(name) for _, name, _ in cycle])
            raise ModelFileError(
                str(self._path),
                got=f"model-local functions call each other in a cycle: {names}",
                expected="functions without recursion",
            )

    def _check_graph(self, graph: onnx.GraphProto, where: str, depth: int) -> None:
        if depth > MAX_GRAPH_DEPTH:
            raise ModelFileError(
                str(self._path),
                got="subgraphs are nested too deeply",
                expected=f"at most {MAX_GRAPH_DEPTH} levels",
            )
        require_text(graph.name, where, "the graph's name")
        require_text(graph.doc_string, where, "the graph's doc_string")
        check_pairs(graph.metadata_props, where)
        if graph.sparse_initializer:
            # onnx_ir would drop them without a word.
            raise ModelFileError(
                where,
                got=f"{len(graph.sparse_initializer)} sparse initializers",
                expected="dense initializers only",
                remedy="Convert them to dense tensors.",
            )
        inputs = self._check_value_infos(graph.input, where, "graph input")
        self._check_value_infos(graph.value_info, where, "value_info", unique=False)
        initializers: set[str] = set()
        for tensor in graph.initializer:
            name = self._define(tensor.name, where, "initializer", initializers)
            self._tensors.check(tensor, f"{where}, initializer {show(name)}")
        # An initializer of an input's name is that input's default.
        local = inputs | initializers
        outputs = [info.name for info in graph.output]
        self._check_value_infos(graph.output, where, "graph output", unique=False)
        self._check_body(list(graph.node), outputs, local, where, depth)

    def _check_function(self, function: onnx.FunctionProto, where: str) -> None:
        if function.opset_import:
            self._check_opsets(function.opset_import, where)
        check_pairs(function.metadata_props, where)
        inputs: set[str] = set()
        for name in function.input:
            self._define(name, where, "function input", inputs)
        self._check_value_infos(function.value_info, where, "value_info", unique=False)
        self._check_attributes(function.attribute_proto, f"{where}, defaults", 0)
        for name in function.attribute:
            require_text(name, where, "an attribute name")
        self._check_body(list(function.node), list(function.output), inputs, where, 1)

    def _check_value_infos(
        self, infos: Iterable[onnx.ValueInfoProto], where: str, kind: str, *, unique: bool = True
    ) -> set[str]:
        names: set[str] = set()
        for info in infos:
            if unique:
                self._define(info.name, where, kind, names)
            else:
                require_text(info.name, where, f"the name of a {kind}")
            require_text(info.doc_string, where, f"the doc_string of a {kind}")
            check_pairs(info.metadata_props, where)
            for dim in info.type.tensor_type.shape.dim:
                require_text(dim.dim_param, where, "the name of a dimension")
        return names

    def _define(self, name: str, where: str, kind: str, names: set[str]) -> str:
        """Adds a name that this graph defines, which neither it nor a graph around it may have already."""
        require_text(name, where, f"the name of a {kind}")
        if not name:
            raise ModelFileError(where, got=f"a {kind} has no name", expected="a name")
        if name in names:
            raise ModelFileError(where, got=f"{kind} {show(name)} is defined twice", expected="unique names")
        if name in self._visible:
            self._refuse_shadowing(name, where, kind)
        names.add(name)
        return name

    def _refuse_shadowing(self, name: str, where: str, kind: str) -> NoReturn:
        raise ModelFileError(
            where,
            got=f"{kind} {show(name)} redefines a value of an outer graph",
            expected="names that no outer graph uses",
            remedy="Rename the value in the subgraph.",
        )

    def _check_body(
        self, nodes: list[onnx.NodeProto], outputs: list[str], local: set[str], where: str, depth: int
    ) -> None:
        """Checks the nodes of a graph or function in order, and that they make its outputs."""
        producers = self._producers(nodes, local, where)
        self._visible |= local
        self._scopes.append(_Scope(where, nodes, producers))
        calls = self._calls[self._caller]
        for index, node in enumerate(nodes):
            for name in node.input:
                if name and name not in self._visible:
                    self._refuse_input(name, node_label(node, index))
            if node.attribute:
                self._check_attributes(node.attribute, f"{where}, node {node_label(node, index)}", depth)
            self._visible.update(name for name in node.output if name)
            calls[domain_of(node.domain), node.op_type, node.overload] = None
        for name in outputs:
            if name not in local and name not in producers:
                self._refuse_output(name, where)
        self._scopes.pop()
        self._visible -= local
        self._visible.difference_update(producers)

    def _producers(self, nodes: list[onnx.NodeProto], local: set[str], where: str) -> dict[str, int]:
        producers: dict[str, int] = {}
        for index, node in enumerate(nodes):
            for text in (node.name, node.op_type, node.domain, node.overload, node.doc_string):
                if type(text) is not str:
                    require_text(text, where, f"a name or text of node {index}")
            if node.metadata_props:
                check_pairs(node.metadata_props, where)
            if not node.op_type:
                raise ModelFileError(
                    where, got=f"node {node_label(node, index)} has no op_type", expected="an operator"
                )
            for name in node.output:
                require_text(name, where, f"an output name of node {index}")
                if not name:
                    continue
                if name in producers or name in local:
                    other = (
                        f"node {node_label(nodes[producers[name]], producers[name])}"
                        if name in producers
                        else "an input or initializer"
                    )
                    raise ModelFileError(
                        where,
                        got=f"value {show(name)} is defined twice, by {other} and by node "
                        f"{node_label(node, index)}",
                        expected="one definition per name (static single assignment)",
                    )
                if name in self._visible:
                    self._refuse_shadowing(name, where, f"node {node_label(node, index)}: output")
                producers[name] = index
        return producers

    def _refuse_input(self, name: str, label: str) -> NoReturn:
        """Says why a node's input is not there yet: never produced, produced later, or a cycle."""
        where = self._scopes[-1].where
        for scope in reversed(self._scopes):
            if name not in scope.producers:
                continue
            cycle = _find_cycle(_dependencies(scope))
            if cycle:
                names = chain([node_label(scope.nodes[i], i) for i in cycle])
                raise ModelFileError(
                    scope.where,
                    got=f"nodes depend on each other in a cycle: {names}",
                    expected="a graph without cycles",
                )
            producer = scope.producers[name]
            raise ModelFileError(
                where,
                got=f"the nodes are not sorted: node {label} uses value {show(name)} before node "
                f"{node_label(scope.nodes[producer], producer)} produces it",
                expected="nodes in topological order",
                remedy="Sort the model with `onnx_ir.Graph.sort` and save it again.",
            )
        raise ModelFileError(
            where,
            got=f"node {label} uses value {show(name)}, which no node, input or initializer defines",
            expected="inputs that are defined before they are used",
        )

    def _refuse_output(self, name: str, where: str) -> NoReturn:
        if name in self._visible:
            raise ModelFileError(
                where,
                got=f"output {show(name)} is a value of an outer graph, passed on directly",
                expected="outputs that the subgraph itself produces",
                remedy="Add an Identity node.",
            )
        raise ModelFileError(
            where,
            got=f"graph output {show(name)} is not produced by any node",
            expected="outputs that a node, an input or an initializer defines",
        )

    def _check_attributes(
        self,
        attributes: Iterable[onnx.AttributeProto],
        where: str,
        depth: int,
    ) -> None:
        names: set[str] = set()
        for attribute in attributes:
            name, kind = attribute.name, attribute.type
            require_text(name, where, "an attribute name")
            if name in names:
                raise ModelFileError(
                    where, got=f"attribute {show(name)} is given twice", expected="each attribute once"
                )
            names.add(name)
            if attribute.ref_attr_name:
                require_text(attribute.ref_attr_name, where, "an attribute name")
                continue
            require_text(attribute.doc_string, where, "an attribute's doc_string")
            if kind == 0:
                raise ModelFileError(
                    where,
                    got=f"attribute {show(name)} has no type, or one that is not known",
                    expected="a type",
                )
            if kind in (_SPARSE_TENSOR, _SPARSE_TENSORS):
                raise ModelFileError(
                    where,
                    got=f"attribute {show(name)} is a sparse tensor",
                    expected="dense tensors only",
                    remedy="Convert it to a dense tensor.",
                )
            if kind in (_TENSOR, _TENSORS):
                for tensor in [attribute.t] if kind == _TENSOR else attribute.tensors:
                    self._tensors.check(tensor, f"{where}, attribute {show(name)}")
            elif kind in (_GRAPH, _GRAPHS):
                for graph in [attribute.g] if kind == _GRAPH else attribute.graphs:
                    self._check_graph(graph, f"{where}, attribute {show(name)}", depth + 1)


def _dependencies(scope: _Scope) -> dict[int, list[int]]:
    """For each node, the nodes of the same body that it needs, its subgraphs' needs included."""
    needs: dict[int, list[int]] = {}
    for index, node in enumerate(scope.nodes):
        used: set[str] = set()
        _collect_free_names(node, used)
        needs[index] = [scope.producers[name] for name in used if name in scope.producers]
    return needs


def _collect_free_names(node: onnx.NodeProto, used: set[str]) -> None:
    used.update(node.input)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == _GRAPH else attribute.graphs
        for graph in graphs if attribute.type in (_GRAPH, _GRAPHS) else ():
            inner: set[str] = set()
            for child in graph.node:
                _collect_free_names(child, inner)
            inner.difference_update(info.name for info in graph.input)
            inner.difference_update(tensor.name for tensor in graph.initializer)
            inner.difference_update(name for child in graph.node for name in child.output)
            used |= inner


def _find_cycle(successors: Mapping[_Key, Iterable[_Key]]) -> list[_Key] | None:
    """Finds a cycle by depth-first search, without recursion; every successor must be a key."""
    done: set[_Key] = set()
    for start in successors:
        if start in done:
            continue
        # A dictionary, for its order: the path from the start to the present node.
        path: dict[_Key, Iterator[_Key]] = {start: iter(successors[start])}
        while path:
            present = next(reversed(path))
            for following in path[present]:
                if following in path:
                    nodes = list(path)
                    return nodes[nodes.index(following) :]
                if following not in done:
                    path[following] = iter(successors[following])
                    break
            else:
                done.add(present)
                del path[present]
    return None
