"""ONNX to ONNX: passes, the registry of them, and the function that runs a list of them on a package."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.environment import give_back_memory
from onnxsmith.errors import PassError
from onnxsmith.graph_passes.presets import PRESETS, PassSpec
from onnxsmith.graph_passes.registry import PASSES, load_pass, make_passes, pass_names
from onnxsmith.package import MAIN, Component, ModelPackage, StepRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.graph_passes.contract import GraphPass

__all__ = [
    "PASSES",
    "PRESETS",
    "PassSpec",
    "load_pass",
    "make_passes",
    "operator_counts",
    "pass_names",
    "run_passes",
]


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator there are, subgraphs included, most frequent first."""
    from onnxsmith.graph_passes.cleanup import operator_counts as count

    return count(model)


def run_passes(
    package: ModelPackage,
    passes: Sequence[GraphPass],
    *,
    on_step: Callable[[StepRecord], None] | None = None,
    context: PassContext | None = None,
    verify: Callable[[ModelPackage, ModelPackage, StepRecord], Mapping[str, Any]] | None = None,
) -> ModelPackage:
    """Runs passes, in order, on every graph of a package.

    The given package is left as it is: graphs are cloned, weights are shared.

    Args:
        package: What to start from.
        passes: What to run.
        on_step: Called after each pass, for progress.
        context: What passes cannot make themselves: the file that weights came from, activations.
        verify: Called after each pass that changed something, with the package before and after it. Raises
            where the pass broke the model; what it returns goes to the record.

    Raises:
        PassError: A pass failed or refused the model.
    """
    result = package.derive()
    waiting = list(passes)
    whole = 0
    while waiting:
        together = 0 if verify is not None or whole else _layerwise(waiting)
        if together > 1:
            records = _run_on_short_stack(result, waiting[:together], context)
            # Where layers cannot be left out, all of these see the whole model.
            whole = together if records is None else 0
        if together > 1 and records is not None:
            del waiting[:together]
        else:
            whole = max(whole - 1, 0)
            records = [_run(result, waiting.pop(0), context, verify)]
        for record in records:
            result.steps = (*result.steps, record)
            if on_step is not None:
                on_step(record)
    return result


def _layerwise(passes: Sequence[GraphPass]) -> int:
    """How many of the first passes may run on a short stack."""
    return next((n for n, one in enumerate(passes) if not getattr(one, "layerwise", False)), len(passes))


def _run_on_short_stack(
    package: ModelPackage, passes: Sequence[GraphPass], context: PassContext | None
) -> list[StepRecord] | None:
    """Runs passes on some of the layers of a deep model, and puts the others back; None where it cannot."""
    from onnxsmith.graph_passes.layer_extension import extended
    from onnxsmith.graph_passes.repeated_layers import shorten

    if len(package.components) != 1:
        return None
    component = package.main
    short = shorten(component.model)
    if short is None:
        return None
    part = dataclasses.replace(package, components={MAIN: Component(short.model)}, steps=())
    try:
        records = [_run(part, one, context, None) for one in passes]
    except PassError:
        # It may fail on the whole model as well, and then says so of that.
        return None
    if all(not record.details.get("changes") for record in records):
        return records
    made = extended(short)
    if made is None:
        return None
    component.model, component.path = made, None
    of = f"{short.kept} of {short.layers} layers"
    return [dataclasses.replace(record, details={**record.details, "of": of}) for record in records]


def _run(
    result: ModelPackage,
    one: GraphPass,
    context: PassContext | None,
    verify: Callable[[ModelPackage, ModelPackage, StepRecord], Mapping[str, Any]] | None,
) -> StepRecord:
    """Runs a pass on every graph of a package, which it changes."""
    from onnxsmith.graph_passes.context import in_context

    details: dict[str, object] = {}
    began = time.perf_counter()
    before = result.derive() if verify is not None else result
    changed = False
    for name, component in result.components.items():
        in_context(component.model, context)
        try:
            outcome = one(component.model)
        finally:
            in_context(component.model, None)
            give_back_memory()
        changes = getattr(outcome, "changes", None)
        if outcome.modified:
            component.path = None
            changed = True
        if changes is not None:
            part = {"changes": changes.count, **changes.details, "skipped": changes.skipped}
            details |= part if len(result.components) == 1 else {name: part}
    _update_config(result, details)
    record = StepRecord(one.name, one.arguments(), time.perf_counter() - began, details)
    if verify is not None and changed:
        found = verify(before, result, record)
        record = dataclasses.replace(record, details={**details, "verified": dict(found)})
    return record


def _update_config(package: ModelPackage, details: Mapping[str, object]) -> None:
    """Writes what a pass changed of the model's sizes into config.json."""
    from onnxsmith.graph_passes.package_config import CONFIG, updated_config

    parts = [details, *(part for part in details.values() if isinstance(part, Mapping))]
    sizes = next((found for part in parts if isinstance(found := part.get(CONFIG), Mapping)), None)
    if sizes and "config.json" in package.files:
        package.files["config.json"] = updated_config(package.files["config.json"], sizes)
