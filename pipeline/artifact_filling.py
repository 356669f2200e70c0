"""Filling an artifact: the chosen variant, the report, and everything that says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.package_io import RECORD_NAMES, load_package
from onnxsmith.pipeline.artifact import file_entries, write_manifest
from onnxsmith.pipeline.model_card import CARD_NAME, model_card
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.records import write_records
from onnxsmith.pipeline.report import Report, write_report
from onnxsmith.pipeline.sbom import write_sbom
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.pipeline.variant_making import Made
from onnxsmith.progress import Progress

if TYPE_CHECKING:
    from onnxsmith.runtime import OrtBackend

__all__ = ["fill_artifact"]

_NEW_TOKENS = 24
# What the manifest and the card say of the chosen variant.
_MEASURED = (
    "size_mb",
    "perplexity",
    "perplexity_increase_pct",
    "kl_to_reference",
    "top1_agreement",
    "task_metrics",
    "placement",
)
_PLACED = ("nodes", "share", "operators")
_ASKED = ("name", "perplexity", "task_metrics", "size_mb")


def fill_artifact(
    chosen: Made,
    staging: Path,
    *,
    recipe: Recipe,
    report: Report,
    backend: OrtBackend,
    destination: Path,
    progress: Progress,
) -> None:
    """Moves a variant to where the artifact is made, tries it, and writes what stands beside it.

    Args:
        chosen: The variant.
        staging: An empty directory.
        recipe: What it was made by.
        report: What was decided and measured; what is packed is added.
        backend: What to try it on.
        destination: Where the artifact will be, for the report.
        progress: Who listens.
    """
    assert chosen.package is not None
    with progress.step("pack") as step:
        for path in chosen.files():
            if chosen.ours:
                shutil.move(path, staging / path.name)
            else:
                # Never the same file as in the cache: who changes an artifact must not change that.
                shutil.copyfile(path, staging / path.name)
        package = load_package(staging)
        made = chosen.package
        package.task, package.source, package.steps = made.task, made.source, made.steps
        if package.task == TEXT_GENERATION and recipe.prompt:
            report.generation = _generate(package, recipe.prompt, backend, recipe.name)
        step.note = str(destination)
    files = file_entries(staging)
    report.artifact = {
        "path": str(destination),
        "files": [{"name": name, **entry.model_dump()} for name, entry in files.items()],
        "bytes": sum(entry.bytes for entry in files.values()),
    }
    write_report(report, staging)
    plain = report.to_json()
    measured = next(v for v in plain["variants"] if v["chosen"])
    # Times are of this run alone, and stay in the report.
    measurements = {key: measured[key] for key in _MEASURED}
    measurements["placement"] = {
        provider: {key: value for key, value in entry.items() if key in _PLACED}
        for provider, entry in (measured["placement"] or {}).items()
    }
    measurements["reference"] = {key: plain["reference"].get(key) for key in _ASKED}
    card = model_card(
        package,
        name=recipe.name,
        measurements=measurements,
        environment=report.environment,
        has_report=True,
    )
    (staging / CARD_NAME).write_text(card, encoding="utf-8")
    write_sbom(package, staging, name=recipe.name)
    write_manifest(package, staging, measurements=measurements, recipe=plain["recipe"], records=RECORD_NAMES)
    write_records(staging, report.created)


def _generate(package: ModelPackage, prompt: str, backend: OrtBackend, name: str) -> dict[str, Any]:
    from onnxsmith.runtime import generate

    tokenizer = PackageTokenizer(package)
    with backend.open(package, name=name) as session:
        start = tokenizer.encode(prompt)
        ids = list(generate(session, start, max_new_tokens=_NEW_TOKENS, stop=tokenizer.stop_ids))
    return {"prompt": prompt, "text": tokenizer.continuation(start, ids), "tokens": len(ids)}
