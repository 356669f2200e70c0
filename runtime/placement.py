"""Who really ran a graph: nodes, time and bytes of each provider, and the gate on them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsmith.errors import BadInputError, CheckFailedError
from onnxsmith.runtime.providers import choose_provider, provider_named

__all__ = ["Placement", "Requirement", "check_requirements", "requirements_of"]

_REQUIREMENT = re.compile(
    r"(?P<provider>[\w.-]+)\s*(?:>=\s*(?P<share>\d+(?:\.\d+)?)\s*%(?:\s*of\s*(?P<measure>\w+))?)?"
)
_MEASURES = ("nodes", "time", "bytes")
_COST_KEYS: Mapping[str, str] = {"time": "time_us", "bytes": "bytes_moved"}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which provider got which nodes, and what they cost.

    Nodes are those of ONNX Runtime's own assignment: after what it folds and removes for every provider,
    before it fuses what each has got. A provider that is missing there, as WebGPU is in 1.27, is counted from
    the profile of a run.

    Attributes:
        nodes: Provider name to number of nodes.
        operators: Provider name to operator counts.
        times_us: Provider name to microseconds of one profiled run; empty where nothing was profiled.
        bytes_moved: Provider name to the bytes that its kernels read and write in one run; empty likewise.
        copies: Nodes that only copy tensors between devices; None where nothing was profiled.
        copied_bytes: What they copied in one run.
        graphs: Of a model of several graphs, the placement of each.
    """

    nodes: Mapping[str, int]
    operators: Mapping[str, Mapping[str, int]]
    times_us: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes_moved: Mapping[str, float] = dataclasses.field(default_factory=dict)
    copies: int | None = None
    copied_bytes: int | None = None
    graphs: Mapping[str, Placement] = dataclasses.field(default_factory=dict)

    @classmethod
    def merged(cls, graphs: Mapping[str, Placement]) -> Placement:
        """Several graphs of one model, taken together: nodes, and time and bytes of one run of each.

        Times and bytes are known where they are known of each graph.
        """
        parts = list(graphs.values())
        operators: dict[str, Counter[str]] = {}
        for part in parts:
            for provider, counts in part.operators.items():
                operators.setdefault(provider, Counter()).update(counts)
        copied = [part.copied_bytes for part in parts if part.copied_bytes is not None]
        counted = [part.copies for part in parts if part.copies is not None]
        return cls(
            _summed([part.nodes for part in parts]),
            {name: dict(count.most_common()) for name, count in operators.items()},
            _summed([part.times_us for part in parts]) if all(part.times_us for part in parts) else {},
            _summed([part.bytes_moved for part in parts]) if all(part.bytes_moved for part in parts) else {},
            sum(counted) if len(counted) == len(parts) else None,
            sum(copied) if len(copied) == len(parts) else None,
            dict(graphs),
        )

    @property
    def time_shares(self) -> Mapping[str, float]:
        """Provider name to share of the time, 0 to 1; empty where it is not known."""
        return self._shares(self.times_us)

    @property
    def bytes_shares(self) -> Mapping[str, float]:
        """Provider name to share of the bytes, 0 to 1; empty where it is not known."""
        return self._shares(self.bytes_moved)

    def _shares(self, costs: Mapping[str, float]) -> Mapping[str, float]:
        # A provider that got every node took all of everything.
        if self.only_provider is not None:
            return {self.only_provider: 1.0}
        total = sum(costs.values())
        return {name: costs.get(name, 0.0) / total for name in self.nodes} if total else {}

    def share_of(self, measure: str, provider: str) -> float:
        """A provider's share of ``nodes``, ``time`` or ``bytes``; 0 where it is not known."""
        if measure == "nodes":
            return self.share(provider)
        shares = self.time_shares if measure == "time" else self.bytes_shares
        return shares.get(provider, 0.0)

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
            for key, costs, shares in (
                ("time", self.times_us, self.time_shares), ("bytes", self.bytes_moved, self.bytes_shares)
            ):  # fmt: skip
                if shares:
                    plain[name][f"{key}_share"] = shares.get(name, 0.0)
                if costs:
                    plain[name][_COST_KEYS[key]] = costs.get(name, 0.0)
        return plain

    def graphs_to_json(self) -> dict[str, Any]:
        """Of a model of several graphs, ``to_json`` of each; empty otherwise."""
        return {name: placement.to_json() for name, placement in self.graphs.items()}

    @staticmethod
    def from_json(
        plain: Mapping[str, Any], copies: int | None = None, copied_bytes: int | None = None
    ) -> Placement:
        """What ``to_json`` gave, without the placements of graphs."""

        def column(key: str) -> dict[str, Any]:
            return {name: entry[key] for name, entry in plain.items() if key in entry}

        return Placement(
            column("nodes"), column("operators"), column(_COST_KEYS["time"]), column(_COST_KEYS["bytes"]),
            copies, copied_bytes,
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
                share = f", {self.time_shares[name]:.0%} of the time" if name in self.times_us else ""
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
        got = placement.share_of(self.measure, self.provider)
        # A share that the user would see as the wanted one is the wanted one.
        if got > 0 and (self.share is None or got >= self.share - 1e-9):
            return ""
        rest = placement.fallback(self.provider)
        parts = ", ".join(
            f"{name} {part.share_of(self.measure, self.provider):.1%}"
            for name, part in placement.graphs.items()
        )
        return (
            f"{got:.1%} of {self.measure} on {self.provider}"
            + (f" ({parts})" if parts else "")
            + (f": {rest}" if rest else "")
        )


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

    A requirement on another provider than the candidate's is another candidate's. A model of several graphs
    is held to it as a whole.

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


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(part.get(name, 0) for part in parts) for name in {n: None for p in parts for n in p}}
