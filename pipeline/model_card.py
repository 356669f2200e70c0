"""The model card of an artifact: what it is, how it was made, and the numbers that were measured of it.

It is the same for the same inputs, so it says nothing of times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxsmith._version import __version__
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.package import ModelPackage, reads_lengths

__all__ = ["CARD_NAME", "model_card"]

CARD_NAME = "README.md"

_PIPELINE_TAGS = frozenset(
    {
        "automatic-speech-recognition", "feature-extraction", "fill-mask", "image-classification",
        "question-answering", "sentence-similarity", "text-classification", "text-generation",
        "token-classification",
    }
)  # fmt: skip


def model_card(
    package: ModelPackage,
    *,
    name: str,
    measurements: Mapping[str, Any],
    environment: Mapping[str, Any],
    usage: Sequence[str] = (),
    has_report: bool = False,
) -> str:
    """A model card in Markdown, with the metadata that model hubs read.

    Args:
        package: The model.
        name: Its name.
        measurements: As in the manifest.
        environment: Where they were measured.
        usage: Lines on how to use it, one paragraph.
        has_report: Whether ``report.html`` stands beside it.
    """
    return "\n".join(_lines(package, name, measurements, environment, usage, has_report)) + "\n"


def _lines(
    package: ModelPackage,
    name: str,
    measurements: Mapping[str, Any],
    environment: Mapping[str, Any],
    usage: Sequence[str],
    has_report: bool,
) -> Iterator[str]:
    source = package.source
    yield "---"
    if source.get("license"):
        yield f"license: {json.dumps(source['license'])}"
    yield "library_name: onnx"
    if package.task in _PIPELINE_TAGS:
        yield f"pipeline_tag: {package.task}"
    yield "tags:"
    yield from ("- onnx", "- onnxruntime", f"- {package.precision}", "---", "")
    yield f"# {name}"
    yield ""
    what = source.get("architecture") or "A model"
    size = source.get("parameters")
    count = f" with {size / 1e6:.1f} million parameters" if isinstance(size, int | float) else ""
    yield (
        f"{what}{count} in ONNX, {package.precision}, made from `{source.get('text', 'an ONNX file')}` "
        f"by onnxsmith {__version__}. The licence of the source is "
        f"{source.get('license') or 'not known: look it up before you publish this'}."
    )
    if usage:
        yield from ("", "## Use", "", *usage)
    if any(reads_lengths(component.model) for component in package.components.values()):
        yield ""
        yield (
            "**Pad prompts of a batch on the right.** Attention takes lengths of rows in this graph: padding "
            "on the left would be misread, without an error. onnxsmith's own runtime sees to it."
        )
    if any(uses_own_operators(component.model) for component in package.components.values()):
        yield ""
        yield (
            "**It has operators of onnxsmith's own.** `python kernels/build.py` compiles their library; give "
            "it to `SessionOptions.register_custom_ops_library`, or name it `custom_ops_library` among the "
            "session options of `genai_config.json`. Without it standard operators run, slowly."
        )
    rows = list(_measured(measurements))
    yield from ("", "## Measured", "")
    if rows:
        yield from ("| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows))
        versions = environment.get("versions") or {}
        yield ""
        yield f"Measured on onnxruntime {versions.get('onnxruntime', '?')}. " + (
            "Speed and memory are in `report.html`: they are of one run on one machine."
            if has_report
            else "Measure speed and memory on your machine with `onnxsmith bench`."
        )
    else:
        yield "Nothing was measured of this artifact."
    yield from ("", "## How it was made", "", "| step | parameters |", "|---|---|")
    for step in package.steps:
        told = ", ".join(f"{key}={json.dumps(value)}" for key, value in step.parameters.items())
        yield f"| {step.name} | {told.replace('|', ' ')} |"
    files = source.get("files") or []
    if files:
        yield from ("", "| made from | SHA-256 |", "|---|---|")
        yield from (f"| `{file.get('name')}` | `{file.get('sha256')}` |" for file in files)
    yield ""
    yield "`manifest.json` says all of this to programs, with a hash of every file."


def _measured(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The numbers that are there, each beside what it is held against."""
    perplexity = told.get("perplexity")
    if perplexity:
        interval = f"{perplexity['low']:.3f} to {perplexity['high']:.3f}"
        yield "perplexity", f"{perplexity['value']:.3f} (95 %: {interval}; {perplexity['tokens']} tokens)"
    reference = (told.get("reference") or {}).get("perplexity")
    if reference:
        yield "perplexity of PyTorch", f"{reference['value']:.3f} on `{reference.get('data')}`"
    simple = (
        ("perplexity_increase_pct", "perplexity above PyTorch", "{:+.2f} %"),
        ("kl_to_reference", "KL divergence from PyTorch", "{:.4f} nats"),
        ("top1_agreement", "same next token as PyTorch", "{:.1%}"),
        ("size_mb", "size of the graph and its weights", "{:.1f} MB"),
    )
    for key, label, form in simple:
        if isinstance(told.get(key), int | float):
            yield label, form.format(told[key])
    for name, metric in (told.get("task_metrics") or {}).items():
        spread = f" (95 %: {metric['low']:.4g} to {metric['high']:.4g})" if "low" in metric else ""
        yield name.replace("_", " "), f"{metric['value']:.4g}{spread}, {metric.get('n', '?')} rows"
    asked = (told.get("reference") or {}).get("task_metrics") or {}
    for name, metric in asked.items():
        yield f"{name.replace('_', ' ')} of PyTorch", f"{metric['value']:.4g}"
    comparison = told.get("comparison") or {}
    worst = comparison.get("worst")
    if worst:
        yield (
            f"largest difference to PyTorch ({comparison.get('tensors')} tensors)",
            f"{worst['max_abs']:.2g} in {worst['name']}, of {worst['scale']:.3g}",
        )
    elif comparison.get("verified") is False:
        yield "comparison with PyTorch", "not made (--no-verify)"
