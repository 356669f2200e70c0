"""ONNX Runtime's profile of some runs: which kernel took how long, where, and how many bytes it touched."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.runtime.placement import Placement

__all__ = ["NodeProfile", "RunProfile", "placement_of", "read_profile"]

_KERNEL = "_kernel_time"
# ONNX Runtime's names of bytes for an element of each type that a profile names.
_ITEM_BYTES: Mapping[str, float] = {
    "float": 4, "double": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "int4": 0.5, "uint4": 0.5,
}  # fmt: skip


@dataclasses.dataclass
class NodeProfile:
    """One node over the profiled runs.

    Attributes:
        name: The node's name after ONNX Runtime's optimisation; ``MatMul_7`` where it has none.
        op_type: Its operator; for a part of the graph that a provider compiled, the provider's name for it.
        provider: ONNX Runtime's name of the provider.
        calls: How often it ran.
        time_us: All calls together, in microseconds. For a device that computes later, only the time to
            hand the work over.
        bytes_touched: What one call reads and writes: inputs, weights and outputs. Weights that a kernel
            keeps in a form of its own are missing here.
        inputs: Type and shape of each input of the last call.
        outputs: Type and shape of each output of the last call.
    """

    name: str
    op_type: str
    provider: str
    calls: int
    time_us: float
    bytes_touched: int
    inputs: list[tuple[str, tuple[int, ...]]]
    outputs: list[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass
class RunProfile:
    """Some runs under the profiler.

    Attributes:
        nodes: Each node, in the order in which they first ran.
        kernels: Operator to microseconds on the device, for a device that reports them.
        kernels_of_nodes: The same by node name, as far as the device says it.
        run_us: All runs together, in microseconds.
        runs: How many.
    """

    nodes: list[NodeProfile]
    kernels: dict[str, float]
    kernels_of_nodes: dict[str, float]
    run_us: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, for another process."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> RunProfile:
        """What ``to_json`` gave."""

        def typed(values: Iterable[Any]) -> list[tuple[str, tuple[int, ...]]]:
            return [(kind, tuple(shape)) for kind, shape in values]

        nodes = [
            NodeProfile(**{**n, "inputs": typed(n["inputs"]), "outputs": typed(n["outputs"])})
            for n in plain["nodes"]
        ]
        kernels, of_nodes = dict(plain["kernels"]), dict(plain["kernels_of_nodes"])
        return RunProfile(nodes, kernels, of_nodes, plain["run_us"], plain["runs"])

    def provider_times(self, asynchronous: str | None = None) -> dict[str, float]:
        """Provider name to microseconds of all runs.

        Args:
            asynchronous: The provider whose kernels return before they are done, if it is one. It gets
                the time of the runs that no other provider's kernels took.
        """
        times: dict[str, float] = {}
        for node in self.nodes:
            times[node.provider] = times.get(node.provider, 0.0) + node.time_us
        if asynchronous in times:
            others = sum(time for name, time in times.items() if name != asynchronous)
            times[asynchronous] = max(times[asynchronous], self.run_us - others)
        return times


def item_bytes(kind: str) -> float:
    """Bytes of an element of a type, by ONNX Runtime's name of it; 4 for a type that is not known."""
    return _ITEM_BYTES.get(kind, 4)


def read_profile(path: Path, *, skip_runs: int) -> RunProfile:
    """Reads the file that ONNX Runtime writes.

    Args:
        path: The file.
        skip_runs: Runs at the beginning that are not counted: kernels are chosen and compiled in them.
    """
    events = json.loads(path.read_text(encoding="utf-8"))
    ends = sorted(
        event["ts"] + event["dur"]
        for event in events
        if event.get("cat") == "Session" and event["name"] == "model_run"
    )
    begin = ends[skip_runs - 1] if skip_runs else 0
    nodes: dict[tuple[str, str], NodeProfile] = {}
    kernels: Counter[str] = Counter()
    of_nodes: Counter[str] = Counter()
    device_events = [e for e in events if e.get("cat") in ("Api", "Kernel") and "dur" in e]
    # A device's clock is its own, so its events are cut by their number, which is the same in each run.
    counted = device_events[len(device_events) * skip_runs // max(len(ends), 1) :]
    for event in counted:
        # WebGPU: node&operator&program. CUDA: the operator is among the arguments.
        node_name, _, rest = event["name"].partition("&")
        kernels[event["args"].get("op_name") or rest.partition("&")[0] or node_name] += event["dur"]
        if node_name and rest:
            of_nodes[node_name] += event["dur"]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL) or event["ts"] < begin:
            continue
        details = event["args"]
        name, provider = event["name"].removesuffix(_KERNEL), details.get("provider", "?")
        known = nodes.get((name, provider))
        if known is None:
            touched = sum(int(details.get(f"{part}_size") or 0) for part in _PARTS)
            known = NodeProfile(name, details.get("op_name", "?"), provider, 0, 0.0, touched, [], [])
            nodes[name, provider] = known
        known.calls += 1
        known.time_us += event["dur"]
        known.inputs = _shapes(details.get("input_type_shape"))
        known.outputs = _shapes(details.get("output_type_shape"))
    runs = [
        event["dur"]
        for event in events
        if event.get("cat") == "Session" and event["name"] == "model_run" and event["ts"] >= begin
    ]
    return RunProfile(list(nodes.values()), dict(kernels), dict(of_nodes), float(sum(runs)), len(runs))


_PARTS = ("activation", "parameter", "output")


def _shapes(listed: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(shape)) for entry in listed or () for kind, shape in entry.items()]


def placement_of(
    assigned: Mapping[str, Mapping[str, int]],
    profile: RunProfile | None,
    *,
    asynchronous: str | None,
    bytes_of: Mapping[str, int] | None = None,
) -> Placement:
    """Puts ONNX Runtime's assignment and a profile together.

    Args:
        assigned: Provider name to operator counts, from the assignment.
        profile: Of some runs, if there is one.
        asynchronous: See ``RunProfile.provider_times``.
        bytes_of: Node name to the bytes that it touches, where more is known than the profile says.
    """
    operators = {
        name: dict(Counter({o: c for o, c in counts.items() if not o.startswith("Memcpy")}).most_common())
        for name, counts in assigned.items()
    }
    if profile is None:
        return Placement({name: sum(counts.values()) for name, counts in operators.items()}, operators)
    seen: dict[str, Counter[str]] = {}
    touched: Counter[str] = Counter()
    copies = copied = 0
    for node in profile.nodes:
        touched[node.provider] += max((bytes_of or {}).get(node.name, 0), node.bytes_touched)
        # Copies belong to no provider: they are the price of using two.
        if node.op_type.startswith("Memcpy"):
            copies += 1
            copied += node.bytes_touched
        else:
            seen.setdefault(node.provider, Counter())[node.op_type] += 1
    for name, counts in seen.items():
        # The assignment knows the operators inside of what a provider compiled; the profile does not.
        if name not in operators:
            operators[name] = dict(counts.most_common())
    times = profile.provider_times(asynchronous)
    return Placement(
        {name: sum(counts.values()) for name, counts in operators.items()},
        operators,
        {name: times.get(name, 0.0) / max(profile.runs, 1) for name in operators},
        {name: touched.get(name, 0) for name in operators},
        copies,
        copied,
    )
