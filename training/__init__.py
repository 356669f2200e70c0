"""Smaller PyTorch models: pruning, and teaching the smaller model back."""

from __future__ import annotations

from onnxsmith.training.cross_validation import CrossValidation, cross_validate
from onnxsmith.training.examples import Example, Examples
from onnxsmith.training.fitting import FitProgress, FitResult, evaluate_loss, fit
from onnxsmith.training.objectives import Distillation, DistillationWeights, Objective, Supervision
from onnxsmith.training.settings import TrainingSettings
from onnxsmith.training.shrinking import PruningPlan, apply_plan
from onnxsmith.training.sparsity import SparsityReport, SparsitySettings, sparsify
from onnxsmith.training.structured import PruningReport, PruningSettings, prune
from onnxsmith.training.teachers import RuntimeTeacher, Teacher, TorchTeacher
from onnxsmith.training.vocabulary import prune_vocabulary

__all__ = [
    "CrossValidation",
    "Distillation",
    "DistillationWeights",
    "Example",
    "Examples",
    "FitProgress",
    "FitResult",
    "Objective",
    "PruningPlan",
    "PruningReport",
    "PruningSettings",
    "RuntimeTeacher",
    "SparsityReport",
    "SparsitySettings",
    "Supervision",
    "Teacher",
    "TorchTeacher",
    "TrainingSettings",
    "apply_plan",
    "cross_validate",
    "evaluate_loss",
    "fit",
    "prune",
    "prune_vocabulary",
    "sparsify",
]
