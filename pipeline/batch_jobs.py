"""The list of a batch: which recipes to run, with which settings, and what each may take."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from onnxsmith._version import __version__
from onnxsmith.errors import RecipeError
from onnxsmith.pipeline._recipe_text import RecipeText
from onnxsmith.pipeline.recipe_placeholders import combinations, slug

if TYPE_CHECKING:
    from onnxsmith.pipeline.recipe import Recipe

__all__ = ["BatchSpec", "Job", "JobSpec", "expand_jobs", "load_batch"]

_NAME = r"^[A-Za-z0-9][\w.-]*$"
# What decides what a job makes, besides its recipe: the libraries that do the work.
_LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers", "gguf", "tokenizers")

# Of a factory, or of a model that is still on the hub: PyTorch and a model of a hundred million weights.
_UNKNOWN = 1_500_000_000


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class JobSpec(_Model):
    """One entry: a recipe, or with a matrix one for each combination."""

    name: Annotated[str, pydantic.Field(pattern=_NAME, max_length=64)]
    """Unique; the artifact's directory below the output."""
    recipe: str
    """A recipe, relative to this file."""
    set: dict[str, Any] = {}
    """Keys of the recipe with dots between their parts, and what to put there."""
    matrix: dict[str, Annotated[list[Any], pydantic.Field(min_length=1)]] = {}
    """The same with several values each: one job for each combination."""
    retries: int | None = pydantic.Field(default=None, ge=0, le=10)
    """How often a job is started again that crashed or took too long; the batch's own where absent."""
    memory_gb: float | None = pydantic.Field(default=None, gt=0)
    """What a job may need at its peak, in 10**9 bytes; what `run` forecasts where absent."""
    timeout_s: float | None = pydantic.Field(default=None, gt=0)
    """Seconds after which a job is ended."""


class BatchSpec(_Model):
    """A list of jobs."""

    schema_version: Literal[1]
    output: str = "artifacts"
    """The directory of the artifacts, relative to the current one."""
    retries: int = pydantic.Field(default=1, ge=0, le=10)
    jobs: Annotated[tuple[JobSpec, ...], pydantic.Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of one recipe.

    Attributes:
        name: Unique in the batch.
        recipe: The file.
        settings: Overrides, as ``--set`` takes them.
        destination: Where its artifact is to be.
        retries: How often it is started again after a crash.
        memory_bytes: What it is expected to need, with the processes that it starts.
        admitted: Whether whoever runs it has seen to it that there is as much.
        timeout_s: Seconds after which it is ended; None for no limit.
        fingerprint: Of all that decides what it makes: recipe, settings, source files and library versions.
    """

    name: str
    recipe: Path
    settings: tuple[str, ...]
    destination: Path
    retries: int
    memory_bytes: int
    timeout_s: float | None
    fingerprint: str
    admitted: bool = False


def load_batch(path: Path) -> BatchSpec:
    """Reads and validates a list of jobs.

    Raises:
        RecipeError: It cannot be read, or does not validate. The message names the line and the key.
    """
    text = RecipeText.read(path)
    try:
        spec = BatchSpec.model_validate(text.data)
    except pydantic.ValidationError as error:
        raise text.explain(error, BatchSpec) from error
    seen: set[str] = set()
    for number, job in enumerate(spec.jobs):
        if job.name in seen:
            where = f"{text.where(['jobs', number, 'name'])}: jobs.{number}.name"
            raise RecipeError(where, got=f"a second job named {job.name!r}", expected="unique names")
        seen.add(job.name)
    return spec


def expand_jobs(spec: BatchSpec, *, base: Path, output: Path) -> list[Job]:
    """One job for each combination of each entry. Every recipe is validated before any job runs.

    Args:
        spec: The list.
        base: The directory that recipes are relative to.
        output: The directory of the artifacts.

    Raises:
        RecipeError: A recipe cannot be read or does not validate, or two jobs have the same name.
    """
    jobs: list[Job] = []
    for entry in spec.jobs:
        for chosen in combinations(entry.matrix):
            name = "-".join([entry.name, *map(slug, chosen.values())])
            settings = tuple(f"{key}={json.dumps(value)}" for key, value in (entry.set | chosen).items())
            jobs.append(_job(entry, name, settings, base=base, output=output, retries=spec.retries))
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen:
            raise RecipeError(f"job {job.name}", got="two jobs of this name", expected="unique names")
        seen.add(job.name)
    return jobs


def _job(
    entry: JobSpec, name: str, settings: tuple[str, ...], *, base: Path, output: Path, retries: int
) -> Job:
    path = (base / entry.recipe).resolve()
    memory, fingerprint = 0, ""
    try:
        memory, fingerprint = _facts(path, settings)
    except RecipeError:
        # The job fails when it is run, and says why; the others do not suffer for it.
        fingerprint = f"invalid-{name}"
    given = entry.memory_gb
    return Job(
        name=name,
        recipe=path,
        settings=settings,
        destination=output / name,
        retries=retries if entry.retries is None else entry.retries,
        memory_bytes=int(given * 1e9) if given is not None else memory,
        timeout_s=entry.timeout_s,
        fingerprint=fingerprint,
    )


def _facts(path: Path, settings: Sequence[str]) -> tuple[int, str]:
    """What a job is expected to need in memory, and the fingerprint of what it makes."""
    from onnxsmith.pipeline.recipe import load_recipe

    recipe = load_recipe(path, overrides=settings)
    files = _source_files(recipe.source, path.parent)
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "files": {str(file): (stat.st_size, stat.st_mtime_ns) for file, stat in files.items()},
        "versions": _versions(),
    }
    text = json.dumps(content, sort_keys=True)
    return _expected_memory(recipe, path.parent), hashlib.sha256(text.encode()).hexdigest()


def _source_files(source: str, base: Path) -> Mapping[Path, Any]:
    from onnxsmith.errors import SourceError
    from onnxsmith.source import ModelSource

    try:
        path = ModelSource.parse(source, base=base).path
    except SourceError:
        return {}
    if path is None:
        return {}
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file: file.stat() for file in found if file.is_file()}


def _expected_memory(recipe: Recipe, base: Path) -> int:
    """What the run itself will say that it needs; for sources that do not say how large they are, a guess."""
    from onnxsmith.errors import OnnxsmithError
    from onnxsmith.pipeline.forecast import forecast_run
    from onnxsmith.pipeline.run_steps import user_cache
    from onnxsmith.source import ModelSource

    try:
        source = ModelSource.parse(recipe.source, base=base)
        found = forecast_run(recipe, source, cache=user_cache(), base=base)
    except OnnxsmithError:
        # The run says what is wrong.
        return _UNKNOWN
    return _UNKNOWN if found.peak is None else found.together


def _versions() -> dict[str, str]:
    found = {"onnxsmith": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
