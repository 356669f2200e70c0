"""Providers of other packages, for real: each in its environment, beside the CPU.

`make test` makes the environments with our own command. Where one is missing the test says so and is skipped,
unless ONNXSMITH_TEST_PROVIDERS names it, as CI does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import CheckFailedError, ProviderUnavailableError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.bisecting import bisect_models
from onnxsmith.runtime import (
    PROVIDERS,
    BenchSettings,
    Candidate,
    OrtBackend,
    OrtSession,
    WorkerSession,
    benchmark,
    check_requirements,
    choose_provider,
    generate,
    requirements_of,
)
from onnxsmith.runtime.environments import find_environment
from onnxsmith.runtime.provider_install import problem_of

pytest.importorskip("onnxruntime")

NAMES = ("openvino", "webgpu", "nxrt")
_REQUIRED = os.environ.get("ONNXSMITH_TEST_PROVIDERS", "").split(",")


@pytest.fixture(autouse=True)
def software_vulkan(monkeypatch: pytest.MonkeyPatch) -> None:
    """SwiftShader for WebGPU, where `make test` found it; else whatever GPU the machine has."""
    folder = os.environ.get("ONNXSMITH_TEST_VULKAN", "")
    if folder and Path(folder, "vk_swiftshader_icd.json").is_file():
        monkeypatch.setenv("VK_ICD_FILENAMES", str(Path(folder, "vk_swiftshader_icd.json")))
        monkeypatch.setenv("LD_LIBRARY_PATH", folder)


@pytest.fixture(params=NAMES)
def provider(request: pytest.FixtureRequest) -> str:
    """The name of a provider that runs here."""
    name: str = request.param
    if find_environment(PROVIDERS[name].package) is None:
        assert name not in _REQUIRED, f"{name} was asked for and has no environment"
        pytest.skip(
            f"{name} has no environment: `make test` or `onnxsmith providers --install {name}` makes it"
        )
    return name


@pytest.fixture
def running(provider: str) -> str:
    """The same, if its device is there too."""
    problem = problem_of(choose_provider(provider))
    if problem:
        # Software Vulkan comes from a package of Debian, which not every machine can fetch.
        assert provider == "webgpu", problem
        pytest.skip(f"{provider} does not run on this machine: {problem}")
    return provider


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Part of a transformer, with named nodes."""
    import onnx

    random = np.random.default_rng(0)
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        block (float[batch, length, 64] x) => (float[batch, length, 32] y) {
            [first] h = MatMul(x, w1)
            [gelu] a = Gelu(h)
            [norm] n = LayerNormalization<axis=-1>(a, scale)
            [second] z = MatMul(n, w2)
            [soft] y = Softmax<axis=-1>(z) }""")
    for name, shape in (("w1", (64, 128)), ("w2", (128, 32)), ("scale", (128,))):
        array = random.standard_normal(shape).astype(np.float32) / 8
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    onnx.save(model, path)
    yield path


def feeds(batch: int, length: int) -> dict[str, Any]:
    random = np.random.default_rng(batch * length)
    return {"x": random.standard_normal((batch, length, 64)).astype(np.float32)}


def wrong(path: Path) -> ModelPackage:
    """The block with one wrong weight."""
    import onnx

    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if i.name == "w2")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[5] *= 3
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "w2"))
    broken = path.with_name("wrong.onnx")
    onnx.save(model, broken)
    return load_package(broken)


def test_it_computes_what_the_cpu_does(running: str, block: Path) -> None:
    package = load_package(block)
    with OrtSession(package) as reference, OrtBackend(running).open(package) as session:
        assert isinstance(session, WorkerSession)
        assert session.provider == choose_provider(running).ort_name
        assert PROVIDERS[running].package in session.versions
        for shape in ((1, 8), (2, 5)):
            expected, got = reference.run(feeds(*shape))["y"], session.run(feeds(*shape))["y"]
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() < 1e-5
        placement = session.check_placement()
        assert placement.only_provider == session.provider
        assert sum(placement.nodes.values()) >= 5
    with OrtBackend(running).open(wrong(block)) as control:
        assert np.abs(control.run(feeds(2, 5))["y"] - expected).max() > 1e-3


def test_it_is_measured_beside_the_cpu(running: str, block: Path) -> None:
    requirements = requirements_of([f"{running}>=100%", f"{running}>=99%of time"], [running, "cpu"])
    settings = BenchSettings(prompt_tokens=8, runs=2, threads=1)
    candidates = [Candidate("here", block), Candidate("there", block, running)]
    here, there = benchmark(candidates, settings, requirements=requirements, profile=running == "webgpu")
    assert (here.error, there.error) == ("", "")
    assert here.latency_ms and there.latency_ms and there.placement
    assert there.placement[there.provider]["time_share"] == 1.0
    assert there.placement[there.provider]["bytes_share"] == 1.0
    assert there.versions and PROVIDERS[running].package in there.versions
    if there.profile:
        # The device's own times, by the names of the nodes.
        assert {node["name"] for node in there.profile["nodes"]} >= {"first", "second"}
        assert all(node["time_ms"] > 0 for node in there.profile["nodes"])


@pytest.mark.parametrize("provider", ["webgpu"], indirect=True)
def test_a_share_that_it_does_not_have_fails(running: str, block: Path) -> None:
    # The one that leaves nodes to the CPU when it is told to.
    requirements = requirements_of([f"{running}>=100%"], [running])
    choice = f"{running}:forceCpuNodeNames=second"
    with OrtBackend(choice).open(load_package(block), name="block") as session:
        placement = session.check_placement(measured=True)
        assert placement.operators["CPUExecutionProvider"] == {"MatMul": 1}
        assert placement.copies == 2
        assert placement.copied_bytes and placement.copied_bytes > 0
        assert 0 < placement.time_shares["CPUExecutionProvider"] < 1
        with pytest.raises(CheckFailedError, match=r"80\.0% of nodes on WebGpu.*1 of 5 nodes on CPU.*MatMul"):
            check_requirements(placement, requirements, name="block", provider=session.provider)
    (result,) = benchmark(
        [Candidate("block", block, choice)], BenchSettings(prompt_tokens=8, runs=1), requirements=requirements
    )
    assert "80.0% of nodes" in result.error
    assert result.exit_status == 1
    # What was measured is kept, beside what is wrong with it.
    assert result.latency_ms is not None
    assert result.copies == 2


@pytest.mark.parametrize("provider", ["webgpu"], indirect=True)
def test_doctor_says_what_fell_back(running: str, block: Path) -> None:
    from onnxsmith.runtime.behaviour import observe

    backend = OrtBackend(f"{running}:forceCpuNodeNames=second")
    findings = {one.rule: one for one in observe(load_package(block), backend, name="block").findings}
    finding = findings["fallback"]
    assert finding.what.startswith("1 of 5 nodes on CPU") and "(MatMul)" in finding.what
    assert (finding.nodes, finding.count) == (("MatMul",), 1)
    whole = observe(load_package(block), OrtBackend(running), name="block")
    assert "fallback" not in {one.rule for one in whole.findings}


@pytest.mark.parametrize("provider", ["openvino"], indirect=True)
def test_a_device_that_is_not_there_is_said(provider: str, block: Path) -> None:
    with pytest.raises(ProviderUnavailableError, match=r"fell back to CPU.*Device NPU is not"):
        OrtBackend("openvino:device_type=NPU").open(load_package(block))


@pytest.mark.parametrize("provider", ["openvino"], indirect=True)
def test_it_generates_what_the_cpu_does(running: str, tiny_package: ModelPackage) -> None:
    prompt = [5, 9, 33, 2, 17]
    with OrtSession(tiny_package) as reference, OrtBackend(running).open(tiny_package) as session:
        expected = list(generate(reference, prompt, max_new_tokens=12))
        assert list(generate(session, prompt, max_new_tokens=12)) == expected


def test_the_worker_has_the_packages_of_its_environment(provider: str) -> None:
    from onnxsmith.runtime.provider_install import describe_environment_of

    environment = find_environment(PROVIDERS[provider].package)
    assert environment is not None
    plugin = PROVIDERS[provider] if PROVIDERS[provider].plugin else None
    found = describe_environment_of(environment, plugin)
    assert found["versions"][environment.package] == environment.versions[environment.package]
    assert PROVIDERS[provider].ort_name in found["providers"]
    assert "torch" not in found["versions"]
    assert dataclasses.asdict(choose_provider(provider))["environment"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openvino"], indirect=True)
def test_a_recipe_runs_on_it(running: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.pipeline.run import run_recipe

    plain = {
        "schema_version": 1,
        "name": "tiny",
        "source": str(tiny_llama_dir),
        "provider": running,
        "variants": [{"name": "fp32", "preset": "cpu-fp32"}],
        "evaluation": {"benchmark": {"prompt_tokens": 8, "new_tokens": 4, "runs": 2}},
        "prompt": "the smith",
    }
    required = {"require_provider": [f"{running}>=5%"]}
    report = run_recipe(Recipe.model_validate(plain | required), tmp_path / "out")
    (variant,) = report.variants
    assert report.passed, report.verdict
    assert variant.placement is not None and variant.bench is not None
    assert variant.bench["provider"] == choose_provider(running).ort_name
    assert report.generation is not None and report.generation["tokens"] > 0
    share = variant.placement[variant.bench["provider"]]["share"]
    if share < 1:
        # What it leaves to the CPU is said, and can be forbidden.
        required = {"require_provider": [f"{running}>=100%"]}
        report = run_recipe(Recipe.model_validate(plain | required), tmp_path / "refused")
        assert not report.passed
        assert f"{share:.1%} of nodes on" in report.verdict


# The kernels of the others refuse the decoder: nxrt's RotaryEmbedding, and WebGPU's GatherBlockQuantized.
@pytest.mark.parametrize("provider", ["openvino"], indirect=True)
def test_a_fault_in_a_quantized_decoder_is_found_on_it(
    running: str, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    import onnx

    from onnxsmith.graph_passes import make_passes, run_passes

    quantize = make_passes([("quantize_weights", {"bits": 4, "block_size": 32})])
    save_package(run_passes(load_package(tiny_artifact_dir), quantize).derive(), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    scales = next(
        one for one in model.graph.initializer if one.name.endswith("0.mlp.down_proj.weight_scales")
    )
    array = onnx.numpy_helper.to_array(scales).copy()
    array.reshape(-1)[13] *= 16
    scales.CopyFrom(onnx.numpy_helper.from_array(array, scales.name))
    onnx.save(model, tmp_path / "model.onnx")
    (node,) = [one.name for one in model.graph.node if scales.name in one.input]
    result = bisect_models(str(tiny_artifact_dir), tmp_path, provider=running, samples=2)
    assert result.provider != "CPUExecutionProvider"
    found = {blame.node: blame for blame in result.suspects}
    assert node in found, result.verdict
    assert "0.mlp.down_proj.weight" in found[node].detail
    assert any("past=" in case for case in result.cases)
