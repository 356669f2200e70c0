"""Checking variants: each against PyTorch, output by output, on a text, and on labelled data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import LackingError, OnnxsmithError, SourceError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.recipe import PerplexitySpec, Recipe
from onnxsmith.pipeline.references import Reference, checked_placement, open_programs
from onnxsmith.pipeline.run_tasks import TaskMeasure
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.texts import load_text, share_bounds, text_sha256
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.pipeline.variant_making import Made, error_text
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import OrtBackend, Requirement
    from onnxsmith.runtime.components import Expected

__all__ = ["OpenReference", "VariantChecker", "described"]


@dataclasses.dataclass
class OpenReference:
    """PyTorch, open, and what it said.

    Attributes:
        reference: The model.
        expected: What it gives for inputs of several shapes.
        described: For the report.
        tokens: The text that is scored; None where none is.
        logits: What it predicted there.
    """

    reference: Reference
    expected: Expected
    described: dict[str, Any]
    tokens: Any = None
    logits: Any = None


class VariantChecker:
    """What a recipe wants checked. Its data are read at once, so that mistakes are found early."""

    def __init__(self, recipe: Recipe, backend: OrtBackend, *, base: Path | None = None) -> None:
        """Reads the data.

        Args:
            recipe: What to check.
            backend: What the variants run on.
            base: The directory that relative paths of the recipe start from.

        Raises:
            BadInputError: Data cannot be read, or a requirement is none.
        """
        from onnxsmith.runtime import requirements_of

        self.recipe, self.backend = recipe, backend
        self.requirements: list[Requirement] = requirements_of(recipe.require_provider, [recipe.provider])
        self.tasks = TaskMeasure(recipe, base) if recipe.evaluation.task else None
        spec = recipe.evaluation.perplexity
        self.text = load_text(spec.data, base=base) if spec else ""
        self._original_perplexity: float | None = None

    def ask_original(self, programs: Mapping[str, TorchProgram], package: ModelPackage) -> dict[str, Any]:
        """Asks the model before it was made smaller, to which differences and budgets will be.

        Args:
            programs: The model.
            package: Its tokenizer and configuration files are used.

        Returns:
            What it scored, for the report.
        """
        from onnxsmith.runtime import perplexity

        found: dict[str, Any] = {"task_metrics": None, "perplexity": None}
        program, name = next(iter(programs.values())), next(iter(programs))
        spec = self.recipe.evaluation.perplexity
        if self.tasks is None and spec is None:
            return found
        with open_programs(programs) as reference:
            session = reference.sessions[name]
            if self.tasks is not None:
                found["task_metrics"] = self.tasks.original(program.task, session, package.files)
            if spec is not None:
                tokens = self._tokens(spec, package, program.limits["input_ids"])
                result = perplexity(session, tokens, window=spec.window)
                self._original_perplexity = result.value
                found["perplexity"] = dataclasses.asdict(result)
        return found

    @contextlib.contextmanager
    def open(
        self, programs: Mapping[str, TorchProgram], package: ModelPackage, work: Path, progress: Progress
    ) -> Iterator[OpenReference]:
        """Opens PyTorch and asks it what the variants will be asked.

        Args:
            programs: The model.
            package: Its tokenizer and configuration files are used.
            work: A directory for the predictions, which are too large for memory.
            progress: Who listens.
        """
        recipe, spec = self.recipe, self.recipe.evaluation.perplexity
        # A text is scored by models of one graph.
        program, name = next(iter(programs.values())), next(iter(programs))
        with open_programs(programs) as reference:
            with progress.step("reference") as step:
                expected = reference.expected(samples=recipe.evaluation.comparison.samples, seed=recipe.seed)
                step.note = f"{sum(map(len, expected.values()))} cases"
                opened = OpenReference(reference, expected, described(recipe, programs))
                if spec is not None:
                    opened.tokens = self._tokens(spec, package, program.limits["input_ids"])
                    vocabulary = int(program.outputs[0].shape[-1])  # type: ignore[index,arg-type]
                    opened.logits = _logits_file(work, spec, opened.tokens, vocabulary)
                    step.note += f", {self._score_reference(opened, name, spec)}"
                if self.tasks is not None:
                    opened.described["task_metrics"] = self.tasks.reference(
                        program.task, reference.sessions[name], package.files
                    )
            yield opened

    def _score_reference(self, opened: OpenReference, name: str, spec: PerplexitySpec) -> str:
        from onnxsmith.runtime import perplexity

        session = opened.reference.sessions[name]
        result = perplexity(session, opened.tokens, window=spec.window, keep_logits=opened.logits)
        opened.described["perplexity"] = dataclasses.asdict(result) | {
            "data": spec.data, "data_sha256": text_sha256(self.text), "window": spec.window,
        }  # fmt: skip
        return f"perplexity {result.value:.3f} on {result.tokens} tokens"

    def check(self, made: Made, opened: OpenReference) -> None:
        """Adds to a variant's report where it runs, how far it is from PyTorch, and how good it is.

        A variant that cannot be checked gets an error.

        Raises:
            LackingError: No other variant would do better.
        """
        from onnxsmith.runtime import compare_components, open_components, perplexity, value_limits
        from onnxsmith.runtime.behaviour import suspicious_outputs

        entry, spec = made.report, self.recipe.evaluation.perplexity
        package = load_package(made.directory)
        name = next(iter(opened.reference.sessions))
        try:
            parts = {part: package.only(part) for part in package.components}
            with open_components(self.backend, parts, name=entry.name) as sessions:
                entry.placement = checked_placement(
                    sessions, self.requirements, asked=self.backend.name
                ).to_json()
                entry.comparison = compare_components(
                    opened.reference.sessions,
                    sessions,
                    opened.expected,
                    tolerance=tolerance_for(entry.precision),
                    name=entry.name,
                ).to_json()
                if entry.precision in ("int4", "int8") and len(sessions) == 1:
                    found = suspicious_outputs(sessions[name], value_limits(package))
                    entry.suspicions = [one.what for one in found]
                if spec is not None:
                    scored = perplexity(
                        sessions[name], opened.tokens, window=spec.window, reference_logits=opened.logits
                    )
                    entry.perplexity = dataclasses.asdict(scored)
                    entry.kl_to_reference = scored.kl_to_reference
                    entry.top1_agreement = scored.top1_agreement
                    entry.perplexity_increase_pct = scored.increase_pct
                    if self._original_perplexity is not None:
                        entry.perplexity_increase_pct = 100 * (scored.value / self._original_perplexity - 1)
                if self.tasks is not None:
                    entry.task_metrics = self.tasks.variant(entry.name, sessions[name], package.files)
        except LackingError:
            raise
        except OnnxsmithError as error:
            entry.error = error_text(error, made.directory)

    def _tokens(self, spec: PerplexitySpec, package: ModelPackage, limit: int) -> Any:
        # A token is at least one byte of text, so this much text is enough, and a book is not tokenized.
        text = self.text[: spec.max_tokens * 16]
        ids = np.array(PackageTokenizer(package).encode(text)[: spec.max_tokens], np.int64)
        if ids.size and int(ids.max()) >= limit:
            raise SourceError(
                self.recipe.source,
                got=f"its tokenizer gives id {ids.max()}",
                expected=f"below {limit}, the vocabulary",
            )
        return ids[slice(*share_bounds(len(ids), spec.share, spec.window))]


def described(recipe: Recipe, programs: Mapping[str, TorchProgram]) -> dict[str, Any]:
    """What a report says of PyTorch before it was asked anything."""
    # What components share counts once.
    parameters = {id(p): p for program in programs.values() for p in program.module.parameters()}
    return {
        "name": f"torch {recipe.export.dtype}{', trained' if recipe.training else ''}",
        "perplexity": None,
        "prefill_tokens_per_s": None,
        "decode_tokens_per_s": None,
        "latency_ms": None,
        "size_mb": sum(p.numel() * p.element_size() for p in parameters.values()) / 1e6,
    }


def _logits_file(work: Path, spec: PerplexitySpec, tokens: Any, vocabulary: int) -> Any:
    """A file for the reference's logits: computed once, compared with every variant, not held in memory."""
    windows = -(-len(tokens) // spec.window)
    shape = (max(len(tokens) - windows, 1), vocabulary)
    require_space(work, shape[0] * shape[1] * 4, purpose="the reference's predictions")
    # Not in the directory of the variants, one of which may have this name.
    path = work.with_name("reference-logits.npy")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
