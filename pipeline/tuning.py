"""The search for the best variant under budgets: measured on some data, judged on data that it never saw."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, LackingError, OnnxsmithError, SourceError, require
from onnxsmith.package_io import MANIFEST_NAME
from onnxsmith.pipeline.artifact import to_plain, verify_artifact
from onnxsmith.pipeline.context_fitting import fit_context
from onnxsmith.pipeline.datasets import load_dataset
from onnxsmith.pipeline.recipe import Recipe, load_recipe
from onnxsmith.pipeline.run import report_nothing, run_recipe
from onnxsmith.pipeline.staging import beside, check_destination, write_beside
from onnxsmith.pipeline.texts import load_text, text_sha256
from onnxsmith.pipeline.tuning_choice import choose_trial, plain_tuning
from onnxsmith.pipeline.tuning_recipe import plain_recipe
from onnxsmith.pipeline.tuning_space import Point
from onnxsmith.pipeline.tuning_store import (
    MeasurementStore,
    alone_in,
    fingerprint,
    measuring_environment,
    source_sha256,
)
from onnxsmith.pipeline.tuning_study import Study
from onnxsmith.pipeline.tuning_training import TrainedModels
from onnxsmith.pipeline.tuning_trial import Trial, TrialRunner, objectives_of
from onnxsmith.pipeline.tuning_workers import LocalLane, ProcessLane, Room, bench_of
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource, resolve_path

__all__ = ["TuneResult", "tune_recipe"]

_NOTE = "artifact.json"


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """What a search came to.

    Attributes:
        tuning: The search as plain data; see ``plain_tuning``.
        report: Of the chosen point on the data that were held out; None where no point was chosen or the
            search was interrupted.
        directory: Where the search keeps what it knows, and the plain recipe of its result.
        destination: The artifact.
        measured: Measurements that this call made; 0 where all of them were known.
        interrupted: Whether it was ended before it was done.
    """

    tuning: Mapping[str, Any]
    report: Mapping[str, Any] | None
    directory: Path
    destination: Path
    measured: int
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """Whether a point was chosen that keeps the budgets on held-out data too."""
        return self.report is not None and bool(self.report["passed"])

    @property
    def verdict(self) -> str:
        """What came of it, in words."""
        if self.interrupted:
            return f"interrupted after {len(self.tuning['trials'])} points; run it again and it goes on"
        if self.report is None or self.tuning["chosen"] is None:
            return str(self.tuning["why"])
        evaluated = self.report["recipe"]["evaluation"]
        on = " on held-out data" if evaluated["perplexity"] or evaluated["task"] else " when measured again"
        if self.passed:
            return f"{self.tuning['why']}. It holds{on}"
        return f"{self.tuning['why']}. It does not hold{on}: {self.report['verdict']}"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = dataclasses.asdict(self) | {"passed": self.passed, "verdict": self.verdict}
        return plain | {"directory": str(self.directory), "destination": str(self.destination)}


def tune_recipe(
    recipe: Recipe,
    destination: Path,
    *,
    base: Path | None = None,
    store: Path | None = None,
    force: bool = False,
    command: str = "",
    on_trial: Callable[[Trial], None] = lambda _: None,
    progress: Progress | None = None,
) -> TuneResult:
    """Searches what the key ``tune`` of a recipe opens, and makes the artifact of the best point.

    Points are measured on a part of the evaluation data. The artifact is what ``run_recipe`` makes of the
    chosen point's plain recipe, whose budgets are held against the rest of the data.

    What was measured is kept beside the artifact, so a search that was ended goes on where it was, and one
    that was done is not done again.

    Args:
        recipe: With a key ``tune``.
        destination: Where the artifact is to be.
        base: The directory that relative paths of the recipe start from.
        store: The directory of measurements and trials; ``<destination>.tune`` where None.
        force: Whether an artifact that no search made may be replaced.
        command: The command line, for the report.
        on_trial: Called with each trial when it is done.
        progress: Who listens.

    Raises:
        BadInputError: The recipe has nothing to tune.
        MissingDependencyError: Optuna is not installed.
        OnnxsmithError: The job could not be done.
    """
    if recipe.tune is None:
        raise BadInputError(
            f"recipe {recipe.name}", got="no key tune", expected="one that says what may be chosen",
            remedy="`onnxsmith run` makes what a recipe says",
        )  # fmt: skip
    require("optuna", purpose="onnxsmith tune")
    recipe = fit_context(recipe, ModelSource.parse(recipe.source, base=base))
    directory = (store or beside(destination, ".tune")).absolute()
    check_destination(destination, force=True)
    directory.mkdir(parents=True, exist_ok=True)
    with alone_in(directory):
        search = _Search(recipe, directory, base, progress or Progress(), on_trial)
        ours = search.made_by_us(destination)
        check_destination(destination, force=force or ours)
        try:
            interrupted = search.run()
        finally:
            search.close()
        chosen, tuning = search.conclude()
        _write(directory / "tune.json", tuning)
        if interrupted:
            return TuneResult(tuning, None, directory, destination, search.measured, interrupted=True)
        if chosen is None:
            report = search.report_nothing(tuning, destination, command)
            return TuneResult(tuning, report, directory, destination, search.measured)
        text = plain_recipe(recipe, chosen, base=base, target=directory, why=tuning["why"])
        write_beside(directory / "recipe.yaml", text)
        report = search.judge(destination, tuning, force=force or ours, command=command)
        return TuneResult(tuning, report, directory, destination, search.measured)


class _NotPreparedError(Exception):
    """The model cannot be exported or asked: not a fault of a point, and an error of the whole search."""

    def __init__(self, error: OnnxsmithError) -> None:
        super().__init__(str(error))
        self.error = error


class _Search:
    """One search, with what it knows and who works for it."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        base: Path | None,
        progress: Progress,
        on_trial: Callable[[Trial], None],
    ) -> None:
        assert recipe.tune is not None
        self._recipe, self._spec, self._directory, self._base = recipe, recipe.tune, directory, base
        self._progress, self._on_trial = progress, on_trial
        self._source = ModelSource.parse(recipe.source, base=base)
        if not self._source.is_torch:
            raise SourceError(
                recipe.source, got="an ONNX model", expected="a PyTorch model to compare with"
            )  # fmt: skip
        self._environment = measuring_environment()
        self._content = {"source": source_sha256(self._source), **_data_hashes(recipe, base)}
        self._store = MeasurementStore(directory / "measurements")
        self._work = directory / "work"
        shutil.rmtree(self._work, ignore_errors=True)
        self._room = Room()
        self._trials: list[Trial] = []
        self._lanes: list[LocalLane | ProcessLane] = []
        self._models = TrainedModels(
            recipe, self._source, self._work, states=directory / "training", base=base, progress=progress,
            content={**self._content, "versions": self._environment["versions"]},
        )  # fmt: skip
        self._runner = TrialRunner(
            recipe, self._store, content=self._content, environment=self._environment,
            shared=self._room.shared, alone=self._room.alone, best=self._smallest,
            trained=self._models.identity, prepare=self._prepare,
        )  # fmt: skip
        self._study = Study(
            recipe,
            directory / "study.db",
            limits=list(self._runner.limits),
            content={**self._content, "versions": self._environment["versions"]},
        )
        self._final = 0

    @property
    def measured(self) -> int:
        """Measurements that were made by this search and not by an earlier one."""
        return sum(trial.measured for trial in self._trials) + self._final

    def run(self) -> bool:
        """Tries points until there are enough, and says whether it was interrupted."""
        self._trials = self._study.told()
        waiting = [Trial(-1, Point(tuple(v.specs()), name=v.name)) for v in self._recipe.variants]
        deadline = math.inf if self._spec.timeout_s is None else time.monotonic() + self._spec.timeout_s
        done = len(self._trials)

        def following() -> Trial | None:
            nonlocal done
            if waiting:
                return waiting.pop(0)
            if done >= self._spec.trials or time.monotonic() > deadline:
                return None
            asked = self._study.ask()
            if asked is None:
                return None
            done += 1
            return Trial(*asked)

        with self._progress.step("tune", self._spec.trials + len(waiting)) as step:
            step.advance(done, note=f"{done} known")

            def ended(trial: Trial) -> None:
                if trial.number >= 0:
                    self._study.tell(trial.number, trial)
                self._trials.append(trial)
                self._on_trial(trial)
                step.advance(note=f"{trial.name}: {trial.reason or _said(trial.values)}")

            try:
                if self._spec.workers == 1:
                    lane = LocalLane(lambda: bench_of(**self._arguments()))
                    self._lanes = [lane]
                    while (trial := following()) is not None:
                        self._runner.run(trial, lane)
                        ended(trial)
                else:
                    self._run_side_by_side(following, ended)
            except KeyboardInterrupt:
                return True
            except _NotPreparedError as problem:
                raise problem.error from problem
        return False

    def _run_side_by_side(
        self, following: Callable[[], Trial | None], ended: Callable[[Trial], None]
    ) -> None:
        """Several trials at a time; this thread asks and tells, and one thread waits for each process."""
        self._lanes = [ProcessLane(self._arguments) for _ in range(self._spec.workers)]
        free = list(self._lanes)
        running: dict[concurrent.futures.Future[None], tuple[Trial, Any]] = {}
        with concurrent.futures.ThreadPoolExecutor(len(free), thread_name_prefix="tune") as pool:
            try:
                while True:
                    while free and (trial := following()) is not None:
                        lane = free.pop()
                        running[pool.submit(self._runner.run, trial, lane)] = (trial, lane)
                    if not running:
                        return
                    first = concurrent.futures.FIRST_COMPLETED
                    for future in concurrent.futures.wait(running, return_when=first).done:
                        trial, lane = running.pop(future)
                        future.result()
                        free.append(lane)
                        ended(trial)
            except BaseException:
                # The threads see that their processes are gone.
                for lane in self._lanes:
                    lane.stop()
                raise

    def close(self) -> None:
        """Ends processes and frees the disk; measurements stay."""
        for lane in self._lanes:
            lane.close()
        self._study.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def conclude(self) -> tuple[Trial | None, dict[str, Any]]:
        """The chosen point, and the search as plain data."""
        chosen, why = choose_trial(self._recipe, self._trials, self._runner.limits)
        reference = self._models.reference
        note = self._store.get(f"reference-{fingerprint(self._content)[:40]}")
        tuning = plain_tuning(
            self._recipe, self._trials, sampler=self._study.sampler, limits=self._runner.limits,
            chosen=chosen, why=why, reference=reference or note,
        )  # fmt: skip
        return chosen, tuning

    def made_by_us(self, destination: Path) -> bool:
        """Whether an earlier search of this directory made the artifact that is there."""
        note = self._note()
        return note is not None and note["manifest"] == _manifest_sha256(destination)

    def judge(
        self, destination: Path, tuning: dict[str, Any], *, force: bool, command: str
    ) -> dict[str, Any]:
        """Makes the artifact and judges it on held-out data, unless that was done and it is still there."""
        path = self._directory / "recipe.yaml"
        plain = load_recipe(path)
        key = fingerprint(
            {
                "recipe": plain.model_dump(mode="json"),
                "content": self._content,
                "environment": self._environment,
                "trials": [trial["name"] for trial in tuning["trials"]],
            }
        )
        note = self._note()
        same = note is not None and note["key"] == key and self.made_by_us(destination)
        if note is not None and same and not verify_artifact(destination):
            report: dict[str, Any] = note["report"]
            return report
        made = run_recipe(
            plain, destination, base=self._directory, force=force, command=command, tuning=tuning,
            progress=self._progress,
        )  # fmt: skip
        self._final = 1
        report = made.to_json()
        note = {"key": key, "manifest": _manifest_sha256(destination), "report": report}
        if made.passed:
            _write(self._directory / _NOTE, note)
        return report

    def report_nothing(self, tuning: dict[str, Any], destination: Path, command: str) -> dict[str, Any]:
        """Leaves a report beside the destination, as a run does in which nothing passes."""
        return report_nothing(
            self._recipe, self._source, destination, tuning=tuning, verdict=tuning["why"], command=command
        ).to_json()

    def _note(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self._directory / _NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"key", "manifest", "report"} <= set(found) else None

    def _smallest(self) -> float | None:
        if objectives_of(self._recipe) != ("size_mb",):
            return None
        return min((t.values["size_mb"] for t in self._trials if t.feasible), default=None)

    def _prepare(self, training: Mapping[str, Any]) -> Path:
        """What points are made from whose training has these values."""
        first = self._models.reference is None
        try:
            found = self._models.prepare(training)
        except OnnxsmithError as error:
            # Another point may be trained better; another export of the same model is not there.
            if self._spec.training and not isinstance(error, LackingError):
                raise
            raise _NotPreparedError(error) from error
        reference = self._models.reference
        if first and reference is not None:
            self._store.put(f"reference-{fingerprint(self._content)[:40]}", reference)
            self._room.needed_bytes = int(2e6 * reference["size_mb"])
        return found

    def _arguments(self) -> dict[str, Any]:
        """The arguments of a bench."""
        self._work.mkdir(exist_ok=True)
        return {
            "recipe": self._recipe, "source": self._recipe.source, "work": self._work, "base": self._base,
            "directory": Path.cwd(),
        }  # fmt: skip


def _data_hashes(recipe: Recipe, base: Path | None) -> dict[str, Any]:
    """Hashes of the data that a recipe names; what is wrong with them is found here."""
    from onnxsmith.pipeline.calibration import CalibrationData

    found: dict[str, Any] = {}
    if (spec := recipe.evaluation.perplexity) is not None:
        found["text"] = text_sha256(load_text(spec.data, base=base))
    if (task := recipe.evaluation.task) is not None:
        rows = load_dataset(task.data, columns=task.columns, split=task.split, limit=task.limit, base=base)
        found["rows"] = fingerprint([list(rows.rows)])
    calibration = CalibrationData.of(recipe.calibration, base=base)
    known = None if calibration is None else calibration.described()
    if calibration is not None and known is not None and calibration.data.endswith(".npz"):
        known["sha256"] = hashlib.sha256(resolve_path(calibration.data, base=base).read_bytes()).hexdigest()
    return {"data": found, "calibration": known}


def _manifest_sha256(directory: Path) -> str | None:
    path = directory / MANIFEST_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _said(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:3])


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    write_beside(path, json.dumps(to_plain(plain), indent=1, ensure_ascii=False) + "\n")
