"""Taking units out of a PyTorch model: weights really get smaller, and what counts heads or widths follows.

Which numbers of the modules follow is a guess, by their values; the result is proved to be right. The smaller
model must compute what the whole one computes with zeros in place of these units, or all is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.training.units import Run, UnitGroup

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["PruningPlan", "apply_plan", "masked", "shrink"]

# Numbers of a module that are none of heads or widths, whatever they are equal to.
_NO_COUNT = re.compile(
    r"(?<!all_)head_(dim|size)|_groups|n_rep|layer_(idx|id|number)|scal|per_head|window|max_pos|eps"
)
_HEADS = re.compile(r"head")
_WIDTHS = re.compile(r"intermediate|ffn|inner|hidden_dim|d_ff|mlp")
# Of outputs whose largest magnitude is 1; what shrinking changes is the order of sums.
_TOLERANCE = 1e-4
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What was removed, as plain data: the same again on another copy of the model.

    Attributes:
        layers: ``nn.ModuleList`` to the layers that stay. These go first.
        rows: Projection to the output features that stay.
        columns: Projection to the input features that stay.
        attributes: Module to the numbers that were set.
        config: What was set in the model's configuration.
    """

    layers: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layers": {name: list(map(int, kept)) for name, kept in self.layers.items()},
            "rows": {name: list(map(int, kept)) for name, kept in self.rows.items()},
            "columns": {name: list(map(int, kept)) for name, kept in self.columns.items()},
            "attributes": {name: dict(numbers) for name, numbers in self.attributes.items()},
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The plan of plain data.

        Raises:
            BadInputError: It is not that of a plan.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise BadInputError("pruning plan", got=repr(data)[:80], expected=", ".join(sorted(known)))
        return cls(**{name: dict(value) for name, value in data.items()})


def apply_plan(module: nn.Module, plan: PruningPlan) -> None:
    """Does to a fresh copy of a model, in place, what was done to the one that the plan was made of.

    Raises:
        BadInputError: The plan is of another model.
    """
    from onnxsmith.training.depth import drop_layers

    parts = dict(module.named_modules())
    for name, kept in plan.layers.items():
        if name not in parts:
            raise BadInputError("pruning plan", got=f"layers {name!r}", expected="a model that has them")
        drop_layers(module, name, kept)
    parts = dict(module.named_modules())
    for axis, sides in ((0, plan.rows), (1, plan.columns)):
        for name, kept in sides.items():
            size = 0 if name not in parts else _size(parts[name], axis)
            if max(kept, default=0) >= size:
                raise BadInputError(
                    "pruning plan", got=f"feature {max(kept, default=0)} of {name!r}",
                    expected=f"a model that has it; this one has {size}",
                )  # fmt: skip
            _slice(parts[name], axis, np.asarray(kept))
    for name, numbers in plan.attributes.items():
        for attribute, number in numbers.items():
            setattr(parts[name], attribute, number)
    _set_config(module, plan.config)


def shrink(module: nn.Module, kept: Iterable[tuple[UnitGroup, Sequence[int]]], run: Run) -> PruningPlan:
    """Keeps some units of groups, in place, and proves that nothing else was changed.

    Args:
        module: The model.
        kept: Groups, each with the units that stay.
        run: Calls the model on real inputs; its outputs are compared.

    Raises:
        CheckFailedError: The smaller model does not compute the same, so some number in it is not what it
            seemed to be. The model is as it was.
        BadInputError: No unit of a group would stay, or one is asked for that there is not.
    """
    chosen = [(group, np.array(sorted(set(map(int, units))))) for group, units in kept]
    for group, units in chosen:
        if not len(units) or units[0] < 0 or units[-1] >= group.count:
            raise BadInputError(
                f"pruning of {group.name}",
                got=f"units {units.tolist()}",
                expected=f"some of 0 to {group.count - 1}, at least one",
            )
    chosen = [(group, units) for group, units in chosen if len(units) < group.count]
    if not chosen:
        return PruningPlan()
    with masked(module, chosen):
        expected = _outputs(run)
    config = dict(_config_numbers(module, chosen))
    found: list[str] = []
    for doubtful in (True, False):
        plan = _plan(module, chosen, config, doubtful=doubtful)
        undo = _Undo(module, plan)
        try:
            apply_plan(module, plan)
            problem = _difference(expected, _outputs(run))
        except (RuntimeError, ValueError, IndexError) as error:
            problem = f"it fails: {str(error).splitlines()[0][:120]}"
        except BaseException:
            undo()
            raise
        if not problem:
            return plan
        undo()
        found.append(problem)
    raise CheckFailedError(
        f"pruning of {type(module).__name__}",
        got=f"the smaller model does not compute what the model with zeros in these places does: {found[0]}",
        expected="the same",
        remedy="The model is unchanged; prune other units, or with the same number in each layer",
    )


@contextlib.contextmanager
def masked(module: nn.Module, chosen: Iterable[tuple[UnitGroup, npt.NDArray[np.int64]]]) -> Iterator[None]:
    """The model as if units were gone: what reads them gets zeros."""
    import torch

    parts = dict(module.named_modules())

    def zeros(mask: torch.Tensor) -> Any:
        return lambda _part, given: (given[0] * mask.to(given[0]), *given[1:])

    handles = []
    try:
        for group, units in chosen:
            mask = torch.zeros(group.columns.size)
            mask[torch.from_numpy(group.columns[units].reshape(-1))] = 1
            handles.append(parts[group.name].register_forward_pre_hook(zeros(mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(run: Run) -> list[torch.Tensor]:
    import torch

    from onnxsmith.training.units import tensors_of

    with torch.no_grad():
        return [t.detach().clone() for t in tensors_of(run()) if t.is_floating_point()]


def _difference(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> str:
    """Where outputs differ; empty where they do not."""
    if len(expected) != len(got) or not expected:
        return f"{len(got)} outputs for {len(expected)}"
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one.shape != other.shape:
            return f"output {number} has the shape {tuple(other.shape)}, not {tuple(one.shape)}"
        bound = _TOLERANCE * max(float(one.abs().max()), 1e-6)
        largest = float((one.float() - other.float()).abs().max())
        if not largest <= bound:
            return f"output {number} differs by {largest:.2g}, more than {bound:.2g}"
    return ""


def _plan(
    module: nn.Module,
    chosen: Sequence[tuple[UnitGroup, npt.NDArray[np.int64]]],
    config: Mapping[str, Any],
    *,
    doubtful: bool,
) -> PruningPlan:
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for group, units in chosen:
        columns[group.name] = np.sort(group.columns[units].reshape(-1)).tolist()
        for name, found in group.rows.items():
            rows[name] = np.sort(found[units].reshape(-1)).tolist()
        for name, numbers in _numbers(module, group, len(units), doubtful=doubtful):
            attributes.setdefault(name, {}).update(numbers)
    return PruningPlan({}, rows, columns, attributes, config)


def _numbers(
    module: nn.Module, group: UnitGroup, kept: int, *, doubtful: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    """Numbers of the modules around a group that are one of its sizes, and what they become."""
    widths = {rows.shape[1] for rows in (*group.rows.values(), group.columns)}
    unit = math.gcd(*widths)
    sizes = {group.count * width for width in widths} | {group.count * width // unit for width in widths}
    sizes.add(group.count)
    for name in _owners(group):
        found = {
            attribute: value * kept // group.count
            for attribute, value in vars(module.get_submodule(name)).items()
            if type(value) is int
            and value in sizes
            and not _NO_COUNT.search(attribute)
            and (doubtful or not re.search(r"hidden|embed|in_feat", attribute))
            and attribute not in ("in_features", "out_features", "nf", "nx")
        }
        if found:
            yield name, found


def _owners(group: UnitGroup) -> list[str]:
    """The modules that a group's projections are in, up to the one that holds all of them."""
    paths = [name.split(".") for name in group.modules]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    found = {".".join(path[:end]) for path in paths for end in range(max(shared, 1), len(path))} - {""}
    return sorted(found)


def _config_numbers(
    module: nn.Module, chosen: Sequence[tuple[UnitGroup, npt.NDArray[np.int64]]]
) -> Iterator[tuple[str, Any]]:
    """What the configuration says about these sizes, where it is the same for all layers."""
    config = getattr(module, "config", None)
    if config is None:
        return
    names = set(vars(config)) | set(getattr(type(config), "attribute_map", {}).values())
    for kind, pattern in (("heads", _HEADS), ("neurons", _WIDTHS)):
        groups = [(group, units) for group, units in chosen if group.kind == kind]
        if len({(group.count, len(units)) for group, units in groups}) != 1:
            continue
        group, units = groups[0]
        widths = [rows.shape[1] for rows in (*group.rows.values(), group.columns)]
        unit = math.gcd(*widths)
        sizes = {group.count * width // unit for width in widths} | {group.count}
        for name in sorted(names):
            value = getattr(config, name, None)
            if type(value) is int and value in sizes and pattern.search(name) and not _NO_COUNT.search(name):
                yield name, value * len(units) // group.count
        owners = [module.get_submodule(name) for name in _owners(group)] if kind == "heads" else []
        # Else it would be computed from the number of heads when the model is loaded again.
        if getattr(config, "head_dim", None) is None and any(vars(o).get("head_dim") == unit for o in owners):
            yield "head_dim", unit
        if kind == "neurons" and getattr(config, "n_inner", 0) is None:
            yield "n_inner", len(units)


def _set_config(module: nn.Module, changes: Mapping[str, Any]) -> None:
    config = getattr(module, "config", None)
    for name, value in changes.items():
        setattr(config, name, value)


def _size(part: Any, axis: int) -> int:
    import torch

    weight = part.weight
    return int(weight.shape[axis if isinstance(part, torch.nn.Linear) else 1 - axis])


def _slice(part: Any, axis: int, kept: npt.NDArray[np.int64]) -> None:
    """Keeps rows (axis 0) or columns (axis 1) of a projection, as new parameters."""
    import torch
    from torch import nn

    index = torch.from_numpy(np.ascontiguousarray(kept)).to(part.weight.device)
    is_linear = isinstance(part, nn.Linear)
    at = axis if is_linear else 1 - axis
    part.weight = nn.Parameter(
        part.weight.detach().index_select(at, index).contiguous(), part.weight.requires_grad
    )
    if axis == 0 and part.bias is not None:
        part.bias = nn.Parameter(part.bias.detach().index_select(0, index), part.bias.requires_grad)
    names = ("out_features", "in_features") if is_linear else ("nf", "nx")
    if hasattr(part, names[axis]):
        setattr(part, names[axis], len(kept))


class _Undo:
    """Puts a model back as it was before a plan of rows and columns."""

    def __init__(self, module: nn.Module, plan: PruningPlan) -> None:
        parts = dict(module.named_modules())
        self._numbers: list[tuple[Any, str, Any]] = []
        for name in {*plan.rows, *plan.columns}:
            part = parts[name]
            for attribute in ("weight", "bias", "in_features", "out_features", "nf", "nx"):
                if hasattr(part, attribute):
                    self._numbers.append((part, attribute, getattr(part, attribute)))
        for name, numbers in plan.attributes.items():
            self._numbers += [(parts[name], key, getattr(parts[name], key)) for key in numbers]
        config = getattr(module, "config", None)
        self._numbers += [(config, key, getattr(config, key, _ABSENT)) for key in plan.config]

    def __call__(self) -> None:
        for owner, attribute, value in self._numbers:
            if value is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)
