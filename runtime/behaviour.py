"""How a model behaves when it runs: results that cannot be right, and nodes that ran elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnxsmith.errors import OnnxsmithError
from onnxsmith.finding import Finding
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.backend import OrtBackend
from onnxsmith.runtime.kernel_library import FUNCTIONS
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.placement import Placement
from onnxsmith.runtime.samples import cases_for, value_limits
from onnxsmith.runtime.session import Array, Session
from onnxsmith.runtime.worker_session import WorkerSession

__all__ = ["Behaviour", "observe", "suspicious_outputs"]

_FEW = 5


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What was seen.

    Attributes:
        findings: Outputs that are not finite or do not depend on the inputs, nodes on other providers, or
            that the model does not run at all.
        executed: Node name to operator, after ONNX Runtime's optimisation; None where it did not run.
        placement: Who ran what; None likewise.
    """

    findings: tuple[Finding, ...]
    executed: Mapping[str, str] | None = None
    placement: Placement | None = None


def observe(package: ModelPackage, backend: OrtBackend, *, name: str, seed: int = 0) -> Behaviour:
    """Runs one graph on made-up inputs and under the profiler.

    Args:
        package: With one component.
        backend: Where to run it.
        name: For messages.
        seed: Of the inputs.
    """
    try:
        with backend.open(package, name=name) as session:
            return _observed(session, package, seed)
    except OnnxsmithError as error:
        remedy = error.remedy or "see the message"
        expected = f"expected {error.expected}" if error.expected else "it cannot be used like that"
        return Behaviour(
            (Finding("does_not_run", "wrong", f"it does not run: {error.got}", expected, remedy),)
        )


def _observed(session: OrtSession | WorkerSession, package: ModelPackage, seed: int) -> Behaviour:
    findings = suspicious_outputs(session, value_limits(package), seed=seed)
    profile = session.profile(runs=1)
    placement = session.placement(measured=session.provider != "CPUExecutionProvider")
    if rest := placement.fallback(session.provider):
        findings.append(
            Finding(
                "fallback",
                "slow",
                rest,
                f"{session.provider} does not take these, and each change of provider copies tensors",
                "export to operators and types that it takes; --require-provider makes it an error",
                tuple(
                    operator
                    for provider, operators in placement.operators.items()
                    if provider != session.provider
                    for operator in list(operators)[:_FEW]
                ),
                sum(count for other, count in placement.nodes.items() if other != session.provider),
            )
        )
    if session.own_kernels == FUNCTIONS:
        findings.append(
            Finding(
                "own_kernels",
                "slow",
                "standard operators run in the place of onnxsmith's own",
                "they unpack each weight into float32 each time; the library is not here",
                "`onnxsmith kernels` says what brings it",
            )
        )
    executed = {node.name: node.op_type for node in profile.nodes}
    return Behaviour(tuple(findings), executed, placement)


def suspicious_outputs(session: Session, limits: Mapping[str, int], *, seed: int = 0) -> list[Finding]:
    """Outputs with NaN or infinite values, and float outputs that are the same whatever goes in.

    Args:
        session: The model, open.
        limits: For integer inputs, one above the highest valid value.
        seed: Of the made-up inputs.
    """
    broken: list[str] = []
    results: list[Mapping[str, Array]] = []
    for number in range(2):
        for case in cases_for(session, limits=limits, samples=2, seed=seed + number):
            made = session.run(case.feeds)
            for output, array in made.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all() and output not in broken:
                    broken.append(output)
            results.append(made)
    findings = []
    if broken:
        findings.append(
            Finding(
                "not_finite",
                "wrong",
                f"NaN or infinite numbers in {', '.join(broken[:_FEW])}",
                "every prediction that they reach is worthless, and no runtime says so",
                "`onnxsmith bisect REFERENCE MODEL` finds the first tensor that is wrong",
                tuple(broken[:_FEW]),
                len(broken),
            )
        )
    constant = [name for name in _constant_outputs(results) if name not in broken]
    if constant:
        findings.append(
            Finding(
                "constant",
                "wrong",
                f"{', '.join(constant[:_FEW])} do not depend on the inputs",
                "the same numbers for different inputs: scales are missing, or a range swallows all values",
                "compare with the model that it was made of: `onnxsmith compare SOURCE MODEL`",
                tuple(constant[:_FEW]),
                len(constant),
            )
        )
    return findings


def _constant_outputs(results: Sequence[Mapping[str, Array]]) -> list[str]:
    """Float outputs that have one value everywhere, or the same values in runs of the same shape."""
    found = []
    for name in results[0] if results else ():
        arrays = [made[name] for made in results if made[name].dtype.kind == "f" and made[name].size]
        if not arrays:
            continue
        flat = all(np.ptp(array) == 0 for array in arrays) and max(array.size for array in arrays) > 1
        pairs = [
            (one, other)
            for position, one in enumerate(arrays)
            for other in arrays[position + 1 :]
            if one.shape == other.shape
        ]
        if flat or (pairs and all(np.array_equal(one, other) for one, other in pairs)):
            found.append(name)
    return found
