"""Running models: sessions on PyTorch and ONNX Runtime, comparison, benchmarks, decoding and scoring.

Each name is imported when it is first used: who only generates text does not load what compares models.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsmith.runtime.backend import Backend, OrtBackend, TorchBackend
    from onnxsmith.runtime.benchmarking import BenchResult, BenchSettings, Candidate, benchmark
    from onnxsmith.runtime.bisection import find_divergence
    from onnxsmith.runtime.compare import compare_sessions, reference_outputs
    from onnxsmith.runtime.components import (
        compare_components,
        expected_outputs,
        open_components,
    )
    from onnxsmith.runtime.divergence import Blame, Divergence
    from onnxsmith.runtime.generation import generate, generate_batch, room_for
    from onnxsmith.runtime.ort_session import OrtSession
    from onnxsmith.runtime.placement import Placement, Requirement, check_requirements, requirements_of
    from onnxsmith.runtime.providers import (
        PROVIDERS,
        ProviderChoice,
        available_providers,
        choose_provider,
        resolve_provider,
    )
    from onnxsmith.runtime.references import GraphReference, Reference, TorchReference
    from onnxsmith.runtime.samples import Case, cases_for, load_cases, value_limits
    from onnxsmith.runtime.sampling import SamplingSettings
    from onnxsmith.runtime.scoring import Perplexity, perplexity
    from onnxsmith.runtime.seq2seq import Seq2SeqDecoder, generate_sequences
    from onnxsmith.runtime.session import Session
    from onnxsmith.runtime.speculation import LookupSettings
    from onnxsmith.runtime.torch_session import TorchSession
    from onnxsmith.runtime.worker_session import WorkerSession

__all__ = [
    "PROVIDERS",
    "Backend",
    "BenchResult",
    "BenchSettings",
    "Blame",
    "Candidate",
    "Case",
    "Divergence",
    "GraphReference",
    "LookupSettings",
    "OrtBackend",
    "OrtSession",
    "Perplexity",
    "Placement",
    "ProviderChoice",
    "Reference",
    "Requirement",
    "SamplingSettings",
    "Seq2SeqDecoder",
    "Session",
    "TorchBackend",
    "TorchReference",
    "TorchSession",
    "WorkerSession",
    "available_providers",
    "benchmark",
    "cases_for",
    "check_requirements",
    "choose_provider",
    "compare_components",
    "compare_sessions",
    "expected_outputs",
    "find_divergence",
    "generate",
    "generate_batch",
    "generate_sequences",
    "load_cases",
    "open_components",
    "perplexity",
    "reference_outputs",
    "requirements_of",
    "resolve_provider",
    "room_for",
    "value_limits",
]

# By module.
_HOMES: Mapping[str, tuple[str, ...]] = {
    "backend": (
        "Backend",
        "OrtBackend",
        "TorchBackend",
    ),
    "benchmarking": (
        "BenchResult",
        "BenchSettings",
        "Candidate",
        "benchmark",
    ),
    "bisection": ("find_divergence",),
    "compare": (
        "compare_sessions",
        "reference_outputs",
    ),
    "components": (
        "compare_components",
        "expected_outputs",
        "open_components",
    ),
    "divergence": (
        "Blame",
        "Divergence",
    ),
    "generation": (
        "generate",
        "generate_batch",
        "room_for",
    ),
    "ort_session": ("OrtSession",),
    "placement": (
        "Placement",
        "Requirement",
        "check_requirements",
        "requirements_of",
    ),
    "providers": (
        "PROVIDERS",
        "ProviderChoice",
        "available_providers",
        "choose_provider",
        "resolve_provider",
    ),
    "references": (
        "GraphReference",
        "Reference",
        "TorchReference",
    ),
    "samples": (
        "Case",
        "cases_for",
        "load_cases",
        "value_limits",
    ),
    "sampling": ("SamplingSettings",),
    "scoring": (
        "Perplexity",
        "perplexity",
    ),
    "seq2seq": (
        "Seq2SeqDecoder",
        "generate_sequences",
    ),
    "session": ("Session",),
    "speculation": ("LookupSettings",),
    "torch_session": ("TorchSession",),
    "worker_session": ("WorkerSession",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
