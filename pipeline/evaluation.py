"""Models on labelled data: metrics with intervals, and whether a difference is more than chance."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.datasets import Dataset, load_dataset
from onnxsmith.pipeline.task_runs import DEFAULT_METRICS, NEEDS_ALL_ROWS, TASK_RUNS, RunSettings, run_task
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

if TYPE_CHECKING:
    from onnxsmith.runtime import Session
    from onnxsmith.runtime.metrics import Metric, Outcome
    from onnxsmith.runtime.resampling import Difference, Interval

__all__ = ["Evaluation", "evaluate_model", "judge"]

# After so many, what was predicted is kept whatever comes.
_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How good one model is on one provider.

    Attributes:
        name: The model.
        provider: Where it ran.
        task: What it did.
        data: On what.
        metrics: Name to value and interval.
        differences: Name to the difference to the reference; empty without one.
        reference: The reference's name, or None.
        details: For labels: scores of each class, and the confusion matrix.
        rows: How many were judged.
        interrupted: Whether the run ended before it had seen all rows.
    """

    name: str
    provider: str
    task: str
    data: str
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    reference: str | None
    details: Mapping[str, Any]
    rows: int
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = dataclasses.asdict(self)
        for name, difference in self.differences.items():
            plain["differences"][name]["significant"] = difference.significant
        return plain


def evaluate_model(
    model: Path,
    *,
    task: str,
    data: str,
    metrics: Sequence[str] = (),
    providers: Sequence[str] = ("cpu",),
    reference: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    resamples: int = 1000,
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> list[Evaluation]:
    """Measures a model on labelled data, on each provider.

    Args:
        model: An artifact or ONNX file with a tokenizer beside it.
        task: What it does; see ``onnxsmith.pipeline.task_runs.TASK_RUNS``.
        data: Labelled rows; see ``onnxsmith.pipeline.datasets.load_dataset``.
        metrics: Names; the usual ones of the task where empty.
        providers: Execution providers.
        reference: A source of a PyTorch model, or an ONNX model, that each difference is tested against.
        columns: What a column is for to its name.
        split: Of a Hugging Face data set or a directory.
        limit: Rows to use.
        resamples: Of intervals and tests.
        settings: How the model is run.
        progress: Who listens.
        on_interrupt: Called where Ctrl-C ended the runs. What was done until then is judged and returned: the
            runs that ended, and the rows of the last one. Where None, or where nothing was done, the
            interrupt goes on to the caller.

    Returns:
        The reference first, where there is one, then one result for each provider.

    Raises:
        OnnxsmithError: It could not be done.
    """
    from onnxsmith.runtime import OrtBackend

    progress = progress or Progress()
    settings = settings or RunSettings()
    if task not in TASK_RUNS:
        run_task(task, None, {}, None, settings)  # type: ignore[arg-type]  # says which tasks there are
    if resamples < 1:
        raise BadInputError("evaluate: --resamples", got=str(resamples), expected="at least 1")
    rows = load_dataset(data, columns=columns, split=split, limit=limit)
    backends = [OrtBackend(provider) for provider in providers]
    package = load_package(model)
    runs: list[tuple[str, str, Outcome, bool]] = []
    total = len(rows) * (len(backends) + (reference is not None))
    with progress.step("evaluate", total) as step:

        def run(name: str, session: Session, files: Mapping[str, bytes]) -> None:
            counted = dataclasses.replace(settings, on_rows=lambda count: step.advance(count, note=name))
            outcomes: list[Outcome] = []
            ended = False
            try:
                for part in _parts(rows, task, settings.batch):
                    outcomes.append(run_task(task, session, files, part, counted))
                ended = True
            finally:
                if outcomes:
                    runs.append((name, session.provider, _joined(outcomes), not ended))

        try:
            if reference is not None:
                with _opened(reference, task) as (session, files):
                    run(reference, session, files)
            for backend in backends:
                with backend.open(package, name=str(model)) as opened:
                    run(str(model), opened, package.files)
        except KeyboardInterrupt:
            if on_interrupt is None or not runs:
                raise
            on_interrupt()
    base = runs[0][2] if reference is not None else None
    found = []
    with progress.step("statistics", len(runs)) as step:
        for number, (name, provider, outcome, cut) in enumerate(runs):
            against = base.take(range(len(outcome))) if base is not None and number else None
            judged = judge(
                name, provider, task, rows, outcome, metrics, against, reference, resamples, settings.seed
            )
            found.append(dataclasses.replace(judged, interrupted=cut))
            step.advance()
    return found


def _parts(rows: Dataset, task: str, batch: int) -> Iterator[Dataset]:
    """Rows some batches at a time, so that an interrupt costs no more than these."""
    # A probe is trained on some rows and judged on others.
    size = len(rows) if task in NEEDS_ALL_ROWS else max(batch, 1) * _BATCHES
    for begin in range(0, len(rows), size):
        yield rows.part(begin, begin + size)


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    references = [one for outcome in outcomes for one in outcome.references]
    predictions = [one for outcome in outcomes for one in outcome.predictions]
    return dataclasses.replace(outcomes[0], references=references, predictions=predictions)


def judge(
    name: str,
    provider: str,
    task: str,
    data: Dataset,
    outcome: Outcome,
    metrics: Sequence[str],
    against: Outcome | None,
    reference: str | None,
    resamples: int,
    seed: int,
) -> Evaluation:
    """Computes the metrics of an outcome, and their differences to another.

    Raises:
        UnknownNameError: A metric that these predictions do not have.
    """
    from onnxsmith.runtime.metrics import details_of, metric_named
    from onnxsmith.runtime.resampling import compare_outcomes, measure

    chosen: list[Metric] = [metric_named(m, outcome.kind) for m in metrics or DEFAULT_METRICS[outcome.kind]]
    values = {m.name: measure(m, outcome, resamples=resamples, seed=seed) for m in chosen}
    differences = {}
    if against is not None:
        differences = {
            m.name: compare_outcomes(m, outcome, against, resamples=resamples, seed=seed) for m in chosen
        }
    return Evaluation(
        name, provider, task, data.where.removeprefix("data "), values, differences,
        reference if against is not None else None, details_of(outcome), len(outcome),
    )  # fmt: skip


@contextlib.contextmanager
def _opened(reference: str, task: str) -> Iterator[tuple[Session, Mapping[str, bytes]]]:
    from onnxsmith.runtime import OrtBackend, TorchBackend

    source = ModelSource.parse(reference)
    if source.is_torch:
        from onnxsmith.exporters import load_torch, torch_program

        loaded = load_torch(source, task=task)
        with TorchBackend().open(torch_program(loaded), name=reference) as session:
            yield session, loaded.files
        return
    assert source.path is not None
    package = load_package(source.path)
    with OrtBackend().open(package, name=reference) as opened:
        yield opened, package.files
