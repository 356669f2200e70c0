"""Benchmarks run for real: child processes, their memory, and what happens when one of them dies."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.package import ModelPackage, TensorSpec
from onnxsmith.package_io import save_package
from onnxsmith.pipeline.measuring import _torch_candidates, bench_models
from onnxsmith.program import TorchProgram
from onnxsmith.runtime import BenchResult, BenchSettings, Candidate, OrtSession, benchmark
from onnxsmith.runtime.benchmarking import Spread

pytest.importorskip("onnxruntime")

Make = Callable[..., ModelPackage]
SMALL = BenchSettings(prompt_tokens=8, new_tokens=4, runs=3, threads=1)


def workers() -> list[psutil.Process]:
    """The measuring processes that this one has started, oldest first."""
    found = []
    for child in psutil.Process().children():
        with_command = child.cmdline() if child.status() != psutil.STATUS_ZOMBIE else []
        if "onnxsmith.runtime.worker" in with_command:
            found.append(child)
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


# Settings


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("prompt_tokens", 0, 1),
        ("new_tokens", 1, 2),
        ("batch", 0, 1),
        ("runs", 0, 1),
        ("runs", -3, 1),
        ("threads", 0, 1),
    ],
)
def test_settings_that_measure_nothing_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(BadInputError, match=f"bench: {name}: {value}; expected at least {least}"):
        BenchSettings(**{name: value})


def test_threads_are_the_usable_processors_unless_given() -> None:
    assert BenchSettings().thread_count == len(os.sched_getaffinity(0))
    assert BenchSettings(threads=3).thread_count == 3


def test_a_candidate_is_one_model(tmp_path: Path, tiny_program: TorchProgram) -> None:
    with pytest.raises(BadInputError, match="bench: x: neither a path nor a program; expected one of them"):
        Candidate("x")
    with pytest.raises(BadInputError, match="bench: x: a path and a program; expected one of them"):
        Candidate("x", path=tmp_path, program=tiny_program)


def test_no_candidate_is_refused() -> None:
    with pytest.raises(BadInputError, match="bench: no model; expected at least one"):
        benchmark([], SMALL)


def test_a_spread_summarises() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.p50, spread.mean, spread.low, spread.high, spread.runs) == (3.0, 4.0, 1.0, 10.0, 5)
    assert spread.p50 < spread.p90 < spread.p99 < spread.high
    assert spread.spread_pct == pytest.approx(300)
    assert BenchResult("x", "cpu", SMALL, latency_ms=spread).noisy
    assert not BenchResult("x", "cpu", SMALL, latency_ms=Spread.of([1.0, 1.1])).noisy
    assert not BenchResult("x", "cpu", SMALL).noisy


# Measurements


Measured = tuple[list[BenchResult], list[tuple[str, int]]]


@pytest.fixture(scope="module")
def measured(tiny_artifact_dir: Path, tiny_program: TorchProgram) -> Measured:
    """A decoder as a directory, as a file and in torch, with the order of the rounds."""
    order: list[tuple[str, int]] = []
    candidates = [
        Candidate("directory", path=tiny_artifact_dir),
        Candidate("torch", program=tiny_program),
        Candidate("file", path=tiny_artifact_dir / "model.onnx"),
    ]
    results = benchmark(candidates, SMALL, on_round=lambda name, number: order.append((name, number)))
    return results, order


def test_candidates_take_turns_and_the_first_round_is_not_counted(measured: Measured) -> None:
    results, order = measured
    names = [result.name for result in results]
    assert names == ["directory", "torch", "file"]
    assert order == [(name, number) for number in range(4) for name in names]
    for result in results:
        assert result.latency_ms is not None
        assert result.latency_ms.runs == 3


def test_a_decoder_has_all_its_numbers(measured: Measured, tiny_artifact_dir: Path) -> None:
    results, _ = measured
    for result in results:
        assert (result.error, result.exit_status) == ("", 0)
        latency, first = result.latency_ms, result.first_token_ms
        decode, prefill, total = result.decode_tokens_per_s, result.prefill_tokens_per_s, result.throughput
        assert latency and first and decode and prefill and total
        assert 0 < latency.low <= latency.p50 <= latency.high
        # 3 of the 4 tokens are decoded one by one, the first comes with the prompt of 8.
        assert (latency.runs, latency.samples) == (3, 9)
        assert 1e3 / latency.p99 * 0.999 <= decode.p50 <= 1e3 / latency.low * 3
        assert prefill.p50 == pytest.approx(8e3 / first.p50, rel=1e-9)
        assert total.p50 <= min(decode.high, 4 * 1e3 / first.low) * 1.34
        for name, middle in (("p50", latency.p50), ("p90", latency.p90), ("p99", latency.p99)):
            low, high = latency.ci95[name]
            assert low <= middle <= high
    size = (tiny_artifact_dir / "model.onnx").stat().st_size / 1e6
    for result in (results[0], results[2]):
        assert result.provider == "CPUExecutionProvider"
        assert result.size_mb == pytest.approx(size)
        assert result.load_s is not None and 0 < result.load_s < 60
        assert result.peak_rss_mb is not None and 20 < result.peak_rss_mb < 2000
        assert result.placement is not None
        assert result.placement["CPUExecutionProvider"]["share"] == 1.0
        assert result.placement["CPUExecutionProvider"]["operators"]["GroupQueryAttention"] == 2
    assert results[1].provider == "torch"
    assert (results[1].size_mb, results[1].peak_rss_mb, results[1].placement) == (None, None, None)


def test_results_are_plain_data(measured: Measured) -> None:
    for result in measured[0]:
        plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert plain["name"] == result.name
        assert plain["settings"]["threads"] == 1
        assert plain["latency_ms"]["runs"] == 3
        assert plain["noisy"] is result.noisy


def test_no_process_is_left(measured: Measured) -> None:
    assert workers() == []


PLAIN = "g (float[batch, 16] x) => (float[batch, 16] y) { y = Relu(x) }"


def test_a_model_without_a_cache_has_a_latency_only(onnx_package: Make) -> None:
    path = onnx_package(PLAIN).main.path
    settings = dataclasses.replace(SMALL, batch=5)
    (result,) = benchmark([Candidate("plain", path=path)], settings)
    assert result.error == ""
    assert result.latency_ms is not None and result.throughput is not None
    assert result.latency_ms.samples % 3 == 0 and result.latency_ms.samples > 3
    assert 0.2 < result.throughput.p50 / (5e3 / result.latency_ms.p50) < 1.5
    assert result.first_token_ms is result.prefill_tokens_per_s is result.decode_tokens_per_s is None


def test_external_data_counts_as_size(tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    from onnxsmith.onnx_file import save_model

    table = ir.Value(name="table", const_value=ir.Tensor(np.ones((100, 100), np.float32), name="table"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 100]))
    node = ir.node("MatMul", [x, table])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["batch", 100])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[table], opset_imports={"": 20}, name="g")
    written = save_model(ir.Model(graph, ir_version=9), tmp_path / "m.onnx", inline_limit_bytes=0)
    assert (tmp_path / "m.onnx.data").stat().st_size == 40000
    results = benchmark(
        [Candidate("file", path=tmp_path / "m.onnx"), Candidate("directory", path=tmp_path)],
        dataclasses.replace(SMALL, runs=1),
    )
    assert [result.size_mb for result in results] == [written / 1e6, written / 1e6]


def test_peak_memory_is_the_childs_and_not_the_parents(onnx_package: Make) -> None:
    # Memory that this process once had is in its own maximum for ever, and getrusage in a child inherits it.
    ballast = np.ones(500_000_000, np.uint8)
    assert psutil.Process().memory_info().rss > 500e6
    (result,) = benchmark([Candidate("plain", path=onnx_package(PLAIN).main.path)], SMALL)
    del ballast
    assert result.peak_rss_mb is not None
    assert 20 < result.peak_rss_mb < 400


def test_peak_memory_counts_what_was_freed() -> None:
    from onnxsmith.runtime.worker import peak_rss_mb

    before = peak_rss_mb()
    now = psutil.Process().memory_info().rss / 1e6
    assert before >= now * 0.99
    ballast = np.ones(int((before - now + 100) * 1e6), np.uint8)
    del ballast
    assert peak_rss_mb() > before + 50


# Failures


@pytest.mark.parametrize("kind", ["garbage", "missing", "wrong"])
def test_a_broken_model_is_an_error_of_its_own(kind: str, onnx_package: Make, tmp_path: Path) -> None:
    good = Candidate("good", path=onnx_package(PLAIN).main.path)
    if kind == "garbage":
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"\x08\x09not a model")
        message, status = "not an ONNX model, or truncated", 2
    elif kind == "missing":
        broken = tmp_path / "missing.onnx"
        message, status = "no such file or directory", 2
    else:
        body = "{ s = Constant<value_ints=[3, 16]>() y = Reshape(x, s) }"
        frozen = f"g (float[batch, 16] x) => (float[3, 16] y) {body}"
        broken = onnx_package(frozen, "broken").main.path or tmp_path
        message, status = "ONNX Runtime fails in CPUExecutionProvider", 2
    results = benchmark([Candidate("broken", path=broken), good], SMALL)
    assert [result.name for result in results] == ["broken", "good"]
    assert message in results[0].error
    assert results[0].exit_status == status
    assert results[0].latency_ms is None
    assert json.dumps(results[0].to_json())
    assert results[1].error == ""
    assert results[1].latency_ms is not None and results[1].latency_ms.runs == 3


@pytest.mark.parametrize(
    ("provider", "status", "message"), [("qnn", 3, "onnxruntime-qnn"), ("cup", 2, "'cpu'")]
)
def test_a_provider_that_is_not_there_is_an_error_with_its_exit_status(
    provider: str, status: int, message: str, onnx_package: Make
) -> None:
    path = onnx_package(PLAIN).main.path
    candidates = [Candidate("good", path=path), Candidate("other", path=path, provider=provider)]
    good, other = benchmark(candidates, SMALL)
    assert good.error == ""
    assert good.latency_ms is not None
    assert message in other.error
    assert (other.exit_status, other.provider) == (status, provider)


@pytest.mark.parametrize("when", ["open", "round"])
def test_a_torch_program_that_fails_is_an_error_of_its_own(when: str, onnx_package: Make) -> None:
    torch = pytest.importorskip("torch")

    class Broken(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, **tensors: Any) -> dict[str, Any]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    # A type that numpy does not have fails before anything runs.
    dtype = "float32" if when == "round" else "float3"
    program = TorchProgram(Broken(), (TensorSpec("x", dtype, ("batch", 4)),), (), {})
    broken, good = benchmark(
        [Candidate("broken", program=program), Candidate("good", path=onnx_package(PLAIN).main.path)], SMALL
    )
    assert broken.error.startswith("bench: broken on torch: it fails: ")
    assert broken.exit_status == 1
    if when == "round":
        assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in broken.error
    assert good.error == ""
    assert good.latency_ms is not None


def test_a_process_that_dies_is_an_error_with_its_signal(onnx_package: Make) -> None:
    path = onnx_package(PLAIN).main.path
    killed: list[int] = []
    now, done = threading.Event(), threading.Event()

    def kill_the_first() -> None:
        now.wait(60)
        victim = workers()[0]
        victim.kill()
        killed.append(victim.pid)
        done.set()

    def on_round(name: str, number: int) -> None:
        if (name, number) == ("second", 1):
            now.set()
            assert done.wait(60)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    try:
        first, second = benchmark(
            [Candidate("first", path=path), Candidate("second", path=path)], SMALL, on_round=on_round
        )
    finally:
        now.set()
        killer.join()
    assert len(killed) == 1
    assert first.error.startswith("bench: first on cpu: its process was killed by SIGKILL")
    assert "expected an answer" in first.error
    assert "memory" in first.error
    assert (first.exit_status, first.latency_ms) == (1, None)
    assert second.error == ""
    assert second.latency_ms is not None and second.latency_ms.runs == 3
    assert not psutil.pid_exists(killed[0])


def test_a_process_that_cannot_start_says_why(
    onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numpy.py").write_text("raise RuntimeError('planted')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (result,) = benchmark([Candidate("x", path=onnx_package(PLAIN).main.path)], SMALL)
    assert "its process ended with status 1 (RuntimeError: planted)" in result.error


def test_the_current_directory_provides_no_modules(
    onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = onnx_package(PLAIN).main.path
    (tmp_path / "numpy.py").write_text("raise RuntimeError('planted')")
    monkeypatch.chdir(tmp_path)
    (result,) = benchmark([Candidate("x", path=path)], SMALL)
    assert result.error == ""
    assert result.latency_ms is not None and math.isfinite(result.latency_ms.p50)


def test_an_interruption_leaves_no_process(onnx_package: Make) -> None:
    def on_round(name: str, number: int) -> None:
        assert len(workers()) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark([Candidate("x", path=onnx_package(PLAIN).main.path)], SMALL, on_round=on_round)
    assert workers() == []


def test_some_graphs_of_several_are_measured(onnx_package: Make, tmp_path: Path) -> None:
    parts = {
        name: onnx_package(f"g (float[n, 4] x) => (float[n, 4] y) {{ y = {operator}(x) }}", name).main
        for name, operator in (("encoder_model", "Exp"), ("decoder_model", "Neg"))
    }
    model = tmp_path / "model"
    model.mkdir()
    save_package(ModelPackage(parts), model)
    names = {"components": {name: f"{name}.onnx" for name in parts}}
    (model / "manifest.json").write_text(json.dumps(names))
    every = bench_models([model], SMALL)
    assert [result.graph for result in every] == ["encoder_model", "decoder_model"]
    (one,) = bench_models([model], SMALL, components=["decoder_model"])
    assert (one.graph, one.error) == ("decoder_model", "")
    assert one.placement is not None
    assert one.placement["CPUExecutionProvider"]["operators"] == {"Neg": 1}
    with pytest.raises(
        UnknownNameError, match="--component: unknown graph 'nope'; expected one of decoder_m"
    ):
        bench_models([model], SMALL, components=["nope"])


def test_a_profile_may_do_without_a_run_before_it(onnx_package: Make) -> None:
    package = onnx_package("g (float[n, 4] x) => (float[n, 4] y) { y = Neg(x) }")
    with OrtSession(package, threads=1) as session:
        for warm in (True, False):
            taken = session.profile(runs=2, warm=warm)
            assert taken.runs == 2
            assert [(node.op_type, node.calls) for node in taken.nodes] == [("Neg", 2)]


def test_graphs_of_a_pytorch_model_stand_beside_those_of_an_artifact() -> None:
    names = ["encoder_model", "decoder_model"]
    found = _torch_candidates("whisper", names, ["decoder_model"], torch_compile=True, task=None)
    assert [(one.component, one.compiled) for one in found] == [
        ("decoder_model", False), ("decoder_model", True)
    ]  # fmt: skip
    assert [
        one.component for one in _torch_candidates("x", ["model"], (), torch_compile=False, task=None)
    ] == [None]
