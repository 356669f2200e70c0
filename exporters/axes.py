"""Which axes of a module's inputs may vary, found by running it with other sizes.

An axis is dynamic if the module runs when its size changes, alone or together with the other axes that have
to change with it; by one, or by the stride of a module that only takes multiples. Axes that change together
get one name. Which of them is the batch is tested too: turning the order of the rows of a batch around turns
the order of the results around and does nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.program import AxisSizes

if TYPE_CHECKING:
    import torch

__all__ = ["Axes", "find_axes", "resized"]

Place = tuple[str, int]
Run = Callable[[dict[str, Any]], dict[str, Any]]

# The sizes that comparisons use: what runs with these needs no further limit.
_SMALL = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LARGE = (66, 34, 18, 10)
# What sizes may have to be multiples of.
_STRIDES = (2, 4, 8, 16, 32)
# What inputs of transformers hold, for the names of axes: text and images have batches of their own.
_MODALITIES: Mapping[str, str] = {
    "input_ids": "text",
    "attention_mask": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The dynamic axes of a module.

    Attributes:
        inputs: Input name to its axes: a size, or the name of a dynamic axis.
        outputs: Output name to its axes: a size, the name of a dynamic axis that has the same size, or None
            for a size that is computed from dynamic ones.
        examples: Inputs in which no two dynamic axes have one size, so that a tracer cannot mix them up.
        natural: Name of a dynamic axis to the size that it had in the example.
        limits: Name of a dynamic axis to the sizes that run.
    """

    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str | None, ...]]
    examples: dict[str, torch.Tensor]
    natural: dict[str, int]
    limits: dict[str, AxisSizes]


def resized(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """The tensor with another size on one axis: cut, or continued with its own values from the beginning.

    Values keep their kind that way: indices stay inside their tables, masks stay masks.
    """
    import torch

    index = torch.arange(size) % max(tensor.shape[axis], 1)
    return tensor.index_select(axis, index)


def find_axes(run: Run, examples: Mapping[str, torch.Tensor], *, static: Collection[Place] = ()) -> Axes:
    """Finds the dynamic axes of a module.

    Args:
        run: Runs the module on tensors by name and returns tensors by name; raises where it cannot.
        examples: Inputs that run.
        static: Axes, by input and number, that are known to have one size.
    """
    original = dict(examples)
    base = _widened(run, original)
    groups, steps = _groups(run, base, static)
    names = _names(run, base, groups)
    base = _distinct(run, base, groups, steps)
    step_of = dict(zip(names, steps, strict=True))
    first = run(base)
    named = dict(zip(names, groups, strict=True))
    probes = {name: _outputs_with(run, base, group, step_of[name]) for name, group in named.items()}
    # Half or double: what is divided by a stride does not change by one.
    far = {name: _far_outputs(run, base, group) for name, group in named.items()}
    place_names = {place: name for name, group in zip(names, groups, strict=True) for place in group}
    sizes = {name: base[group[0][0]].shape[group[0][1]] for name, group in zip(names, groups, strict=True)}

    def output_axis(output: str, axis: int, size: int) -> int | str | None:
        def moves(results: dict[str, torch.Tensor] | None) -> bool:
            if results is None or output not in results or results[output].ndim != first[output].ndim:
                return True
            return int(results[output].shape[axis]) != size

        moving = [name for name in named if moves(probes[name]) or moves(far[name])]
        if not moving:
            return size
        only = moving[0]
        results = probes[only]
        same = len(moving) == 1 and results is not None and output in results and size == sizes[only]
        return only if same and results[output].shape[axis] == size + step_of[only] else None  # type: ignore[index]

    return Axes(
        inputs={
            name: tuple(place_names.get((name, axis), int(size)) for axis, size in enumerate(t.shape))
            for name, t in base.items()
        },
        outputs={
            name: tuple(output_axis(name, axis, int(size)) for axis, size in enumerate(t.shape))
            for name, t in first.items()
        },
        examples=base,
        natural={
            name: int(original[group[0][0]].shape[group[0][1]])
            for name, group in zip(names, groups, strict=True)
        },
        limits={name: _limits(run, base, group, step_of[name]) for name, group in named.items()},
    )


def _runs(run: Run, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    try:
        return run(inputs)
    except MemoryError:
        raise
    # Any error of the module says that these sizes do not go together.
    except Exception:
        return None


def _with(base: Mapping[str, torch.Tensor], places: Sequence[Place], size: int) -> dict[str, torch.Tensor]:
    changed = dict(base)
    for name, axis in places:
        changed[name] = resized(changed[name], axis, size)
    return changed


def _outputs_with(
    run: Run, base: dict[str, torch.Tensor], places: Sequence[Place], step: int
) -> dict[str, torch.Tensor] | None:
    name, axis = places[0]
    return _runs(run, _with(base, places, base[name].shape[axis] + step))


def _far_outputs(
    run: Run, base: dict[str, torch.Tensor], places: Sequence[Place]
) -> dict[str, torch.Tensor] | None:
    name, axis = places[0]
    size = int(base[name].shape[axis])
    doubled = _outputs_with(run, base, places, size)
    return doubled if doubled is not None else _outputs_with(run, base, places, size // 2 - size)


def _widened(run: Run, examples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs without axes of size 1 where that can be: size 1 fits any other by broadcasting."""
    base = examples
    for axis in range(max((t.ndim for t in examples.values()), default=0)):
        places = [(n, axis) for n, t in base.items() if t.ndim > axis]
        ones = [place for place in places if base[place[0]].shape[axis] == 1]
        wider = _with(base, ones, 2)
        # All of them, or the batch of one input would be taken for independent of another's.
        if ones and (axis == 0 or len(ones) == len(places)) and _runs(run, wider) is not None:
            base = wider
    return base


def _groups(
    run: Run, base: dict[str, torch.Tensor], static: Collection[Place]
) -> tuple[list[list[Place]], list[int]]:
    """Axes that may change, those that change together in one list; and what their sizes are multiples of."""
    places = [(name, axis) for name, t in base.items() for axis in range(t.ndim)]
    groups: list[list[Place]] = []
    found: list[int] = []
    done: set[Place] = set(static)
    for place in places:
        if place in done:
            continue
        size = base[place[0]].shape[place[1]]
        alike = [p for p in places if p != place and p not in done and base[p[0]].shape[p[1]] == size]
        # Batches are of any size; images, sound and spectra may have to fit strides.
        strides = [s for s in _STRIDES if size % s == 0] if place[1] and base[place[0]].ndim > 2 else []
        for step, others in itertools.product((1, *strides), _companies(place, alike)):
            group = [place, *others]
            if _varies(run, base, group, step):
                groups.append(group)
                found.append(step)
                done.update(group)
                break
    return groups, found


def _varies(run: Run, base: dict[str, torch.Tensor], group: Sequence[Place], step: int) -> bool:
    """Whether the module runs with other sizes of an axis, as long as they are multiples of a step.

    Several other sizes: one that runs may be an accident of broadcasting, and two that are near of a division
    that drops the rest.
    """
    size = int(base[group[0][0]].shape[group[0][1]])
    far = size if size > 1 else 2
    half = size // 2 // step * step
    return all(_outputs_with(run, base, group, change) is not None for change in (step, 2 * step)) and (
        _outputs_with(run, base, group, far if far > 2 * step else 3 * step) is not None
        or (half > 1 and _outputs_with(run, base, group, half - size) is not None)
    )


def _companies(place: Place, alike: Sequence[Place]) -> Iterator[tuple[Place, ...]]:
    """The axes that one may have to change with, the fewest first."""
    yield ()
    at_the_same_index = [p for p in alike if p[1] == place[1]]
    tried: set[tuple[Place, ...]] = {()}
    pairs = [(p,) for p in alike]
    for company in (*pairs, tuple(at_the_same_index), tuple(alike)):
        if company not in tried:
            tried.add(company)
            yield company


def _names(run: Run, base: dict[str, torch.Tensor], groups: Sequence[Sequence[Place]]) -> list[str]:
    batches = [group for group in groups if _is_batch(run, base, group)]
    # What acts on each number alone has no other axis that is a batch: that is the first.
    begun = {name for group in batches for name, axis in group if axis == 0}
    firsts = [group for group in batches if not any(axis and name in begun for name, axis in group)]
    firsts = [group for group in firsts if any(axis == 0 for _, axis in group)] or batches[:1]
    if not firsts:
        # Nothing acts row by row, such as a mean over the batch: what is left is the custom.
        firsts = [group for group in groups if group[0][1] == 0 and base[group[0][0]].ndim > 1][:1]
    found: list[str] = []
    for group in groups:
        name, axis = group[0]
        if any(group is first for first in firsts):
            wanted = "batch" if len(firsts) == 1 else f"{_MODALITIES.get(name, name)}_batch"
        else:
            wanted = _meaning(base[name], axis, {axis for other, axis in group if other == name})
        if wanted in found:
            wanted = f"{name}_{wanted}"
        while wanted in found:
            wanted += f"_{axis}"
        found.append(wanted)
    return found


def _meaning(tensor: torch.Tensor, axis: int, together: set[int]) -> str:
    """What an axis that is no batch is called, by the customs of the field."""
    customs: dict[int, Sequence[str]] = {
        4: ("", "", "height", "width"),
        5: ("", "", "depth", "height", "width"),
    }
    if len(together) > 1 and tensor.ndim in customs and axis >= 2:
        return "size"
    if tensor.ndim in customs and customs[tensor.ndim][axis]:
        return customs[tensor.ndim][axis]
    if not tensor.is_floating_point():
        return "sequence" if axis <= 1 else "length"
    if tensor.ndim == 3:
        return "sequence" if axis < 2 else "length"
    return "length"


def _is_batch(run: Run, base: dict[str, torch.Tensor], group: Sequence[Place]) -> bool:
    """Whether the rows along these axes do not know of each other."""
    import torch

    if len({name for name, _ in group}) < len(group):
        return False
    before, wider = _runs(run, base), _outputs_with(run, base, group, 1)
    turned = _runs(run, dict(base) | {name: base[name].flip(axis) for name, axis in group})
    if before is None or turned is None or wider is None or before.keys() != turned.keys() != wider.keys():
        return False
    size = base[group[0][0]].shape[group[0][1]]
    moved = False
    for name, tensor in before.items():
        if name not in wider or wider[name].ndim != tensor.ndim:
            return False
        moving = [a for a in range(tensor.ndim) if wider[name].shape[a] != tensor.shape[a]]
        if len(moving) > 1 or any(tensor.shape[a] != size for a in moving):
            return False
        expected = tensor.flip(moving[0]) if moving else tensor
        moved = moved or bool(moving)
        if expected.shape != turned[name].shape or not torch.allclose(
            expected.double(), turned[name].double(), rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            return False
    return moved


def _distinct(
    run: Run, base: dict[str, torch.Tensor], groups: Sequence[Sequence[Place]], steps: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The inputs with a size for each group that no other axis has, and that is neither 0 nor 1."""
    dynamic = {place for group in groups for place in group}
    taken = {
        int(size)
        for name, t in base.items()
        for axis, size in enumerate(t.shape)
        if (name, axis) not in dynamic
    }
    for group, step in zip(groups, steps, strict=True):
        name, axis = group[0]
        size = int(base[name].shape[axis])
        smaller, larger = range(size - step, 1, -step), range(size + step, size + 24 * step, step)
        for wanted in itertools.chain((size,), smaller, larger):
            if wanted < 2 or wanted in taken:
                continue
            changed = _with(base, group, wanted)
            if wanted == size or _runs(run, changed) is not None:
                base = changed
                taken.add(wanted)
                break
    return base


def _limits(run: Run, base: dict[str, torch.Tensor], group: Sequence[Place], step: int) -> AxisSizes:
    name, axis = group[0]
    size = int(base[name].shape[axis])

    def works(size: int) -> bool:
        return _runs(run, _with(base, group, size)) is not None

    low = next((s for s in _SMALL if s < size and s % step == 0 and works(s)), size)
    large = [-(-s // step) * step for s in _LARGE]
    if size >= large[0] or works(large[0]):
        return AxisSizes(low, None, step)
    high = next((s for s in large[1:] if s > size and works(s)), size + 2 * step)
    # Between what runs and what does not: the exact end, where it is near enough to be looked for.
    while high < large[0] and works(high + step):
        high += step
    return AxisSizes(low, high, step)
