"""`doctor`: the machine, how a model behaves when it runs, what remedies gain, and the remedied model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from onnxsmith import load_package
from onnxsmith.errors import BadInputError, CheckFailedError, UnknownNameError
from onnxsmith.finding import Finding
from onnxsmith.graph_passes.findings import RULES
from onnxsmith.graph_passes.quantization import QuantizeWeights
from onnxsmith.onnx_file import load_model, save_model
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.doctor import Diagnosed, diagnose
from onnxsmith.pipeline.doctor_gains import Gain, gain_of, thread_finding
from onnxsmith.runtime import BenchResult, BenchSettings, OrtBackend, OrtSession, Placement
from onnxsmith.runtime.behaviour import observe
from onnxsmith.runtime.bench_result import Spread
from onnxsmith.runtime.machine import MACHINE_RULES, Machine, machine_findings, read_machine

Package = Callable[..., Any]
HEALTHY = Machine(
    cpu="a processor",
    logical_cpus=8,
    usable_cpus=8,
    physical_cores=4,
    features=frozenset({"avx2", "avx512_vnni"}),
    governor="performance",
    memory_bytes=16_000_000_000,
    available_bytes=12_000_000_000,
    runtimes={"onnxruntime": "1.32.0"},
    providers=("CPUExecutionProvider",),
    other_load_pct=3.0,
)
DISEASES: Mapping[str, dict[str, Any]] = {
    "packages": {"runtimes": {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}},
    "no_runtime": {"providers": ()},
    "cpu_quota": {"cpu_quota": 1.5},
    "memory": {"available_bytes": 500_000_000},
    "governor": {"governor": "powersave"},
    "no_vnni": {"features": frozenset({"avx2"})},
    "no_own_kernels": {"no_own_kernels": "no C++ compiler is installed"},
    "thread_variables": {"variables": {"OMP_NUM_THREADS": "1"}},
    "idle_gpu": {"has_nvidia": True},
    "busy": {"other_load_pct": 60.0},
}
FAST = BenchSettings(prompt_tokens=8, new_tokens=4, runs=2, threads=1)


def test_a_healthy_machine_has_nothing() -> None:
    assert not machine_findings(HEALTHY)
    assert set(DISEASES) == set(MACHINE_RULES)


@pytest.mark.parametrize("rule", DISEASES)
def test_each_disease_of_a_machine_is_found(rule: str) -> None:
    (finding,) = machine_findings(dataclasses.replace(HEALTHY, **DISEASES[rule]))
    assert finding.rule == rule
    assert finding.what and finding.why and finding.remedy
    assert (finding.kind == "wrong") == (rule in ("packages", "no_runtime"))


def test_every_rule_is_documented() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    seen_at_work = ("does_not_run", "not_finite", "constant", "fallback", "own_kernels", "threads")
    for rule in (*RULES, *MACHINE_RULES, *seen_at_work):
        assert f"| `{rule}` |" in text, rule


def test_what_is_no_disease() -> None:
    for change in (
        {"cpu_quota": 8.0},
        {"variables": {"OMP_NUM_THREADS": "8"}},
        {"features": frozenset({"asimd", "i8mm"})},
        {"has_nvidia": True, "providers": ("CUDAExecutionProvider", "CPUExecutionProvider")},
        {"other_load_pct": None},
    ):
        assert not machine_findings(dataclasses.replace(HEALTHY, **change)), change


def fake_root(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_limits_of_control_groups_are_read(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pods/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pods/one/memory.max": "1000000000\n",
            "sys/fs/cgroup/pods/one/memory.current": "400000000\n",
            "proc/cpuinfo": "processor : 0\nflags : fpu avx2 fma avx_vnni\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "dev/nvidia0": "",
        },
    )
    machine = read_machine(root)
    assert machine.cpu_quota == 1.5
    assert (machine.memory_bytes, machine.available_bytes) == (1_000_000_000, 600_000_000)
    assert machine.features == {"avx2", "fma", "avx_vnni"}
    assert machine.governor == "powersave" and machine.has_nvidia
    assert machine.threads == 1


def test_limits_of_the_old_control_groups_are_read(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
        },
    )
    machine = read_machine(root)
    assert machine.cpu_quota == 0.5 and machine.threads == 1
    assert machine.memory_bytes == 2_000_000_000
    empty = read_machine(tmp_path / "nothing")
    assert empty.cpu_quota is None and empty.memory_bytes > 0 and "onnxruntime" in " ".join(empty.runtimes)


def seen(package: Any) -> dict[str, Finding]:
    return {one.rule: one for one in observe(package, OrtBackend(), name="model").findings}


@pytest.mark.parametrize(
    ("body", "rules"),
    [
        ("y = Relu(x)", set()),
        ("n = Neg(x) a = Abs(x) d = Sub(n, a) y = Log(d)", {"not_finite"}),
        ("z = Sub(x, x) y = Exp(z)", {"constant"}),
    ],
    ids=["healthy", "NaN", "constant"],
)
def test_results_that_cannot_be_right(onnx_package: Package, body: str, rules: set[str]) -> None:
    package = onnx_package(f"g (float[batch, 8] x) => (float[batch, 8] y) {{ {body} }}")
    found = seen(package)
    assert set(found) == rules
    assert all(finding.kind == "wrong" and finding.nodes == ("y",) for finding in found.values())


def test_a_model_that_does_not_run_is_a_finding(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "nobody" : 1]> g (float[2] x) => (float[2] y) '
        "{ y = nobody.Unknown(x) }"
    )
    onnx.save(model, tmp_path / "model.onnx")
    result = diagnose(tmp_path / "model.onnx", measure=False)
    (finding,) = [one.finding for one in result.found if one.finding.rule == "does_not_run"]
    assert "Unknown" in finding.what
    assert not result.is_well


def spread(*values: float) -> Spread:
    return Spread.of(list(values))


def bench(name: str, latency: Spread, first: Spread | None = None) -> BenchResult:
    return BenchResult(
        name, "CPUExecutionProvider", FAST, latency_ms=latency, first_token_ms=first, size_mb=1.0
    )


def test_gains_are_certain_only_where_intervals_lie_apart() -> None:
    fast, slow, wide = spread(1.0, 1.1, 1.05), spread(2.0, 2.1, 2.05), spread(0.9, 2.2, 1.5)
    gain = gain_of(bench("a", slow), bench("b", fast))
    assert gain.certain and gain.ratios["latency"] == pytest.approx(2.05 / 1.05)
    assert not gain_of(bench("a", slow), bench("b", wide)).certain
    # Faster in one respect and slower in another is neither.
    assert not gain_of(bench("a", slow, fast), bench("b", fast, slow)).certain
    assert gain_of(bench("a", slow, wide), bench("b", fast, wide)).certain


@pytest.mark.parametrize(
    ("ratio", "certain", "exact", "helps"),
    [
        (2.0, True, False, True),
        (2.0, False, False, False),
        (1.0, False, True, True),
        (0.5, True, True, False),
        (0.5, True, False, False),
    ],
)
def test_a_remedy_that_rounds_has_to_gain_something(
    ratio: float, certain: bool, exact: bool, helps: bool
) -> None:
    gain = Gain("", {"latency": ratio}, {"latency": 1.0}, {"latency": ratio}, certain)
    finding = Finding("a rule", "slow", "", "", "", exact=exact)
    one = Diagnosed(finding, [gain])
    assert one.speedup == pytest.approx(ratio)
    assert one.helps == helps
    assert Diagnosed(finding).helps == exact


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 bits without accuracy_level: ONNX Runtime has no fast kernel for that."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[batch, 256] x) => (float[batch, 256] y) '
        "{ [one] h = MatMul(x, w) t = Tanh(h) [two] y = MatMul(t, v) }"
    )
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(random.standard_normal((256, 256)).astype(np.float32) / 16, name)
        for name in ("w", "v")
    )
    path = tmp_path_factory.mktemp("slow") / "model.onnx"
    onnx.save(model, path)
    loaded = load_model(path)
    QuantizeWeights(bits=8, symmetric=True, accuracy_level=0)(loaded)
    save_model(loaded, path)
    return path


def command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_remedy_is_measured_and_applied(slow_model: Path, tmp_path: Path) -> None:
    out, result_file = tmp_path / "fixed", tmp_path / "result.json"
    status, shown, said = command(
        slow_model, "--fix", out, "--threads", 1, "--runs", 3, "--json", result_file
    )
    assert status == 0, said
    result = json.loads(result_file.read_text())
    (found,) = [one for one in result["findings"] if one["rule"] == "accuracy_level"]
    assert found["applied"] and found["agrees"] and found["speedup"] > 2
    assert found["worst_cosine"] > 0.999
    assert result["roofs"]["bytes_per_s"] > 0 and result["machine"]["threads"] >= 1
    assert "SLOW" in shown and "accuracy_level" in shown and f"fixed      {out}" in shown
    fixed = load_package(out)
    assert {
        node.attributes["accuracy_level"].as_int() for node in fixed.main.model.graph if node.attributes
    } == {4}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["steps"][-1]["name"] == "set_accuracy_level"
    assert manifest["measurements"]["doctor"]["gains"][0]["ratios"]["latency"] > 2
    # What was remedied has nothing left.
    again = diagnose(out, measure=False)
    assert not [one for one in again.found if one.finding.passes]


def test_without_measuring_a_remedy_that_rounds_is_not_applied(slow_model: Path, tmp_path: Path) -> None:
    result = diagnose(slow_model, fix=tmp_path / "out", measure=False)
    (found,) = [one for one in result.found if one.finding.rule == "accuracy_level"]
    assert found.comparison is not None and found.comparison.passed
    assert found.verdict == "not measured" and not found.applied
    assert result.fixed is None and not (tmp_path / "out").exists()


def test_a_remedy_that_breaks_the_model_is_refused(
    slow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.graph_passes.block_repairs import SetAccuracyLevel
    from onnxsmith.graph_passes.contract import Changes

    def spoil(self: SetAccuracyLevel, model: Any) -> Changes:
        for node in list(model.graph):
            if node.op_type == "MatMulNBits":
                scales = node.inputs[2].const_value.numpy() * np.linspace(-1, 1, 8)
                node.inputs[2].const_value = ir.tensor(scales.astype(np.float32), name="spoiled")
        return Changes(1)

    monkeypatch.setattr(SetAccuracyLevel, "apply", spoil)
    result = diagnose(slow_model, fix=tmp_path / "out", measure=False)
    (found,) = [one for one in result.found if one.finding.rule == "accuracy_level"]
    assert found.verdict.startswith("the remedy does not help: results differ")
    assert not found.helps and result.fixed is None


def test_all_together_are_compared_before_they_are_written(
    slow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.pipeline import doctor as module

    monkeypatch.setattr(module.Diagnosed, "helps", property(lambda self: True))
    real = module._Case.compared
    calls: list[int] = []

    def compared(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        found = real(self, *arguments)
        return dataclasses.replace(found, error="it is another model") if len(calls) > 1 else found

    monkeypatch.setattr(module._Case, "compared", compared)
    with pytest.raises(CheckFailedError, match=r"--fix .*: with all remedies together it is another model"):
        diagnose(slow_model, fix=tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()


def test_a_choice_is_only_applied_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxsmith.graph_passes import block_findings

    monkeypatch.setattr(block_findings, "_SMALLEST_BYTES", 1)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[batch, 64] x) => (float[batch, 64] y) '
        "{ y = MatMul(x, w) }"
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    monkeypatch.setattr(Diagnosed, "helps", property(lambda self: True))
    assert diagnose(path, fix=tmp_path / "out", measure=False).fixed is None
    result = diagnose(path, fix=tmp_path / "out", rules=["float_weights"], measure=False)
    assert result.fixed == tmp_path / "out"
    assert load_package(tmp_path / "out").precision == "int8"


def test_fallback_says_what_ran_elsewhere(onnx_package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package = onnx_package("g (float[batch, 8] x) => (float[batch, 8] y) { z = Abs(x) y = Exp(z) }")
    real = OrtSession.placement

    def placed(self: OrtSession, *arguments: Any, **options: Any) -> Placement:
        found = real(self, *arguments, **options)
        assert found.only_provider == "CPUExecutionProvider"
        return Placement(
            {"CPUExecutionProvider": 1, "AnotherExecutionProvider": 1},
            {"CPUExecutionProvider": {"Abs": 1}, "AnotherExecutionProvider": {"Exp": 1}},
            {"CPUExecutionProvider": 0.25, "AnotherExecutionProvider": 0.75},
        )

    assert "fallback" not in seen(package)
    monkeypatch.setattr(OrtSession, "placement", placed)
    finding = seen(package)["fallback"]
    assert finding.what == "1 of 2 nodes on Another, 75% of the time (Exp)"
    assert (finding.kind, finding.nodes, finding.count) == ("slow", ("Exp",), 1)


@pytest.mark.parametrize(
    ("default_ms", "fewer_ms", "found"),
    [
        ((4.0, 4.1, 4.2), (2.0, 2.1, 2.2), True),
        ((4.0, 4.1, 4.2), (4.3, 4.4, 4.5), False),
        # Certain, and not worth setting.
        ((4.0, 4.01, 4.02), (3.9, 3.91, 3.92), False),
        # Not certain.
        ((4.0, 9.0, 2.0), (2.0, 5.0, 3.0), False),
    ],
    ids=["faster", "slower", "hardly", "unknown"],
)
def test_fewer_threads_have_to_be_faster_for_certain(
    default_ms: tuple[float, ...],
    fewer_ms: tuple[float, ...],
    found: bool,
    slow_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxsmith.pipeline import measuring

    asked: list[list[int]] = []

    def measured(models: Any, points: list[BenchSettings], **options: Any) -> list[BenchResult]:
        asked.append([point.thread_count for point in points])
        return [bench("model", spread(*default_ms)), bench("model", spread(*fewer_ms))]

    monkeypatch.setattr(measuring, "bench_models", measured)
    result = thread_finding(slow_model, "cpu", dataclasses.replace(FAST, threads=4))
    assert asked == [[4, 2], [4, 1]]
    assert (result is not None) == found
    if result is not None:
        finding, gains = result
        assert (finding.rule, finding.what) == ("threads", "2 threads are faster than 4")
        assert gains[0].ratios["latency"] == pytest.approx(4.1 / 2.1)


def test_threads_are_really_measured(slow_model: Path) -> None:
    result = thread_finding(slow_model, "cpu", dataclasses.replace(FAST, threads=2))
    # Which is faster depends on the machine, and what is said has to follow from the numbers.
    assert result is None or all(ratio > 1.05 for gain in result[1] for ratio in gain.ratios.values())
    assert thread_finding(slow_model, "cpu", FAST) is None


def test_the_machine_alone() -> None:
    status, shown, _ = command("--no-measure")
    assert status == 0
    assert shown.startswith("machine    ") and "runtime    onnxruntime" in shown


def test_something_wrong_is_exit_status_1(onnx_package: Package, tmp_path: Path) -> None:
    onnx_package("g (float[batch, 8] x) => (float[batch, 8] y) { z = Sub(x, x) y = Exp(z) }")
    status, shown, _ = command(tmp_path / "model.onnx", "--no-measure")
    assert status == 1
    assert "WRONG      constant: y do not depend on the inputs" in shown


def test_bad_requests_are_refused(slow_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown rule 'speed'; expected one of accuracy_level"):
        diagnose(slow_model, rules=["speed"])
    with pytest.raises(BadInputError, match="doctor: --fix: no model; expected a model to look at"):
        diagnose(fix=tmp_path / "out")
    with pytest.raises(BadInputError, match="doctor: --rule: no model"):
        diagnose(rules=["unfused"])
    assert command(tmp_path / "nothing.onnx")[0] == 2
    assert command(slow_model, "--provider", "cdua")[0] == 2


def test_a_graph_is_looked_at_for_a_provider_that_is_not_here(
    tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    found = diagnose(tiny_artifact_dir, static=True, provider="cuda", rules=["cuda_kernels"])
    assert found.provider == "CUDAExecutionProvider" and found.roofs is None and found.is_well
    assert [one.finding.rule for one in found.found] == ["cuda_kernels"]
    for refused in ({"model": None}, {"fix": tmp_path / "fixed"}):
        with pytest.raises(BadInputError, match="expected a model to look at, and no more"):
            diagnose(**{"model": tiny_artifact_dir, "static": True, **refused})
    with pytest.raises(UnknownNameError, match="unknown execution provider 'nonsense'"):
        diagnose(tiny_artifact_dir, static=True, provider="nonsense")
