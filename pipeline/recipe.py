"""The recipe: what to make of which model, and what must hold.

A recipe is YAML or JSON. Its schema is exported with ``python -m onnxsmith.pipeline.schema`` and stands in
``docs/recipe.schema.json``, for editors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from onnxsmith.errors import RecipeError

__all__ = [
    "BenchmarkSpec",
    "Budgets",
    "ComparisonSpec",
    "Evaluation",
    "ExportSpec",
    "PerplexitySpec",
    "Recipe",
    "Variant",
    "load_recipe",
]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ExportSpec(_Model):
    """How the model becomes ONNX."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Element type that the weights are loaded and exported in."""
    attention: Literal["auto", "fused", "standard"] = "auto"
    """Decoders: fused is GroupQueryAttention, standard is ONNX operators only, auto is fused where possible."""
    opset: int | None = pydantic.Field(default=None, ge=18, le=25)
    """Version of the ONNX operator set; the exporter's default where absent."""


PassEntry = Annotated[
    str | dict[str, dict[str, Any]],
    pydantic.Field(description="The name of a pass, or {name: {parameter: value}}"),
]


class Variant(_Model):
    """One thing to make of the exported model."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
    """Unique among the variants; a file name."""
    preset: str | None = None
    """A ready-made list of passes; see `onnxsmith presets`."""
    passes: tuple[PassEntry, ...] | None = None
    """Passes in order, in place of a preset."""

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Variant:
        if (self.preset is None) == (self.passes is None):
            raise ValueError("give either preset or passes")
        for entry in self.passes or ():
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError("an entry of passes is a name, or one name with its parameters")
        return self

    def specs(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The passes as names and parameters.

        Raises:
            UnknownNameError: No such preset.
        """
        from onnxsmith.errors import UnknownNameError
        from onnxsmith.graph_passes import PRESETS

        if self.preset is not None:
            if self.preset not in PRESETS:
                raise UnknownNameError(f"variant {self.name}", name=self.preset, known=PRESETS, kind="preset")
            return list(PRESETS[self.preset])
        entries = self.passes or ()
        return [(e, {}) if isinstance(e, str) else next(iter(e.items())) for e in entries]


class ComparisonSpec(_Model):
    """Every variant against torch, output by output."""

    samples: int | None = pydantic.Field(default=None, ge=1)
    """Number of cases; all kinds (lengths, batches, padding, cache) where absent."""


class PerplexitySpec(_Model):
    """How well the variants predict a text (decoders)."""

    data: str
    """A text file, relative to the recipe; or package.module:attribute with a text or texts."""
    max_tokens: int = pydantic.Field(default=2048, ge=2)
    """Tokens used, from the beginning."""
    window: int = pydantic.Field(default=512, ge=2)
    """Tokens in a window; each window starts from an empty cache."""


class BenchmarkSpec(_Model):
    """How fast the variants are."""

    prompt_tokens: int = pydantic.Field(default=128, ge=1)
    new_tokens: int = pydantic.Field(default=32, ge=2)
    batch: int = pydantic.Field(default=1, ge=1)
    runs: int = pydantic.Field(default=5, ge=1)
    threads: int | None = pydantic.Field(default=None, ge=1)
    """Intra-op threads; all usable processors where absent."""
    reference: bool = True
    """Also measure torch."""


class Evaluation(_Model):
    """What is measured of each variant."""

    comparison: ComparisonSpec = ComparisonSpec()
    perplexity: PerplexitySpec | None = None
    benchmark: BenchmarkSpec | None = BenchmarkSpec()


class Budgets(_Model):
    """What a variant must keep to be chosen."""

    perplexity_increase_pct: float | None = None
    """Highest increase of perplexity over torch, in percent."""
    kl_to_reference: float | None = None
    """Highest mean KL divergence from torch's predictions, in nats."""
    size_mb: float | None = None
    """Largest size of graph and weights, in MB (10**6 bytes)."""
    latency_ms: float | None = None
    """Highest median of one call; for decoders of one decoded token."""
    peak_rss_mb: float | None = None
    """Highest peak of resident memory of a process that runs the variant."""


class Recipe(_Model):
    """A source, what to make of it, and what must hold."""

    schema_version: Literal[1]
    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
    source: str
    """A Hugging Face directory or hub id, a .gguf file, package.module:factory, or pkg:package/file."""
    task: str | None = None
    """The task; found from the model where absent."""
    export: ExportSpec = ExportSpec()
    variants: Annotated[tuple[Variant, ...], pydantic.Field(min_length=1)]
    provider: str = "cpu"
    """The execution provider that the variants run on."""
    evaluation: Evaluation = Evaluation()
    budgets: Budgets = Budgets()
    choose: Literal["size_mb", "latency_ms", "perplexity"] = "size_mb"
    """Of the variants that keep the budgets, the one with the least of this is packed."""
    prompt: str | None = None
    """Decoders: the packed artifact continues this text, as the last check."""
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [variant.name for variant in self.variants]
        double = next((n for n in names if names.count(n) > 1), None)
        if double is not None:
            raise ValueError(f"two variants are named {double!r}")
        needs = {
            "budgets.perplexity_increase_pct": self.budgets.perplexity_increase_pct is not None,
            "budgets.kl_to_reference": self.budgets.kl_to_reference is not None,
            "choose: perplexity": self.choose == "perplexity",
        }
        for key, needed in needs.items():
            if needed and self.evaluation.perplexity is None:
                raise ValueError(f"{key} needs evaluation.perplexity")
        needs = {
            "budgets.latency_ms": self.budgets.latency_ms is not None,
            "budgets.peak_rss_mb": self.budgets.peak_rss_mb is not None,
            "choose: latency_ms": self.choose == "latency_ms",
        }
        for key, needed in needs.items():
            if needed and self.evaluation.benchmark is None:
                raise ValueError(f"{key} needs evaluation.benchmark")
        return self


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: A YAML or JSON file.
        overrides: ``key=value`` with dotted keys (``budgets.size_mb=100``); values are YAML.

    Raises:
        RecipeError: It cannot be read, or does not validate. The message names the line and the key.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path), got=f"cannot be read: {error}", expected="a YAML or JSON recipe"
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise RecipeError(
            where, got=getattr(error, "problem", None) or "not YAML", expected="YAML or JSON"
        ) from error
    if not isinstance(data, dict):
        raise RecipeError(str(path), got=f"a {type(data).__name__}", expected="a mapping of keys to values")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(path, tree, error) from error


def _override(data: dict[str, Any], text: str) -> None:
    import yaml

    key, equals, value = text.partition("=")
    where = f"--set {text}"
    if not equals or not key.strip():
        raise RecipeError(where, got="no key=value", expected="for example budgets.size_mb=100")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(where, got=f"a value that is not YAML: {value!r}") from error
    parts: list[str] = key.strip().split(".")
    target: Any = data
    for part in parts[:-1]:
        target = _descend(target, part, where, create=True)
    if isinstance(target, list):
        target[_index(target, parts[-1], where)] = parsed
    elif isinstance(target, dict):
        target[parts[-1]] = parsed
    else:
        raise RecipeError(
            where, got=f"{'.'.join(parts[:-1])} is a plain value", expected="a mapping or a list"
        )


def _descend(target: Any, part: str, where: str, *, create: bool) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, where)]
    if isinstance(target, dict):
        if create and target.get(part) is None:
            target[part] = {}
        return target[part]
    raise RecipeError(where, got=f"{part!r} is below a plain value", expected="a mapping or a list")


def _index(target: list[Any], part: str, where: str) -> int:
    # Variants are easier to name than to count.
    for number, item in enumerate(target):
        if isinstance(item, dict) and item.get("name") == part:
            return number
    if part.isdigit() and int(part) < len(target):
        return int(part)
    names = [item["name"] for item in target if isinstance(item, dict) and "name" in item]
    raise RecipeError(
        where, got=f"{part!r}", expected=f"one of {', '.join(names) or f'0 to {len(target) - 1}'}"
    )


def _explain(path: Path, tree: Any, error: pydantic.ValidationError) -> RecipeError:
    first = error.errors()[0]
    location = [
        part for part in first["loc"] if not (isinstance(part, str) and part.startswith(("str", "dict[")))
    ]
    line = _line_of(tree, location)
    key = ".".join(str(part) for part in location) or "recipe"
    where = f"{path}, line {line}: {key}"
    more = f" ({error.error_count() - 1} more errors)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return RecipeError(
            where,
            got=f"unknown key {str(location[-1])!r}",
            expected=f"one of {', '.join(known)}" if known else None,
            remedy=(f"Did you mean {near[0]!r}?" if near else "") + more or None,
        )
    if first["type"] == "missing":
        return RecipeError(where, got="it is missing", expected="a value", remedy=more.strip() or None)
    message = first["msg"].removeprefix("Value error, ")
    shown = json.dumps(first["input"], default=str)
    return RecipeError(
        where,
        got=shown if len(shown) < 80 else f"{shown[:77]}...",
        expected=message[0].lower() + message[1:].removeprefix("nput should be "),
        remedy=more.strip() or None,
    )


def _line_of(tree: Any, location: Sequence[Any]) -> int:
    """The line of a key in the YAML tree, or of the nearest mapping that encloses it."""
    import yaml

    node, line = tree, tree.start_mark.line + 1 if tree is not None else 1
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line, node = found.start_mark.line + 1, found
        if found is None:
            break
    return line


def _keys_at(location: Sequence[Any]) -> list[str]:
    """The known keys of the part of the schema that a location leads to."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = next((m for m in _models_in(field.annotation)), None)
    return sorted(getattr(model, "model_fields", {}))


def _models_in(annotation: Any) -> list[Any]:
    import typing

    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
