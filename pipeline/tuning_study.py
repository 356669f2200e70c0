"""Which point is tried next: Optuna, seeded, on SQLite, with budgets as constraints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.errors import DestinationError, require
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.tuning_space import (
    Choices,
    Opening,
    Point,
    Range,
    count_points,
    enumerate_points,
    resolve,
)
from onnxsmith.pipeline.tuning_store import fingerprint
from onnxsmith.pipeline.tuning_trial import Trial, objectives_of

__all__ = ["Study", "chosen_sampler"]

# So many points in a row, drawn at random but for the first, that were tried already: nothing is left.
_PATIENCE = 50
_TPE_START = 10


def chosen_sampler(recipe: Recipe) -> str:
    """What ``sampler: auto`` means for a recipe."""
    spec = recipe.tune
    assert spec is not None
    if spec.sampler != "auto":
        return spec.sampler
    count = count_points(spec)
    if count is not None and count <= spec.trials:
        return "grid"
    return "nsga2" if len(objectives_of(recipe)) > 1 else "tpe"


class Study:
    """The trials of one search. One thread asks and tells; what was told is on disk at once.

    Attributes:
        sampler: How points are chosen.
    """

    def __init__(
        self, recipe: Recipe, database: Path, *, limits: Sequence[str], content: Mapping[str, Any]
    ) -> None:
        """Opens a study, with what an earlier process told it.

        Args:
            recipe: With a key ``tune``.
            database: An SQLite file, which need not be there.
            limits: The names of the budgets.
            content: Hashes of what the recipe names, and versions: other content is another study.

        Raises:
            MissingDependencyError: Optuna is not installed.
            DestinationError: The file is there and is no study, or cannot be written; any call may say so.
        """
        optuna = require("optuna", purpose="onnxsmith tune")
        assert recipe.tune is not None
        self._optuna, self._spec, self._limits = optuna, recipe.tune, ["comparison", *limits]
        self._objectives, self._database = objectives_of(recipe), database
        self.sampler = chosen_sampler(recipe)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Another space is another study; what was measured is used again all the same.
        part = {
            "content": content,
            "tune": recipe.tune.model_dump(exclude={"trials", "timeout_s", "workers"}),
            "recipe": recipe.model_dump(exclude={"tune"}),
        }
        name = f"{recipe.name}-{fingerprint(part)[:12]}"
        with self._asking():
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, load_if_exists=True,
                directions=["minimize"] * len(self._objectives),
            )  # fmt: skip
            done = self._study.get_trials(deepcopy=False)
        self._seen = {self._key_of(trial.params) for trial in done if trial.state.is_finished()}
        self._open: dict[int, Any] = {}
        with self._asking():
            self._sampler = self._sampler_of(recipe, len(done))
            self._random = optuna.samplers.RandomSampler(seed=(recipe.seed + len(done) + 1) % 2**32)
        self._all = list(enumerate_points(recipe.tune)) if self.sampler == "grid" else None
        for trial in done:
            if not trial.state.is_finished():
                self._take_up(trial)

    def told(self) -> list[Trial]:
        """What earlier processes measured, in order."""
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished() and "result" in trial.user_attrs:
                point = resolve(self._spec, functools.partial(_recall, trial.params))
                known = json.loads(trial.user_attrs["result"])
                reused = known.pop("measured") + known.pop("reused")
                found.append(Trial(trial.number, point, **known, reused=reused))
        return found

    def ask(self) -> tuple[int, Point] | None:
        """The next point that was not tried yet, or None where there seems to be none."""
        for repeated in range(_PATIENCE):
            if self._all is not None and not self._enqueue_next():
                return None
            with self._asking():
                # A sampler that is sure of its best point proposes it again and again.
                self._study.sampler = self._sampler if not repeated else self._random
                trial = self._study.ask()
                point = resolve(self._spec, functools.partial(_suggest, trial))
            key = self._key_of(trial.params)
            if key not in self._seen:
                self._seen.add(key)
                self._open[trial.number] = trial
                return trial.number, point
            with self._asking():
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def tell(self, number: int, trial: Trial) -> None:
        """Says what came of a point."""
        opened = self._open.pop(number)
        broken = trial.broken or ({"comparison": 1.0} if trial.state == "failed" else {})
        with self._asking():
            self._study.sampler = self._sampler
            opened.set_user_attr("broken", [broken.get(name, 0.0) for name in self._limits])
            plain = dataclasses.asdict(trial)
            opened.set_user_attr(
                "result", json.dumps({key: plain[key] for key in plain if key not in ("number", "point")})
            )
        self._end(number, trial.state, trial.values)

    def _end(self, number: int, state: str, values: Mapping[str, float]) -> None:
        with self._asking():
            self._study.sampler = self._sampler
            found = [values.get(name) for name in self._objectives]
            if state == "complete" and None not in found:
                self._study.tell(number, found)
            else:
                self._study.tell(number, state=self._optuna.trial.TrialState.PRUNED)

    def _take_up(self, trial: Any) -> None:
        """Goes on with a point whose process was killed.

        One that waits was not begun: it is the next that is asked for.
        """
        if trial.state is self._optuna.trial.TrialState.WAITING:
            return
        if "result" in trial.user_attrs:
            # Measured, and killed before it was told.
            known = json.loads(trial.user_attrs["result"])
            self._seen.add(self._key_of(trial.params))
            self._end(trial.number, known["state"], known["values"])
            return
        with self._asking():
            # It is tried again, and reuses what was measured.
            self._study.enqueue_trial(trial.params, skip_if_exists=False)
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def close(self) -> None:
        """Gives the file back; points that are open are tried again by the next process."""
        with self._asking():
            self._storage.remove_session()
            self._storage.engine.dispose()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Without Optuna's warnings that something may change in a later version, and with our errors."""
        import sqlalchemy.exc

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (sqlalchemy.exc.SQLAlchemyError, self._optuna.exceptions.StorageInternalError) as error:
            cause = getattr(error, "orig", None) or error.__cause__ or error
            raise DestinationError(
                str(self._database), got=f"SQLite says: {getattr(cause, 'orig', None) or cause}",
                expected="a study of an earlier search, or no such file, and a disk with room",
                remedy="Remove the file: what was measured is kept beside it, and used again",
            ) from error  # fmt: skip

    def _enqueue_next(self) -> bool:
        """Has the next point of a grid tried, if there is one that was not and none waits already."""
        assert self._all is not None
        if self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.WAITING,)):
            return True
        for parameters in self._all:
            plain = {name: _plain(value) for name, value in parameters.items()}
            if self._key_of(plain) not in self._seen:
                with self._asking():
                    self._study.enqueue_trial(plain)
                return True
        return False

    def _key_of(self, parameters: Mapping[str, Any]) -> str:
        return json.dumps(parameters, sort_keys=True, default=str)

    def _sampler_of(self, recipe: Recipe, done: int) -> Any:
        samplers, spec = self._optuna.samplers, self._spec
        # A sampler does not remember where its random numbers were; so they go on from another seed.
        seed = (recipe.seed + 7919 * done) % 2**32
        shared: dict[str, Any] = {"seed": seed}
        if self.sampler in ("random", "grid"):
            return samplers.RandomSampler(**shared)

        def constraints(trial: Any) -> Sequence[float]:
            known = trial.user_attrs.get("broken") or [0.0] * len(self._limits)
            return [float(value) for value in known]

        shared["constraints_func"] = constraints
        if self.sampler == "nsga2":
            size = max(4, min(50, spec.trials // 4))
            return samplers.NSGAIISampler(population_size=size, **shared)
        start = min(_TPE_START, max(2, spec.trials // 3))
        return samplers.TPESampler(n_startup_trials=start, constant_liar=spec.workers > 1, **shared)


def _suggest(trial: Any, name: str, opening: Opening) -> Any:
    if isinstance(opening, Range):
        if opening.is_whole:
            return trial.suggest_int(
                name, opening.low, opening.high, step=int(opening.step or 1), log=opening.log
            )
        return trial.suggest_float(name, opening.low, opening.high, step=opening.step, log=opening.log)
    assert isinstance(opening, Choices)
    # Optuna keeps plain values only; lists and mappings go by their text.
    texts = {_text(value): value for value in opening.values}
    return texts[_text(trial.suggest_categorical(name, [_plain(value) for value in opening.values]))]


def _recall(parameters: Mapping[str, Any], name: str, opening: Opening) -> Any:
    value = parameters[name]
    if isinstance(opening, Choices):
        return next(one for one in opening.values if _text(one) == _text(value))
    return value


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _text(value: Any) -> str:
    return json.dumps(_plain(value))
