"""Another module in place of a loaded one: a model that was trained, pruned or given a new head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import SourceError, require
from onnxsmith.exporters.loading import LoadedModel, config_json

if TYPE_CHECKING:
    import torch

__all__ = ["HEADS", "replace_module", "with_new_head"]

# Task -> the transformers class whose head it gets.
HEADS: Mapping[str, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def replace_module(loaded: LoadedModel, module: torch.nn.Module, *, task: str | None = None) -> LoadedModel:
    """The loaded model with another module; its configuration file and provenance follow.

    Args:
        loaded: What was loaded.
        module: What it became.
        task: What that is for, where it is another task.
    """
    files = dict(loaded.files)
    if getattr(module, "config", None) is not None and "config.json" in files:
        files["config.json"] = config_json(module)
    provenance = loaded.provenance | {
        "architecture": type(module).__name__,
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    return dataclasses.replace(
        loaded, module=module, task=task or loaded.task, files=files, provenance=provenance, weights=None
    )


def with_new_head(loaded: LoadedModel, task: str, labels: Sequence[str], *, seed: int) -> LoadedModel:
    """The body of a model with a new head, whose weights are drawn by chance.

    Args:
        loaded: A model of transformers.
        task: From ``HEADS``.
        labels: Names of the classes; none for a head that gives one value.
        seed: Of the head's weights.

    Raises:
        SourceError: Its architecture has no such head, or its body does not fit.
    """
    torch = require("torch", purpose="training")
    transformers = require("transformers", purpose="training")
    old: Any = loaded.module
    if getattr(old, "config", None) is None:
        raise SourceError(
            loaded.source.text, got="a plain module", expected=f"a model of transformers, for {task}"
        )
    config = type(old.config).from_dict(old.config.to_dict())
    config.num_labels = max(len(labels), 1)
    config.id2label = dict(enumerate(labels)) or {0: "LABEL_0"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = getattr(transformers, HEADS[task]).from_config(config)
        except ValueError as error:
            raise SourceError(
                loaded.source.text, got=f"architecture {type(old).__name__}",
                expected=f"one that transformers has a head for {task} for",
            ) from error  # fmt: skip
    body = getattr(old, old.base_model_prefix, old)
    new_body = getattr(made, made.base_model_prefix)
    missing, _ = new_body.load_state_dict(body.state_dict(), strict=False)
    # A pooler belongs to the head: some checkpoints come without one.
    wrong = [name for name in missing if not name.startswith("pooler.")]
    if wrong:
        raise SourceError(
            loaded.source.text, got=f"no weights for {', '.join(wrong[:3])}",
            expected=f"the body of {type(made).__name__}",
        )  # fmt: skip
    made.config.architectures = [type(made).__name__]
    return replace_module(loaded, made.eval().requires_grad_(False), task=task)
