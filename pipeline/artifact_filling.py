"""Filling an artifact: the chosen variant, the report, and everything that says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.artifact import file_entries, write_manifest
from onnxsmith.pipeline.model_card import CARD_NAME, model_card
from onnxsmith.pipeline.recipe import Recipe
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
    "bench",
    "placement",
)


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
        chosen: The variant; its directory is empty afterwards.
        staging: An empty directory.
        recipe: What it was made by.
        report: What was decided and measured; what is packed is added.
        backend: What to try it on.
        destination: Where the artifact will be, for the report.
        progress: Who listens.
    """
    assert chosen.package is not None
    with progress.step("pack") as step:
        for path in chosen.directory.iterdir():
            shutil.move(path, staging / path.name)
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
    measurements = {key: measured[key] for key in _MEASURED} | {"reference": plain["reference"]}
    card = model_card(package, name=recipe.name, measurements=measurements, environment=report.environment)
    (staging / CARD_NAME).write_text(card, encoding="utf-8")
    write_sbom(package, staging, name=recipe.name)
    write_manifest(package, staging, measurements=measurements, recipe=plain["recipe"])


def _generate(package: ModelPackage, prompt: str, backend: OrtBackend, name: str) -> dict[str, Any]:
    from onnxsmith.runtime import generate

    tokenizer = PackageTokenizer(package)
    with backend.open(package, name=name) as session:
        start = tokenizer.encode(prompt)
        ids = list(generate(session, start, max_new_tokens=_NEW_TOKENS, stop=tokenizer.stop_ids))
    return {"prompt": prompt, "text": tokenizer.continuation(start, ids), "tokens": len(ids)}
