"""Running models: sessions on PyTorch and ONNX Runtime, comparison, benchmarks, decoding and scoring."""

from __future__ import annotations

from onnxsmith.runtime.backend import Backend, OrtBackend, TorchBackend
from onnxsmith.runtime.benchmark import BenchResult, BenchSettings, Candidate, benchmark
from onnxsmith.runtime.bisection import find_divergence
from onnxsmith.runtime.compare import compare_sessions, reference_outputs
from onnxsmith.runtime.components import (
    compare_components,
    expected_outputs,
    merged_placement,
    open_components,
)
from onnxsmith.runtime.divergence import Blame, Divergence
from onnxsmith.runtime.generation import generate, generate_batch
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
    "merged_placement",
    "open_components",
    "perplexity",
    "reference_outputs",
    "requirements_of",
    "resolve_provider",
    "value_limits",
]
