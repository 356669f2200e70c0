"""What a search may choose: the key ``tune`` of a recipe, and the points that it stands for."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from onnxsmith.pipeline.recipe_base import RecipeModel, broken_rule

if TYPE_CHECKING:
    from onnxsmith.graph_passes import PassSpec

__all__ = [
    "Choices",
    "Opening",
    "Point",
    "Range",
    "TuneSpec",
    "alternatives",
    "count_points",
    "enumerate_points",
    "resolve",
]

_ONE_OF, _PRESET = "one_of", "preset"
_OBJECTIVES = (
    "size_mb",
    "latency_ms",
    "latency_vs_original",
    "peak_rss_mb",
    "perplexity",
    "perplexity_increase_pct",
    "kl_to_reference",
    "f1_drop_points",
)

Sampler = Literal["auto", "tpe", "random", "grid", "nsga2"]
Place = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values to choose from."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole ones where all of it is whole."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step) if v is not None)

    def counted(self) -> list[Any] | None:
        """All of them, or None where they cannot be counted."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + i * step for i in range(count)]


Opening = Choices | Range


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing that the search may measure.

    Attributes:
        passes: Names and parameters, in order.
        threads: Intra-op threads of its benchmark; the recipe's where None.
        provider: Where it runs; the recipe's where None.
        parameters: What was chosen, by the names of the choices.
        name: What it is called where it does not come from the search.
        training: Values of the recipe's training that were chosen; see ``TrainingSpec.with_values``.
    """

    passes: tuple[PassSpec, ...]
    threads: int | None = None
    provider: str | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class TuneSpec(RecipeModel):
    """What `onnxsmith tune` searches, for what, and how."""

    passes: tuple[Any, ...] = pydantic.Field(min_length=1)
    """Passes in order. A parameter may be open; `one_of` chooses between lists, `preset` stands for one."""
    training: dict[str, Any] = pydantic.Field(default={})
    """Open values of the recipe's training, such as `prune.heads`. Each choice is trained."""
    threads: Any = None
    """Intra-op threads: a number, or open. evaluation.benchmark.threads where absent."""
    provider: Any = None
    """Execution provider: a name, or open. The recipe's where absent."""
    objectives: tuple[str, ...] = ()
    """What is made as small as possible; `choose` where empty. Several give a Pareto front."""
    sampler: Sampler = "auto"
    """How points are chosen: tpe, random, grid, nsga2; auto is grid where all points fit into the trials, \
nsga2 for several objectives, else tpe."""
    trials: int = pydantic.Field(default=40, ge=1)
    """Points tried; those that stop early count."""
    timeout_s: float | None = pydantic.Field(default=None, gt=0)
    """Seconds after which no point is begun any more."""
    workers: int = pydantic.Field(default=1, ge=1)
    """Processes that make and score points. Speed is measured alone all the same."""
    held_out: float = pydantic.Field(default=0.5, gt=0, lt=1)
    """Share of the evaluation data that the search never sees; the result is judged on it alone."""
    folds: int = pydantic.Field(default=1, ge=1, le=20)
    """Parts that the search's data are cut into; passes that need data are fitted without the part that \
they are scored on."""
    margin: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Share of a budget of accuracy that the search may use; below 1 it leaves room for other data."""
    prune: bool = True
    """Stop a point as soon as it cannot be chosen any more."""

    @pydantic.model_validator(mode="after")
    def _valid(self) -> TuneSpec:
        _check_steps(self.passes, ("passes",))
        for key, value in self.training.items():
            alternatives(value, ("training", key))
        kinds: dict[str, type] = {"threads": int, "provider": str}
        for key, kind in kinds.items():
            value = getattr(self, key)
            values = [] if value is None else alternatives(value, (key,))
            for one in values:
                if not isinstance(one, kind) or isinstance(one, bool) or (isinstance(one, int) and one < 1):
                    wanted = "a number of at least 1" if kind is int else "a name"
                    raise broken_rule((key,), _shown(one), f"{wanted}, or one to choose from")
        for number, name in enumerate(self.objectives):
            if name not in _OBJECTIVES and not name.endswith(("_drop_points", "_drop_pct")):
                raise broken_rule(
                    ("objectives", number), f"unknown objective {name!r}",
                    _named(name, [*_OBJECTIVES, "METRIC_drop_points", "METRIC_drop_pct"]),
                )  # fmt: skip
        if self.sampler == "grid" and count_points(self) is None:
            raise broken_rule(
                ("sampler",), "grid, and a range of numbers that cannot be counted", "a step in each range"
            )
        return self


def count_points(spec: TuneSpec) -> int | None:
    """How many points there are; None where a range cannot be counted."""

    def of(value: Any) -> int | None:
        opening = _opening(value)
        if isinstance(opening, Choices):
            return len(opening.values)
        if isinstance(opening, Range):
            values = opening.counted()
            return None if values is None else len(values)
        if isinstance(value, Mapping):
            return _product(of(inner) for inner in value.values())
        return 1

    def of_steps(steps: Sequence[Any]) -> int | None:
        return _product(of_step(step) for step in steps)

    def of_step(step: Any) -> int | None:
        if isinstance(step, Mapping) and _ONE_OF in step:
            counts = [of_steps(_listed(steps)) for steps in step[_ONE_OF].values()]
            return None if None in counts else sum(c for c in counts if c is not None)
        return of(step)

    return _product([of(spec.training), of_steps(spec.passes), of(spec.threads), of(spec.provider)])


def resolve(spec: TuneSpec, suggest: Callable[[str, Opening], Any]) -> Point:
    """Makes a point, asking for each choice when it is reached.

    Args:
        spec: The space.
        suggest: Gives a value for the name of a choice and what it may be.
    """
    from onnxsmith.graph_passes import PRESETS

    chosen: dict[str, Any] = {}

    def ask(name: str, opening: Opening) -> Any:
        unique, number = name, 2
        while unique in chosen:
            unique, number = f"{name} {number}", number + 1
        chosen[unique] = value = suggest(unique, opening)
        return value

    def close(value: Any, name: str) -> Any:
        opening = _opening(value)
        if opening is not None:
            return ask(name, opening)
        if isinstance(value, Mapping):
            return {key: close(inner, f"{name}.{key}") for key, inner in value.items()}
        return value

    def walk(steps: Sequence[Any], prefix: str) -> Iterator[PassSpec]:
        for step in steps:
            if isinstance(step, str):
                yield step, {}
                continue
            ((name, value),) = step.items()
            if name == _PRESET:
                yield from PRESETS[close(value, f"{prefix}preset")]
            elif name == _ONE_OF:
                branch = ask(f"{prefix}one_of", Choices(tuple(value)))
                yield from walk(_listed(value[branch]), f"{prefix}{branch}: ")
            else:
                yield name, close(value or {}, f"{prefix}{name}")

    # First, so that points of one training follow each other.
    training = {key: close(value, f"training {key}") for key, value in spec.training.items()}
    passes = tuple(walk(spec.passes, ""))
    threads, provider = close(spec.threads, "threads"), close(spec.provider, "provider")
    return Point(passes, threads, provider, chosen, training=training)


def enumerate_points(spec: TuneSpec) -> Iterator[dict[str, Any]]:
    """What is chosen in each of all points, in order. Every range has to be one that can be counted."""
    places: list[int] = []
    while True:
        counts: list[int] = []

        def take(_: str, opening: Opening, counts: list[int] = counts) -> Any:
            values = opening.values if isinstance(opening, Choices) else opening.counted()
            assert values is not None
            if len(counts) == len(places):
                places.append(0)
            counts.append(len(values))
            return values[places[len(counts) - 1]]

        yield dict(resolve(spec, take).parameters)
        # The last choice changes first; those behind it are asked anew.
        while places and places[-1] + 1 >= counts[len(places) - 1]:
            places.pop()
        if not places:
            return
        places[-1] += 1


def _product(counts: Any) -> int | None:
    found = list(counts)
    return None if None in found else math.prod(found)


def _listed(steps: Any) -> Sequence[Any]:
    return steps if isinstance(steps, list | tuple) else () if steps is None else (steps,)


def _opening(value: Any) -> Opening | None:
    if not isinstance(value, Mapping):
        return None
    keys = set(value)
    if keys == {"choices"} and isinstance(value["choices"], list | tuple):
        return Choices(tuple(value["choices"]))
    if {"low", "high"} <= keys <= {"low", "high", "step", "log"}:
        return Range(value["low"], value["high"], value.get("step"), bool(value.get("log", False)))
    return None


def alternatives(value: Any, at: Place) -> list[Any]:
    """All values of a choice that can be counted, and the ends of a range.

    Raises:
        PydanticCustomError: It is no proper choice.
    """
    opening = _opening(value)
    if isinstance(opening, Choices):
        if not opening.values:
            raise broken_rule((*at, "choices"), "no value", "at least one")
        return list(opening.values)
    if isinstance(opening, Range):
        for key in ("low", "high", "step"):
            number = getattr(opening, key)
            if (number is not None or key != "step") and (
                isinstance(number, bool) or not isinstance(number, int | float)
            ):
                raise broken_rule((*at, key), _shown(number), "a number")
        if not opening.low < opening.high:
            raise broken_rule((*at, "high"), f"{opening.high}, and low is {opening.low}", "a higher number")
        if opening.step is not None and not opening.step > 0:
            raise broken_rule((*at, "step"), str(opening.step), "a number above 0")
        if opening.log and (opening.step is not None or not opening.low > 0):
            raise broken_rule((*at, "log"), "true", "low above 0 and no step")
        return [opening.low, opening.high]
    if isinstance(value, Mapping) and set(value) & {"choices", "low", "high"}:
        wanted = "choices alone, or low and high, with step or log"
        raise broken_rule(at, f"the keys {', '.join(map(str, value))}", wanted)
    return [value]


def _check_steps(steps: Sequence[Any], at: Place) -> None:
    from onnxsmith.graph_passes import PRESETS, pass_names

    for number, step in enumerate(steps):
        place = (*at, number)
        if not isinstance(step, str) and not (isinstance(step, Mapping) and len(step) == 1):
            wanted = "the name of a pass, {name: {parameter: value}}, {preset: NAME} or {one_of: {...}}"
            raise broken_rule(place, _shown(step), wanted)
        name, value = (step, {}) if isinstance(step, str) else next(iter(step.items()))
        if name == _PRESET:
            for preset in alternatives(value, (*place, _PRESET)):
                if preset not in PRESETS:
                    raise broken_rule(
                        (*place, _PRESET), f"unknown preset {preset!r}", _named(str(preset), sorted(PRESETS))
                    )
        elif name == _ONE_OF:
            if not isinstance(value, Mapping) or not value:
                raise broken_rule((*place, _ONE_OF), _shown(value), "names, each with a list of passes")
            for branch, inner in value.items():
                _check_steps(_listed(inner), (*place, _ONE_OF, branch))
        elif name not in pass_names():
            known = [*pass_names(), _PRESET, _ONE_OF]
            raise broken_rule(place, f"unknown pass {name!r}", _named(str(name), known))
        else:
            _check_parameters(name, value, (*place, name) if isinstance(step, Mapping) else place)


def _check_parameters(name: str, given: Any, at: Place) -> None:
    """Each value of each parameter is one that the pass takes."""
    from onnxsmith.errors import BadInputError
    from onnxsmith.graph_passes import load_pass

    if given is not None and not isinstance(given, Mapping):
        raise broken_rule(at, _shown(given), "a mapping of parameters to values")
    kind = load_pass(name)
    known = kind.parameters()
    varied = {}
    for key, value in (given or {}).items():
        if key not in known:
            got = f"unknown parameter {key!r} of {name}"
            raise broken_rule((*at, key), got, _named(str(key), sorted(known)))
        varied[key] = list(_variations(value, (*at, key)))
    needed = {key: values[0] for key, values in varied.items() if known[key].default is known[key].empty}
    for key, values in varied.items():
        for value in values:
            try:
                kind.create(needed | {key: value})
            except BadInputError as error:
                raise broken_rule((*at, key), error.got or _shown(value), error.expected or "") from error


def _variations(value: Any, at: Place) -> Iterator[Any]:
    """A value with each choice inside it made in each way, one at a time or all, whichever is less."""
    if isinstance(value, Mapping) and _opening(value) is None:
        alternatives(value, at)
        inner = {key: list(_variations(one, (*at, key))) for key, one in value.items()}
        first = {key: values[0] for key, values in inner.items()}
        yield first
        yield from (
            first | {key: one} for key, values in inner.items() for one in itertools.islice(values, 1, None)
        )
    else:
        yield from alternatives(value, at)


def _named(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"one of {', '.join(known)}" + (f". Did you mean {near[0]!r}?" if near else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:77]}..."
