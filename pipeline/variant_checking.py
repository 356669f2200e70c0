"""Checking variants: each against PyTorch, output by output, on a text, and on labelled data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import LackingError, OnnxsmithError, SourceError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.recipe import PerplexitySpec, Recipe
from onnxsmith.pipeline.recorded_reference import load_expected, save_expected
from onnxsmith.pipeline.references import checked_placement, open_programs
from onnxsmith.pipeline.run_steps import RunSteps
from onnxsmith.pipeline.run_tasks import TaskMeasure
from onnxsmith.pipeline.staging import require_space
from onnxsmith.pipeline.step_keys import StepKey, machine, provider_identity, step_key
from onnxsmith.pipeline.texts import load_text, share_bounds, text_sha256
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.pipeline.variant_making import Made, error_text

if TYPE_CHECKING:
    from onnxsmith.program import TorchProgram
    from onnxsmith.runtime import OrtBackend, Requirement, Session
    from onnxsmith.runtime.components import Expected

__all__ = ["AskedReference", "VariantChecker"]

_TOKENS, _LOGITS = "tokens.npy", "logits.npy"


@dataclasses.dataclass(frozen=True)
class AskedReference:
    """What PyTorch said. It need not be open any more.

    Attributes:
        key: Its address in the cache.
        sessions: By component: names and signatures.
        expected: What it gives for inputs of several shapes.
        described: For the report, beside what it says anyway.
        tokens: The text that is scored; None where none is.
        logits: What it predicted there.
        note: In a few words.
        hit: Whether an earlier run had asked.
    """

    key: StepKey
    sessions: Mapping[str, Session]
    expected: Expected
    described: Mapping[str, Any]
    tokens: Any
    logits: Any
    note: str
    hit: bool


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

    def ask(
        self,
        programs: Callable[[], Mapping[str, TorchProgram]],
        package: ModelPackage,
        export_key: StepKey,
        steps: RunSteps,
        *,
        original: str | None = None,
    ) -> AskedReference:
        """Asks PyTorch what the variants will be asked, unless an earlier run did.

        Args:
            programs: Loads the model.
            package: The exported model; its tokenizer and configuration files are used.
            export_key: Its address.
            steps: Where the answers are found and left: predictions are too large for memory.
            original: The identity of the model that was asked before, to which differences are.
        """
        recipe, spec = self.recipe, self.recipe.evaluation.perplexity
        task = recipe.evaluation.task
        key = step_key(
            "reference",
            export=export_key.digest,
            samples=recipe.evaluation.comparison.samples,
            seed=recipe.seed,
            original=original,
            perplexity=None if spec is None else [spec.model_dump(exclude={"data"}), text_sha256(self.text)],
            task=None
            if task is None or self.tasks is None
            else [task.model_dump(exclude={"data"}), self.tasks.identity()],
            machine=machine(),
            summary=str(package.source.get("text")),
        )
        found = steps.result(key, lambda place: self._asked(programs(), package, place))
        facts = found.facts
        from onnxsmith.runtime.metrics import Outcome

        sessions, expected = load_expected(found.directory, facts["expected"])
        if self.tasks is not None:
            told = facts["task"]
            outcome = Outcome(told["kind"], told["references"], told["predictions"])
            self.tasks.recall(told["task"], outcome)
        described: dict[str, Any] = {}
        if self.tasks is not None:
            described["task_metrics"] = facts["task_metrics"]
        if spec is not None:
            # What the data are called does not decide what was found.
            described["perplexity"] = facts["perplexity"] | {
                "data": spec.data, "data_sha256": text_sha256(self.text), "window": spec.window,
            }  # fmt: skip
        scored = spec is not None
        return AskedReference(
            key,
            sessions,
            expected,
            described,
            np.load(found.directory / _TOKENS) if scored else None,
            np.load(found.directory / _LOGITS, mmap_mode="r") if scored else None,
            facts["note"],
            found.hit,
        )

    def _asked(
        self, programs: Mapping[str, TorchProgram], package: ModelPackage, place: Path
    ) -> dict[str, Any]:
        from onnxsmith.runtime import perplexity

        recipe, spec = self.recipe, self.recipe.evaluation.perplexity
        facts: dict[str, Any] = {"task_metrics": None, "task": None, "perplexity": None}
        # A text is scored by models of one graph.
        program, name = next(iter(programs.values())), next(iter(programs))
        with open_programs(programs) as reference:
            expected = reference.expected(samples=recipe.evaluation.comparison.samples, seed=recipe.seed)
            facts["expected"] = save_expected(reference.sessions, expected, place)
            facts["note"] = f"{sum(map(len, expected.values()))} cases"
            session = reference.sessions[name]
            if spec is not None:
                tokens = self._tokens(spec, package, program.limits["input_ids"])
                np.save(place / _TOKENS, tokens)
                vocabulary = int(program.outputs[0].shape[-1])  # type: ignore[index,arg-type]
                logits = _logits_file(place / _LOGITS, spec, tokens, vocabulary)
                result = perplexity(session, tokens, window=spec.window, keep_logits=logits)
                logits.flush()
                facts["perplexity"] = dataclasses.asdict(result)
                facts["note"] += f", perplexity {result.value:.3f} on {result.tokens} tokens"
            if self.tasks is not None:
                facts["task_metrics"] = self.tasks.reference(program.task, session, package.files)
                name_of_task, outcome = self.tasks.expected
                facts["task"] = {"task": name_of_task} | dataclasses.asdict(outcome)
        return facts

    def check(self, made: Made, asked: AskedReference, steps: RunSteps) -> None:
        """Adds to a variant's report where it runs, how far it is from PyTorch, and how good it is.

        A variant that cannot be checked gets an error.

        Raises:
            LackingError: No other variant would do better.
        """
        assert made.key is not None, "the variant was not made"
        entry = made.report
        key = step_key(
            "check",
            variant=made.key.digest,
            reference=asked.key.digest,
            metrics=self.recipe.evaluation.task.metrics if self.recipe.evaluation.task else None,
            provider=provider_identity(self.backend),
            requirements=[requirement.text for requirement in self.requirements],
            machine=machine(),
            summary=f"{made.key.made_from['summary']} on {self.backend.provider}",
        )
        # Shares of time and bytes are measured, and so not the same the next time.
        measured = any(requirement.measure != "nodes" for requirement in self.requirements)
        try:
            found = steps.result(key, lambda _: self._checked(made, asked), renew=measured)
        except LackingError:
            raise
        except OnnxsmithError as error:
            entry.error = error_text(error, made.directory)
            return
        if found.hit:
            entry.from_cache.append("checked")
        facts = found.facts
        entry.placement, entry.task_metrics = facts["placement"], facts["task_metrics"]
        entry.placement_by_graph = facts["placement_by_graph"]
        entry.suspicions = list(facts["suspicions"])
        entry.comparison = facts["comparison"] | {"candidate": entry.name}
        scored = facts["perplexity"]
        if scored is not None:
            entry.perplexity = scored
            entry.kl_to_reference = scored["kl_to_reference"]
            entry.top1_agreement = scored["top1_agreement"]
            entry.perplexity_increase_pct = scored["increase_pct"]
            if self._original_perplexity is not None:
                entry.perplexity_increase_pct = 100 * (scored["value"] / self._original_perplexity - 1)

    def _checked(self, made: Made, asked: AskedReference) -> dict[str, Any]:
        from onnxsmith.runtime import compare_components, open_components, perplexity, value_limits
        from onnxsmith.runtime.behaviour import suspicious_outputs

        entry, spec = made.report, self.recipe.evaluation.perplexity
        package = load_package(made.directory)
        parts = {part: package.only(part) for part in package.components}
        facts: dict[str, Any] = {"perplexity": None, "task_metrics": None, "suspicions": []}
        with open_components(self.backend, parts, name=entry.name) as sessions:
            placement = checked_placement(sessions, self.requirements, asked=self.backend.name)
            facts["placement"] = placement.to_json()
            facts["placement_by_graph"] = placement.graphs_to_json()
            facts["comparison"] = compare_components(
                asked.sessions,
                sessions,
                asked.expected,
                tolerance=tolerance_for(entry.precision),
                name=entry.name,
            ).to_json()
            session = sessions[next(iter(asked.sessions))]
            if entry.precision in ("int4", "int8") and len(sessions) == 1:
                found = suspicious_outputs(session, value_limits(package))
                facts["suspicions"] = [one.what for one in found]
            if spec is not None:
                scored = perplexity(session, asked.tokens, window=spec.window, reference_logits=asked.logits)
                facts["perplexity"] = dataclasses.asdict(scored)
            if self.tasks is not None:
                facts["task_metrics"] = self.tasks.variant(entry.name, session, package.files)
        return facts

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


def _logits_file(path: Path, spec: PerplexitySpec, tokens: Any, vocabulary: int) -> Any:
    """A file for the reference's logits: computed once, compared with every variant, not held in memory."""
    windows = -(-len(tokens) // spec.window)
    shape = (max(len(tokens) - windows, 1), vocabulary)
    require_space(path.parent, shape[0] * shape[1] * 4, purpose="the reference's predictions")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
