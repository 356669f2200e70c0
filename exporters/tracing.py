"""From a PyTorch program to an ONNX graph: torch.export, torch.onnx, and names that mean something."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import ExportError, OnnxsmithError, require
from onnxsmith.exporters.bfloat16 import widen_bfloat16
from onnxsmith.exporters.decomposition import (
    decomposed_where_needed,
    operators_listed_quickly,
    without_autocast,
)
from onnxsmith.exporters.masked_rows import zero_what_sees_nothing
from onnxsmith.exporters.ranges import narrowing, runs_with, traced_sizes
from onnxsmith.exporters.recurrent import recurrent_operators
from onnxsmith.package import TEXT_GENERATION, TensorSpec
from onnxsmith.program import AxisSizes

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from onnxsmith.program import TorchProgram

__all__ = ["FixedAxisError", "converted", "line_of", "silence", "trace", "weight_tensor"]

# This folder, under both of its names: onnxsmith.exporters is a link.
_HERE = Path(__file__).parent
_SYMBOL = re.compile(r"\b[su]\d+\b")
_NO_FORM = re.compile(
    r"No ONNX function found for <OpOverload\(op='(?P<operator>[\w.]+)', overload='(?P<overload>\w+)'"
)
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+), in \w+\n(.*)')


class FixedAxisError(ExportError):
    """An axis that is dynamic in the signature, and has one size or a largest one in the traced graph."""

    def __init__(self, axis: str, where: str, *, got: str, expected: str, remedy: str) -> None:
        """``axis`` is its name."""
        super().__init__(where, got=got, expected=expected, remedy=remedy)
        self.axis = axis


def trace(
    program: TorchProgram,
    module: torch.nn.Module | None = None,
    *,
    opset: int | None = None,
    longest: int | None = None,
) -> ir.Model:
    """Traces a program to an ONNX graph with the program's names and dynamic axes.

    Weights of the graph are the module's own tensors, not copies.

    Args:
        program: The signature, with example inputs.
        module: What to trace in place of ``program.module``; same signature.
        opset: Version of the ONNX operator set; torch's default where None.
        longest: How many positions a decoder is made for, where that is known.

    Raises:
        ExportError: torch cannot trace it. The message names the module and the line.
        FixedAxisError: The graph would be wrong for other sizes, or larger ones, of an axis.
    """
    torch = require("torch", purpose="exporting")
    require("onnxscript", purpose="exporting")
    module = program.module if module is None else module
    adapter = _flat_module(module, [spec.name for spec in program.inputs], [s.name for s in program.outputs])
    examples = tuple(program.examples[spec.name] for spec in program.inputs)
    shapes = (
        tuple(
            {
                axis: torch.export.Dim.AUTO
                for axis, size in enumerate(spec.shape or ())
                if not isinstance(size, int)
            }
            for spec in program.inputs
        ),
    )
    exported = None
    try:
        with (
            silence(),
            torch.no_grad(),
            without_autocast(),
            decomposed_where_needed() as assumed,
            operators_listed_quickly(),
            recurrent_operators(module),
        ):
            exported = torch.export.export(adapter, examples, dynamic_shapes=shapes, strict=False)
            _refuse_state(program, exported)
            _refuse_narrow(program, exported, longest)
            if program.task is None:
                # Of other models the rows of padding do not count.
                zero_what_sees_nothing(exported)
            onnx_program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in program.inputs],
                output_names=[spec.name for spec in program.outputs],
                # Our passes clean up, in an order that does not copy every transposed weight.
                optimize=False,
                verbose=False,
            )
            _refuse_assumed(program, exported, assumed)
    except OnnxsmithError:
        raise
    except Exception as error:
        nested = _find(error, OnnxsmithError)
        if nested is not None:
            raise nested from None
        raise _missing_form(program, exported, error) or _trace_error(program, error) from error
    model: ir.Model = onnx_program.model
    _name_axes(model, {s.name: s for s in (*program.inputs, *program.outputs)}, program.name)
    _name_weights(model, adapter)
    if not any(spec.dtype == "bfloat16" for spec in (*program.inputs, *program.outputs)):
        widen_bfloat16(model)
    return model


def converted(model: ir.Model, opset: int) -> ir.Model:
    """A graph in a newer operator set, as torch's exporter converts its own."""
    converter = require("onnxscript.version_converter", purpose="exporting")
    try:
        converter.convert_version(model, opset, fallback=True)
    except Exception as error:
        raise ExportError(
            "export: opset",
            got=f"operator set {opset}, to which the graph cannot be converted: {error}",
            expected="one that torch's exporter writes, such as 20",
        ) from error
    return model


def _refuse_state(program: TorchProgram, exported: torch.export.ExportedProgram) -> None:
    """Refuses a module that remembers: a graph has no state, and would compute the first call for ever."""
    buffers = exported.graph_signature.inputs_to_buffers
    changed = set()
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        first = node.args[0] if node.args else None
        name = buffers.get(getattr(first, "name", ""))
        if schema is None or not schema.is_mutable or name is None:
            continue
        while name.startswith("inner."):
            name = name.removeprefix("inner.")
        changed.add(name)
    if changed:
        raise ExportError(
            program.name,
            got=f"forward() changes its buffer {', '.join(sorted(changed)[:3])}",
            expected="a module without state",
            remedy="Take what it remembers as an input and return it as an output",
        )


def _refuse_narrow(
    program: TorchProgram, exported: torch.export.ExportedProgram, longest: int | None
) -> None:
    """Refuses a graph that is right for fewer sizes than the module itself takes."""
    decoder = program.task == TEXT_GENERATION
    for axis, (lower, upper) in traced_sizes(program, exported).items():
        least, most, step = program.axis_limits.get(axis, AxisSizes(1, longest))
        wrong = []
        # Bounds of a sum (past and new tokens) are those of each part, of which the other has at least 2.
        if upper is not None and (most is None or most > upper + 2):
            if decoder or runs_with(program, axis, (upper // step + 1) * step):
                wrong.append(f"up to {upper}")
            else:
                most = upper
        if lower > 2 and least < lower and not decoder:
            if runs_with(program, axis, (lower - 1) // step * step):
                wrong.append(f"from {lower} on")
            else:
                least = lower
        if wrong:
            raise FixedAxisError(
                axis,
                f"{program.name}: axis {axis}",
                got=f"torch traced it for sizes {' and '.join(wrong)} only",
                expected="a graph for all sizes that the module takes",
                remedy="The model branches on this size; make it independent of it",
            )
        if not decoder and axis in program.axis_limits:
            program.axis_limits[axis] = AxisSizes(least, most, step)


def _refuse_assumed(
    program: TorchProgram, exported: torch.export.ExportedProgram, assumed: Sequence[Any]
) -> None:
    """Refuses a graph whose decomposition is right only for sizes that fulfil an equation."""
    if program.task == TEXT_GENERATION:
        return
    for axis, relation in narrowing(program, exported, assumed):
        raise FixedAxisError(
            axis,
            f"{program.name}: axis {axis}",
            got=f"torch decomposed it for sizes with {relation} only",
            expected="a graph for all sizes that the module takes",
            remedy="The model branches on this size; make it independent of it",
        )


def _flat_module(module: torch.nn.Module, inputs: list[str], outputs: list[str]) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.inner(**dict(zip(inputs, tensors, strict=True)))
            # torch gives a value one name: an output that is an input, a weight or another output as well
            # would lose its own.
            taken = {id(tensor) for tensor in (*tensors, *self.parameters(), *self.buffers())}
            found = []
            for name in outputs:
                tensor = result[name]
                found.append(tensor.clone() if id(tensor) in taken else tensor)
                taken.add(id(tensor))
            return tuple(found)

    return Flat().eval()


def _name_axes(model: ir.Model, specs: Mapping[str, TensorSpec], where: str) -> None:
    """Replaces torch's symbols (s43) by the program's axis names, in the whole graph."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in [*model.graph.inputs, *model.graph.outputs, *_values(model)]:
        # torch writes an axis that it fixed while tracing as a symbol named "2".
        if value.shape is not None and not value.shape.frozen:
            value.shape = ir.Shape([int(str(dim)) if str(dim).isdecimal() else dim for dim in value.shape])
    for value in model.graph.inputs:
        spec = specs[value.name or ""]
        if spec.shape is None or value.shape is None:
            continue
        for axis, (wanted, got) in enumerate(zip(spec.shape, value.shape, strict=True)):
            if isinstance(wanted, str) and isinstance(got, int):
                raise FixedAxisError(
                    wanted,
                    f"{where}: input {value.name!r} axis {axis} ({wanted})",
                    got=f"torch fixed it to {got} while tracing",
                    expected="a dynamic axis",
                    remedy="The model branches on this size; make it independent of it",
                )
            if isinstance(got, ir.SymbolicDim) and got.value is not None:
                names.setdefault(got.value, str(wanted) if wanted is not None else got.value)

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        """``2*s43`` to ``2*batch``."""
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return _SYMBOL.sub(lambda match: names.get(match[0], match[0]), dim.value)

    for value in [*model.graph.inputs, *model.graph.outputs, *_values(model)]:
        if value.shape is not None and not value.shape.frozen:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])
    for value in model.graph.inputs:
        spec = specs[value.name or ""]
        if spec.shape is not None:
            value.shape = ir.Shape(list(spec.shape))
    for value in model.graph.outputs:
        spec = specs[value.name or ""]
        if spec.shape is None or value.shape is None or len(spec.shape) != len(value.shape):
            continue
        # What is dynamic is known from tracing, what it is called from the signature.
        value.shape = ir.Shape(
            [
                wanted if isinstance(wanted, str) and not isinstance(got, int) else got
                for wanted, got in zip(spec.shape, value.shape, strict=True)
            ]
        )


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph.all_nodes():
        yield from node.outputs


def _name_weights(model: ir.Model, module: torch.nn.Module) -> None:
    """Names weights as the state dict does, without the wrappers' prefixes; tied ones by their first name."""
    graph = model.graph
    firsts = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        short = firsts[id(tensor)]
        while short.startswith("inner."):
            short = short.removeprefix("inner.")
        if name in graph.initializers and short not in graph.initializers:
            # onnx_ir re-keys the mapping of initializers when a value is renamed.
            graph.initializers[name].name = short


def weight_tensor(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A weight as ONNX has it. Shares memory with the module."""
    import onnx_ir as ir

    return ir.tensor(tensor.detach(), name=name)


def _find(error: BaseException, kind: type[OnnxsmithError]) -> OnnxsmithError | None:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, kind):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def line_of(error: BaseException) -> str:
    """The line of the model's or the user's code that raised: `` at file.py:7 `code```, or nothing."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path("site-packages", "torch").as_posix() not in Path(frame.filename).as_posix()
        and not Path(frame.filename).is_relative_to(_HERE)
        and not frame.filename.startswith("<")
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" at {Path(last.filename).name}:{last.lineno}" + (f" `{last.line}`" if last.line else "")


def _module_of(program: TorchProgram, errors: Sequence[BaseException]) -> str:
    """The innermost module that was running: `` in encoder.layers.3 (Attention)``, or nothing."""
    names = {id(module): name for name, module in program.module.named_modules()}
    for error in errors:
        found = ""
        trace = error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            name = names.get(id(module), "")
            while name == "inner" or name.startswith("inner."):
                name = name.removeprefix("inner").removeprefix(".")
            if name:
                found = f" in {name} ({type(module).__name__})"
            trace = trace.tb_next
        if found:
            return found
    return ""


def _missing_form(
    program: TorchProgram, exported: torch.export.ExportedProgram | None, error: BaseException
) -> ExportError | None:
    """The error for an operator that torch's exporter cannot write in ONNX; None where it is another."""
    current: BaseException | None = error
    while current is not None:
        found = _NO_FORM.search(str(current))
        if found and exported is not None:
            name = f"{found['operator']}.{found['overload']}"
            places = (_place_of(node) for node in exported.graph.nodes if str(node.target) == name)
            return ExportError(
                program.name,
                got=f"it uses {name}{next(places, '')}, for which torch's exporter has no ONNX form",
                expected="operators that have one",
                remedy="Compute it with others",
            )
        current = current.__cause__ or current.__context__
    return None


def _place_of(node: torch.fx.Node) -> str:
    """The module that a node comes from, and its line: `` in encoder (Encoder) at file.py:7 `code```."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    while path == "inner" or path.startswith("inner."):
        path = path.removeprefix("inner").removeprefix(".")
    name = kind if isinstance(kind, str) else kind.__name__
    place = f" in {path} ({name.rpartition('.')[2]})" if path else ""
    # Of the model's or the user's own code, the innermost.
    lines = _STACK_LINE.findall(node.meta.get("stack_trace") or "")
    if lines:
        file, number, code = lines[-1]
        place += f" at {Path(file).name}:{number} `{code.strip()}`"
    return place


def _trace_error(program: TorchProgram, error: BaseException) -> ExportError:
    """One message with the model's own line, instead of torch's dump."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    place = _module_of(program, (root, error)) + line_of(root)
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    text = lines[0][:300] if lines else ""
    return ExportError(
        program.name,
        got=f"torch cannot trace it{place}: {type(root).__name__}: {text}",
        expected="a forward() without control flow on values of tensors",
        remedy="Rewrite that line with torch.where or torch.cond",
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps the exporter's chatter off the terminal; failures come as exceptions."""
    # torch prints the graph so far to standard error when a branch depends on a value.
    exporting = importlib.import_module("torch.export._trace")
    names = (
        "torch.onnx",
        "torch.export",
        "torch._subclasses.fake_tensor",
        "torch.fx.experimental.symbolic_shapes",
        "onnxscript",
        "onnx_ir",
        "torch.onnx._internal.exporter._registration",
    )
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            vars(exporting)["print"] = lambda *_, **__: None
            yield
    finally:
        vars(exporting).pop("print", None)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
