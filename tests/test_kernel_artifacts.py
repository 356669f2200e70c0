"""Artifacts with onnxsmith's own operators, opened by others: with their sources compiled, and without."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsmith import (
    PRESETS,
    bisect_models,
    export_model,
    load_package,
    optimize_model,
    package_model,
    verify_artifact,
)
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.pipeline.generation import generate_text
from packed_matrices import matmul_model, random_matrix, save

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("kernels")

PROMPT = "the smith"
TOKENS = 12
LIBRARY = "kernels/libonnxsmith_kernels.so"


@pytest.fixture(scope="module")
def artifact(kernels: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del kernels  # compiled before
    directory = tmp_path_factory.mktemp("kernels")
    export_model(str(tiny_llama_dir), directory / "fp32", verify=False)
    optimize_model(directory / "fp32", directory / "int8", PRESETS["cpu-int8-kernels"])
    return directory / "int8"


@pytest.fixture(scope="module")
def packed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "tiny"
    package_model([artifact], directory)
    return directory


@pytest.fixture(scope="module")
def compiled(kernels: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As its receiver has it who compiled what came with it, which a slow test really does."""
    directory = tmp_path_factory.mktemp("compiled") / "tiny"
    shutil.copytree(packed, directory)
    shutil.copy(kernels, directory / LIBRARY)
    return directory


def run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sources_are_part_of_it(artifact: Path, packed: Path, compiled: Path) -> None:
    assert uses_own_operators(load_package(artifact).main.model)
    for directory in (artifact, packed):
        files = json.loads((directory / "manifest.json").read_text())["files"]
        assert {"kernels/build.py", "kernels/library.cpp", "kernels/ort_abi.h"} <= set(files)
        assert verify_artifact(directory) == []
    assert [finding.where for finding in verify_artifact(compiled)] == [LIBRARY]
    assert "python kernels/build.py" in (packed / "README.md").read_text()
    lines = (packed / "Dockerfile").read_text().splitlines()
    assert "RUN python /kernels/build.py" in lines
    assert f"COPY --from=kernels /{LIBRARY} kernels/" in lines


def test_the_program_beside_it_runs_with_kernels_and_without(
    packed: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (PROMPT, str(TOKENS))
    by_kernels = PROMPT + "".join(generate_text(packed, PROMPT, max_new_tokens=TOKENS))
    said = run("-I", str(compiled / "infer.py"), *arguments)
    # The tokenizer drops the blank of a text that begins with one.
    assert said.replace(" ", "") == by_kernels.replace(" ", "")
    monkeypatch.setenv("ONNXSMITH_KERNELS_LIBRARY", str(tmp_path / "none"))
    by_functions = PROMPT + "".join(generate_text(packed, PROMPT, max_new_tokens=TOKENS))
    if importlib.util.find_spec("ziglang") is not None:
        pytest.skip("ziglang is installed, so there always is a compiler")
    said = run("-I", str(packed / "infer.py"), *arguments, environment={"PATH": str(tmp_path)})
    assert said.replace(" ", "") == by_functions.replace(" ", "")
    assert not (packed / LIBRARY).exists()


@pytest.mark.slow
def test_a_fresh_artifact_compiles_when_it_is_first_run(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "fresh")
    run("-I", str(tmp_path / "fresh" / "infer.py"), PROMPT, "1")
    assert (tmp_path / "fresh" / LIBRARY).is_file()


GENAI = f"""
import json, sys, numpy as np, onnxruntime_genai as og
model = og.Model(sys.argv[1])
ids = json.loads(sys.argv[2])
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + {TOKENS}, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([ids], np.int32))
while not generator.is_done():
    generator.generate_next_token()
made = [int(i) for i in generator.get_sequence(0)]
print(json.dumps([made, "libonnxsmith_kernels" in open("/proc/self/maps").read()]))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing says what is loaded")
def test_onnxruntime_genai_loads_the_library(compiled: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime_genai is not installed; `make setup` brings it")
    shutil.copytree(compiled, tmp_path / "it")
    without, loaded = json.loads(run("-c", GENAI, str(tmp_path / "it"), "[5, 6, 7]"))
    assert not loaded and len(without) == 3 + TOKENS
    config = json.loads((tmp_path / "it" / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    (tmp_path / "it" / "genai_config.json").write_text(json.dumps(config))
    made, loaded = json.loads(run("-c", GENAI, str(tmp_path / "it"), "[5, 6, 7]"))
    assert loaded
    # Rounded activations may turn a token of a random model, but hardly the first ones.
    assert len(made) == len(without) and made[:6] == without[:6]


OPTIMUM = """
import json, sys, onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1] + "/kernels/libonnxsmith_kernels.so")
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], session_options=options)
ids = torch.tensor([json.loads(sys.argv[2])])
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
print(json.dumps(made[0].tolist()))
"""


def test_optimum_is_given_the_library(compiled: Path) -> None:
    if importlib.util.find_spec("optimum.onnxruntime") is None:
        pytest.skip("optimum is not installed; `make setup` brings it")
    made = json.loads(run("-c", OPTIMUM, str(compiled), "[5, 6, 7]").splitlines()[-1])
    assert len(made) == 7


@pytest.mark.slow
def test_a_reproduction_brings_the_kernels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix = random_matrix(random, 48, 64)
    weight = np.ascontiguousarray(matrix.weight().T.astype(np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["A", "W"], ["Y"])],
        "plain",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["batch_0", 64])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch_0", 48])],
        [numpy_helper.from_array(weight, "W")],
    )
    reference = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    matrix.scales[7] *= np.float16(2)
    save(reference, tmp_path / "plain.onnx")
    candidate = save(matmul_model(matrix), tmp_path / "packed.onnx")
    result = bisect_models(
        str(tmp_path / "plain.onnx"), candidate, samples=2, threads=1, output=tmp_path / "shown"
    )
    assert [blame.node for blame in result.suspects] == ["packed"]
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "shown" / "reproduce.py")],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert (done.returncode, "differs" in done.stdout) == (1, True), done.stdout + done.stderr
    assert "a C++ compiler" in (tmp_path / "shown" / "README.md").read_text()
    assert onnx.load(tmp_path / "shown" / "minimal.onnx").graph.node[0].op_type == "MatMulPacked"
