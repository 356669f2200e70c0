"""Profiles, roofs, bound memory, noise: what a measurement says besides a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError
from onnxsmith.package_io import load_package
from onnxsmith.runtime import BenchSettings, Candidate, OrtSession, benchmark, choose_provider
from onnxsmith.runtime.machine_load import MachineLoad
from onnxsmith.runtime.profiling import NodeProfile, RunProfile, placement_of, read_profile
from onnxsmith.runtime.roofline import Roofs, describe_profile, node_cost, weight_bytes_of_nodes
from onnxsmith.runtime.roofs import measure_roofs
from onnxsmith.runtime.worker import parse_device_memory

pytest.importorskip("onnxruntime")

PLAIN = """
    <ir_version: 9, opset_import: ["" : 20]>
    plain (float[batch, 32] x) => (float[batch, 8] y, float[batch, 16] h) {
        [first] h = MatMul(x, w)
        [act] r = Relu(h)
        [second] y = MatMul(r, v) }"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two products of matrices with their weights."""
    import onnx

    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(PLAIN)
    for name, shape in (("w", (32, 16)), ("v", (16, 8))):
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def node(op_type: str, inputs: Any, outputs: Any, name: str = "n", touched: int = 0) -> NodeProfile:
    typed = [[("float", tuple(shape)) for shape in side] for side in (inputs, outputs)]
    return NodeProfile(name, op_type, "CPUExecutionProvider", 1, 1.0, touched, *typed)


# What a node has to do


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs", "moved", "operations"),
    [
        # Weights in a form of the kernel's own: only the activations are seen.
        ("MatMul", [(2, 7, 32)], [(2, 7, 16)], 4 * (2 * 7 * 32 + 32 * 16 + 2 * 7 * 16), 2 * 2 * 7 * 32 * 16),
        ("MatMul", [(3, 5, 4), (3, 4, 6)], [(3, 5, 6)], 4 * (60 + 72 + 90), 2 * 3 * 5 * 4 * 6),
        ("FusedGemm", [(5, 32), (16,)], [(5, 16)], 4 * (160 + 16 + 80), 2 * 5 * 32 * 16),
        ("MatMulNBits", [(1, 1, 64)], [(1, 1, 32)], 4 * 96 + 64 * 32 // 2, 2 * 64 * 32),
        ("MatMulInteger", [(4, 64)], [(4, 32)], 4 * 64 * 4 + 64 * 32 + 4 * 4 * 32, 2 * 4 * 64 * 32),
        ("Conv", [(1, 3, 8, 8), (16, 3, 3, 3)], [(1, 16, 6, 6)], 4 * (192 + 432 + 576), 2 * 576 * 27),
        ("Gather", [(1000, 8), (2, 3)], [(2, 3, 8)], 2 * 4 * 48, 0),
        ("Reshape", [(6,), (2,)], [(2, 3)], 0, 0),
        ("Add", [(2, 3), (3,)], [(2, 3)], 4 * 15, 6),
        ("MultiHeadAttention", [(2, 5, 32), (2, 9, 32), (2, 9, 32)], [(2, 5, 32)], 4 * 1792, 4 * 320 * 9),
        (
            "GroupQueryAttention", [(1, 1, 64), (1, 1, 16), (1, 1, 16), (1, 2, 10, 8), (1, 2, 10, 8)],
            [(1, 1, 64), (1, 2, 11, 8), (1, 2, 11, 8)], 4 * (96 + 320 + 64 + 352), 4 * 64 * 11,
        ),
        ("MultiHeadAttention", [(2, 5, 96)], [(2, 5, 32)], 4 * 1280, 4 * 320 * 5),
        (
            "MatMulPacked", [(5, 64), (3, 8, 64), (3, 2, 16), (5, 48)], [(5, 48)],
            4 * (320 + 1536 + 96 + 240 + 240), 2 * 5 * 64 * 48,
        ),
        ("LSTM", [(6, 1, 10), (1, 80, 10), (1, 80, 20)], [(6, 1, 1, 20)], 4 * 2580, 2 * 120 * 4 * 30),
    ],
)  # fmt: skip
def test_a_node_costs_what_its_shapes_say(
    op_type: str, inputs: Any, outputs: Any, moved: int, operations: int
) -> None:
    cost = node_cost(node(op_type, inputs, outputs), {})
    assert cost.operations == operations
    assert cost.bytes_moved == moved


def test_weights_of_the_graph_are_counted_where_the_profile_hides_them(plain: Path) -> None:
    weights = weight_bytes_of_nodes(load_package(plain).main.model)
    assert weights == {"first": 32 * 16 * 4, "act": 0, "second": 16 * 8 * 4}
    hidden = node("MatMulNBits", [(1, 64)], [(1, 32)], "known")
    assert node_cost(hidden, {"known": 5000}).bytes_moved == 4 * 96 + 5000


def test_the_higher_bound_is_what_holds_a_node() -> None:
    roofs = Roofs(bytes_per_s=10e9, operations_per_s=100e9)
    row = node_cost(node("MatMul", [(1, 4096)], [(1, 4096)]), {})
    square = node_cost(node("MatMul", [(512, 512)], [(512, 512)]), {})
    assert roofs.limit(row, 1e5) == "memory"
    assert roofs.best_us(row) == pytest.approx(1e6 * 4 * (4096 * 4096 + 8192) / 10e9)
    assert roofs.limit(square, 1e5) == "compute"
    assert roofs.best_us(square) == pytest.approx(1e6 * 2 * 512**3 / 100e9)
    assert roofs.limit(node_cost(node("Add", [(4,), (4,)], [(4,)]), {}), 5.0) == "overhead"


# Reading a profile


def event(cat: str, name: str, ts: int, dur: int, **arguments: Any) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": arguments}


@pytest.fixture
def mixed(tmp_path: Path) -> RunProfile:
    """Two runs on a device that computes later, the first of them to warm up; one node and two copies."""
    events = []
    for begin, scale in ((0, 100), (100_000, 1)):
        gpu = {"provider": "WebGpuExecutionProvider", "output_size": "400", "activation_size": "100"}
        cpu = {"provider": "CPUExecutionProvider", "output_size": "40", "activation_size": "60"}
        events += [
            event("Node", "first_kernel_time", begin + 1, 5 * scale, op_name="MatMul", **gpu),
            event("Node", "copy_kernel_time", begin + 2, 1 * scale, op_name="MemcpyToHost", **gpu),
            event("Node", "second_kernel_time", begin + 3, 20 * scale, op_name="Add", **cpu),
            event("Session", "model_run", begin, 100 * scale),
        ]
    events += [event("Api", "first&MatMul&Program", t, 60 * s) for t, s in ((9, 100), (5, 1))]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    return read_profile(path, skip_runs=1)


def test_the_first_run_is_not_counted(mixed: RunProfile) -> None:
    assert (mixed.runs, mixed.run_us) == (1, 100)
    assert [(n.name, n.calls, n.time_us) for n in mixed.nodes] == [
        ("first", 1, 5), ("copy", 1, 1), ("second", 1, 20)
    ]  # fmt: skip
    assert mixed.kernels == {"MatMul": 60}
    assert RunProfile.from_json(json.loads(json.dumps(mixed.to_json()))) == mixed


def test_a_device_that_computes_later_gets_the_rest_of_the_run(mixed: RunProfile) -> None:
    assert mixed.provider_times()["WebGpuExecutionProvider"] == 6
    placement = placement_of(
        {"CPUExecutionProvider": {"Add": 1}}, mixed, asynchronous="WebGpuExecutionProvider"
    )
    assert placement.nodes == {"CPUExecutionProvider": 1, "WebGpuExecutionProvider": 1}
    assert placement.time_shares["WebGpuExecutionProvider"] == pytest.approx(0.8)
    assert placement.bytes_shares["CPUExecutionProvider"] == pytest.approx(100 / 1100)
    assert (placement.copies, placement.copied_bytes) == (1, 500)


def test_a_device_reports_its_own_times(mixed: RunProfile) -> None:
    described = describe_profile(mixed, Roofs(1e9, 1e9), {}, asynchronous=True)
    assert described["operators"][0]["op_type"] == "MatMul"
    assert described["operators"][0]["time_ms"] == pytest.approx(0.06)
    assert [n["name"] for n in described["nodes"]] == ["first"]
    assert described["note"] == "times are the device's own"
    quiet = RunProfile(mixed.nodes, {}, {}, mixed.run_us, mixed.runs)
    described = describe_profile(quiet, None, {}, asynchronous=True)
    assert described["nodes"] == []
    assert "handing the work over" in described["note"]


def test_what_was_compiled_has_no_roof(mixed: RunProfile) -> None:
    described = describe_profile(mixed, Roofs(1e9, 1e9), {}, asynchronous=False, compiled={"Add"})
    by_name = {entry["op_type"]: entry for entry in described["operators"]}
    assert "limit" not in by_name["Add"]
    assert by_name["MatMul"]["limit"] in ("memory", "compute", "overhead")


# For real, on the CPU


def test_a_session_is_profiled(plain: Path) -> None:
    with OrtSession(load_package(plain)) as session:
        profile = session.profile({"x": np.ones((3, 32), np.float32)}, runs=4)
        measured = session.placement(measured=True)
    assert profile.runs == 4
    assert {n.name: n.calls for n in profile.nodes} == {"first": 4, "act": 4, "second": 4}
    assert profile.nodes[0].outputs == [("float", (3, 16))]
    assert measured.time_shares == measured.bytes_shares == {"CPUExecutionProvider": 1.0}
    assert measured.copies == 0


def test_bench_profiles_against_measured_roofs(plain: Path) -> None:
    settings = BenchSettings(batch=3, runs=1, threads=1)
    (result,) = benchmark([Candidate("plain", plain)], settings, profile=True)
    assert result.error == ""
    assert result.profile is not None
    operators = {entry["op_type"]: entry for entry in result.profile["operators"]}
    assert operators["MatMul"]["calls"] == 2
    assert operators["MatMul"]["operations"] == 2 * 3 * (32 * 16 + 16 * 8)
    assert sum(entry["share"] for entry in operators.values()) == pytest.approx(1)
    roofs = result.profile["roofs"]
    # A processor of this century, and none of the next.
    assert 0.5e9 < roofs["bytes_per_s"] < 1e12
    assert 1e9 < roofs["operations_per_s"] < 1e14
    assert {n["name"] for n in result.profile["nodes"]} == {"first", "act", "second"}
    assert json.dumps(result.to_json())


def test_bound_memory_computes_the_same(plain: Path) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)}
    with OrtSession(load_package(plain)) as session:
        expected = session.run(feeds)
        bound = session.bind(feeds)
        for _ in range(2):
            bound.run()
        for name, value in bound.outputs().items():
            assert np.array_equal(value, expected[name])
        values = {"x": session.ort_value(feeds["x"])}
        names = list(expected)
        for given in session.run_values(values, names, bind=True, host=("y",)):
            assert given.device_name() == "cpu"
        unbound = session.run_values(values, names)
        assert np.array_equal(unbound[0].numpy(), expected[names[0]])
    settings = BenchSettings(batch=3, runs=2, threads=1, io_binding=True)
    (result,) = benchmark([Candidate("bound", plain)], settings)
    assert (result.error, result.settings.io_binding) == ("", True)
    assert result.latency_ms is not None


def test_roofs_of_a_provider_are_measured() -> None:
    roofs = measure_roofs(choose_provider("cpu"), threads=1)
    assert roofs.operations_per_s > roofs.bytes_per_s / 4


# Settings


def test_cuda_graphs_need_cuda_and_fixed_shapes(plain: Path, tiny_artifact_dir: Path) -> None:
    (result,) = benchmark([Candidate("plain", plain)], BenchSettings(cuda_graph=True, runs=1))
    assert "CUDA graphs; expected one of cuda, tensorrt" in result.error
    assert result.exit_status == 2
    with pytest.raises(BadInputError, match="cuda_graph: without IO binding; expected with it"):
        BenchSettings(cuda_graph=True, io_binding=False)
    from onnxsmith.runtime.rounds import round_of

    settings = {"seed": 0, "batch": 1, "prompt_tokens": 4, "new_tokens": 2, "cuda_graph": True}
    with (
        OrtSession(load_package(tiny_artifact_dir)) as session,
        pytest.raises(BadInputError, match="CUDA graphs for a decoder, whose cache grows"),
    ):
        round_of(session, settings, {})


def test_a_processor_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInputError, match="affinity: processor 99999; expected some of "):
        BenchSettings(affinity=(99999,))
    assert BenchSettings(affinity=(min(os.sched_getaffinity(0)),)).thread_count == 1


def test_affinity_holds_the_worker(plain: Path) -> None:
    import psutil

    seen: list[list[int]] = []

    def on_round(name: str, number: int) -> None:
        children = [c for c in psutil.Process().children() if "onnxsmith.runtime.worker" in c.cmdline()]
        seen.append(children[0].cpu_affinity())

    first = min(os.sched_getaffinity(0))
    settings = BenchSettings(runs=1, threads=1, affinity=(first,))
    (result,) = benchmark([Candidate("x", plain)], settings, on_round=on_round)
    assert result.error == ""
    assert seen == [[first], [first]]


# The machine


def test_memory_of_a_gpu_is_that_of_the_process() -> None:
    text = "123, 500\n77, 100\n123, 12\nNo running processes found\n"
    assert parse_device_memory(text, 123) == pytest.approx(512 * 1024 * 1024 / 1e6)
    assert parse_device_memory(text, 1) is None
    assert parse_device_memory("", 123) is None


def test_other_programs_are_seen() -> None:
    import subprocess
    import sys
    import time

    # A grandchild whose parent has gone is nobody's child, so its work is another program's.
    spin = "import time; end = time.time() + 4\nwhile time.time() < end: pass"
    parent = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {spin!r}]).pid)"
    subprocess.run([sys.executable, "-c", parent], check=True, stdout=subprocess.DEVNULL)
    load = MachineLoad()
    assert load.other_pct() is None
    time.sleep(1.5)
    percent = load.other_pct()
    import psutil

    assert percent is not None
    assert percent > 0.3 * 100 / (psutil.cpu_count() or 1)
