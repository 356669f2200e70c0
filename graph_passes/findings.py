"""What makes a graph slow or wrong on a provider, by rules that each know one thing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from onnxsmith.errors import UnknownNameError
from onnxsmith.finding import Finding

__all__ = ["RULES", "Target", "examine"]

_CPU = "CPUExecutionProvider"

# Name -> module:function. In the order in which remedies are applied: types first, for all passes that follow
# look at them; then what fuses; then what rounds.
RULES: Mapping[str, str] = MappingProxyType(
    {
        "half_on_cpu": "onnxsmith.graph_passes.type_findings:half_on_cpu",
        "stray_casts": "onnxsmith.graph_passes.type_findings:stray_casts",
        "unfused_qdq": "onnxsmith.graph_passes.integer_findings:unfused_qdq",
        "per_tensor": "onnxsmith.graph_passes.integer_findings:per_tensor",
        "saturating_integers": "onnxsmith.graph_passes.integer_findings:saturating_integers",
        "unfused": "onnxsmith.graph_passes.potential:unfused",
        "slow_blocks": "onnxsmith.graph_passes.block_findings:slow_blocks",
        "accuracy_level": "onnxsmith.graph_passes.block_findings:accuracy_level",
        "float_weights": "onnxsmith.graph_passes.block_findings:float_weights",
        "cuda_kernels": "onnxsmith.graph_passes.kernel_findings:cuda_kernels",
        "inline_weights": "onnxsmith.graph_passes.weight_findings:inline_weights",
    }
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a graph is to run on, and what was seen when it ran.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        features: Of the processor, as the kernel names them, such as ``avx512_vnni``; empty where unknown.
        executed: Node name to operator, of what ran after ONNX Runtime's optimisation; None where it did
            not run.
    """

    provider: str = _CPU
    features: frozenset[str] = frozenset()
    executed: Mapping[str, str] | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether it is ONNX Runtime's own CPU provider."""
        return self.provider == _CPU


def examine(model: ir.Model, target: Target, *, rules: Sequence[str] = ()) -> Iterator[Finding]:
    """Applies rules to a graph, which stays as it is.

    Args:
        model: The graph.
        target: What it runs on.
        rules: Names of ``RULES``; all where empty.

    Raises:
        UnknownNameError: No such rule.
    """
    for name in rules:
        if name not in RULES:
            raise UnknownNameError("doctor", name=name, known=RULES, kind="rule")
    for name, path in RULES.items():
        if rules and name not in rules:
            continue
        module, _, function = path.partition(":")
        yield from getattr(importlib.import_module(module), function)(model, target)
