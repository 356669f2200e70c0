"""Who really ran a graph: nodes, time and bytes of each provider, and the gate on them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.runtime.providers import choose_provider, provider_named

__all__ = ["Placement", "Requirement", "check_requirements", "requirements_of"]

_REQUIREMENT = re.compile(
    r"(?P<provider>[\w.-]+)\s*(?:>=\s*(?P<share>\d+(?:\.\d+)?)\s*%(?:\s*of\s*(?P<measure>\w+))?)?"
)
_MEASURES = ("nodes", "time", "bytes")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which provider got which nodes, and what they cost.

    Nodes are those of ONNX Runtime's own assignment, after its graph optimisation. A provider that is
    missing there, as WebGPU is in 1.27, is counted from the profile of a run.

    Attributes:
        nodes: Provider name to number of nodes.
        operators: Provider name to operator counts.
        time_shares: Provider name to share of the time of a profiled run, 0 to 1; empty where nothing was
            profiled.
        bytes_shares: Provider name to share of the bytes that kernels read and wrote; empty likewise.
        copies: Nodes that only copy tensors between devices; None where nothing was profiled.
        copied_bytes: What they copied in one run.
    """

    nodes: Mapping[str, int]
    operators: Mapping[str, Mapping[str, int]]
    time_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    copies: int | None = None
    copied_bytes: int | None = None

    def share(self, provider: str) -> float:
        """The share of nodes that a provider got, 0 to 1."""
        total = sum(self.nodes.values())
        return self.nodes.get(provider, 0) / total if total else 0.0

    @property
    def only_provider(self) -> str | None:
        """The provider that got every node, if one did."""
        return next(iter(self.nodes)) if len(self.nodes) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """Provider name to nodes, share, operators, and where it is known share of time and of bytes."""
        plain: dict[str, Any] = {}
        for name, count in self.nodes.items():
            plain[name] = {
                "nodes": count,
                "share": self.share(name),
                "operators": dict(self.operators.get(name, {})),
            }
            if self.time_shares:
                plain[name]["time_share"] = self.time_shares.get(name, 0.0)
            if self.bytes_shares:
                plain[name]["bytes_share"] = self.bytes_shares.get(name, 0.0)
        return plain

    @staticmethod
    def from_json(
        plain: Mapping[str, Any], copies: int | None = None, copied_bytes: int | None = None
    ) -> Placement:
        """What ``to_json`` gave."""

        def column(key: str) -> dict[str, Any]:
            return {name: entry[key] for name, entry in plain.items() if key in entry}

        return Placement(
            column("nodes"), column("operators"), column("time_share"), column("bytes_share"), copies,
            copied_bytes,
        )  # fmt: skip

    def require_use(self, provider: str, *, name: str) -> None:
        """Refuses a placement in which the wanted provider got nothing.

        Args:
            provider: ONNX Runtime's name of the wanted provider.
            name: The model, for the message.

        Raises:
            CheckFailedError: Every node fell back to another provider.
        """
        if self.nodes and not self.nodes.get(provider):
            raise CheckFailedError(
                f"{name} on {provider}",
                got=f"every node ran on {', '.join(self.nodes)}",
                expected=f"nodes on {provider}",
                remedy="The provider takes none of these operators or types; see its documentation",
            )

    def fallback(self, provider: str) -> str:
        """What other providers got, for a message: ``12 of 103 nodes on CPU (Shape, Gather)``."""
        total = sum(self.nodes.values())
        parts = []
        for name, count in self.nodes.items():
            if name != provider:
                operators = ", ".join(list(self.operators.get(name, {}))[:4])
                share = f", {self.time_shares[name]:.0%} of the time" if name in self.time_shares else ""
                where = name.removesuffix("ExecutionProvider")
                parts.append(f"{count} of {total} nodes on {where}{share} ({operators})")
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What ``--require-provider`` asks for.

    Attributes:
        text: As the user wrote it.
        provider: ONNX Runtime's name.
        share: The least share, 0 to 1; None for at least one node.
        measure: Of what: ``nodes``, ``time`` or ``bytes``.
    """

    text: str
    provider: str
    share: float | None
    measure: str = "nodes"

    def violation(self, placement: Placement) -> str:
        """What is wrong with a placement, or an empty string."""
        if self.measure == "nodes":
            got = placement.share(self.provider)
        else:
            shares = placement.time_shares if self.measure == "time" else placement.bytes_shares
            if not shares:
                # A provider that got every node took all of everything.
                shares = {placement.only_provider: 1.0} if placement.only_provider else {}
            got = shares.get(self.provider, 0.0)
        # A share that the user would see as the wanted one is the wanted one.
        if got > 0 and (self.share is None or got >= self.share - 1e-9):
            return ""
        rest = placement.fallback(self.provider)
        return f"{got:.1%} of {self.measure} on {self.provider}" + (f": {rest}" if rest else "")


def requirements_of(texts: Sequence[str], providers: Sequence[str]) -> list[Requirement]:
    """Reads requirements on the providers of a job.

    Args:
        texts: Each ``cuda``, ``cuda>=95%``, ``cuda>=95%of time`` or ``cuda>=95%of bytes``.
        providers: What the job runs on; see ``choose_provider``.

    Raises:
        BadInputError: It is no such thing, or on a provider that the job does not run on: a gate that
            nothing goes through would always be open.
        OnnxsmithError: See ``choose_provider``.
    """
    chosen = [choose_provider(provider).ort_name for provider in providers]
    found = [_requirement(text) for text in texts]
    for requirement in found:
        if requirement.provider not in chosen:
            raise BadInputError(
                f"--require-provider {requirement.text}",
                got=f"nothing runs on {requirement.provider}",
                expected=f"one of {', '.join(chosen)}",
                remedy="Name it with --provider too",
            )
    return found


def _requirement(text: str) -> Requirement:
    matched = _REQUIREMENT.fullmatch(text.strip())
    measure = (matched["measure"] if matched else None) or "nodes"
    if matched is None or measure not in _MEASURES or float(matched["share"] or 0) > 100:
        raise BadInputError(
            f"--require-provider {text}",
            got="not understood",
            expected=f"PROVIDER, PROVIDER>=N%, or PROVIDER>=N%of {' or '.join(_MEASURES)}",
        )
    known = provider_named(matched["provider"])
    name = known.ort_name if known else matched["provider"]
    share = float(matched["share"]) / 100 if matched["share"] else None
    return Requirement(text, name, share, measure)


def check_requirements(
    placement: Placement | None,
    requirements: Sequence[Requirement],
    *,
    name: str,
    provider: str,
    asked: str = "",
) -> None:
    """Holds a candidate against the requirements on the provider that it was opened on.

    A requirement on another provider than the candidate's is another candidate's.

    Args:
        placement: Of the candidate; None where nothing is known, which fails.
        requirements: What must hold.
        name: The candidate, for the message.
        provider: ONNX Runtime's name of the provider that it was opened on.
        asked: What the user called it, where that is another name, as with a library of a plugin.

    Raises:
        CheckFailedError: A requirement does not hold.
    """
    for requirement in requirements:
        if requirement.provider not in (provider, asked):
            continue
        own = dataclasses.replace(requirement, provider=provider)
        problem = own.violation(placement) if placement else "its placement is not known"
        if problem:
            raise CheckFailedError(
                f"{name} on {provider}",
                got=problem,
                expected=requirement.text,
                remedy="The provider takes none of the other operators or types; see its documentation",
            )
