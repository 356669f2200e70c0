"""Smaller PyTorch models: pruning, and teaching the smaller model back."""

from __future__ import annotations

from onnxsmith.training.shrinking import PruningPlan, apply_plan
from onnxsmith.training.structured import PruningReport, PruningSettings, prune

__all__ = ["PruningPlan", "PruningReport", "PruningSettings", "apply_plan", "prune"]
