"""Quantization-aware training: the gradients of steps, and integers in ONNX that compute what was trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, RecipeError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

from onnxsmith.training import Distillation, Supervision, TorchTeacher, fit  # noqa: E402
from onnxsmith.training.fake_quantization import (  # noqa: E402
    fake_quantized,
    fix_quantization,
    prepare_quantization,
)
from test_training import QUICK, accuracy, bert, sentences  # noqa: E402


def test_rounding_is_that_of_onnx_and_has_the_gradients_of_the_paper() -> None:
    x = torch.tensor([-3.0, -0.26, 0.0, 0.1, 0.24, 0.7, 9.0], requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    rounded = fake_quantized(x, step, 4, 0, 15)
    # (clip(round(x / 0.1) + 4, 0, 15) - 4) * 0.1
    expected = [-0.4, -0.3, 0.0, 0.1, 0.2, 0.7, 1.1]
    np.testing.assert_allclose(rounded.detach(), expected, atol=1e-6)
    rounded.sum().backward()
    assert x.grad is not None and step.grad is not None
    # Straight through inside, nothing where it is clipped.
    np.testing.assert_array_equal(x.grad, [0, 1, 1, 1, 1, 1, 0])
    # Equation 3 of LSQ: round(v) - v inside, the bound outside; scaled by 1 / sqrt(N Q_P).
    inside = [round(v / 0.1) - v / 0.1 for v in (-0.26, 0.0, 0.1, 0.24, 0.7)]
    gradient = (-4 + 11 + sum(inside)) / np.sqrt(7 * 15)
    assert float(step.grad) == pytest.approx(gradient, rel=1e-4)


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, Any, Any]:
    """A model, what it became while it learned with rounding, and that with integers."""
    model = bert(layers=1, width=32)
    examples = sentences(300)
    fit(model, examples, Supervision(), dataclasses.replace(QUICK, epochs=4))
    import copy

    learning = copy.deepcopy(model)
    batches = [_inputs(examples, range(i, i + 16)) for i in range(0, 64, 16)]
    names = prepare_quantization(learning, batches)
    assert len(names) == 8 and "classifier" in names
    attention = learning.bert.encoder.layer[0].attention.self
    assert attention.query.given is attention.key.given is attention.value.given
    before = {name: p.detach().clone() for name, p in learning.named_parameters()}
    fit(learning, examples, Distillation(TorchTeacher(model)), dataclasses.replace(QUICK, epochs=2))
    # Steps are learned as weights are.
    for name, parameter in learning.named_parameters():
        assert not torch.equal(parameter, before[name]) or "position_embeddings" in name, name
    fixed = copy.deepcopy(learning)
    assert fix_quantization(fixed) == 8
    return model, learning, fixed.eval().requires_grad_(False)


def _inputs(examples: Any, numbers: Any) -> dict[str, Any]:
    batch: dict[str, Any] = examples.batch(numbers)
    batch.pop("labels")
    return batch


def test_integers_compute_what_was_trained(quantized: tuple[Any, Any, Any]) -> None:
    model, learning, fixed = quantized
    held = sentences(200, seed=9)
    batch = _inputs(held, range(200))
    with torch.no_grad():
        said, wanted = fixed(**batch).logits, learning(**batch).logits
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-4)
    assert accuracy(fixed, held) > accuracy(model, held) - 0.04
    for part in fixed.modules():
        if type(part).__name__ == "QuantizedLinear":
            assert part.weight_integers.dtype == torch.int8 and 1e-4 < part.step < 1


@pytest.fixture(scope="module")
def exported(quantized: tuple[Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    from onnxsmith.exporters import LoadedModel, export, torch_programs
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.source import ModelSource

    directory = tmp_path_factory.mktemp("quantized")
    transformers.BertConfig().save_pretrained(directory)
    loaded = LoadedModel(
        quantized[2], ModelSource.parse(str(directory)), "text-classification", {}, {"text": "made"}
    )
    package = run_passes(export(loaded, torch_programs(loaded)), make_passes(PRESETS["cpu-fp32"]))
    (directory / "made").mkdir()
    save_package(package, directory / "made")
    return load_package(directory / "made")


def test_onnx_has_integers_and_matches_within_a_step(
    quantized: tuple[Any, Any, Any], exported: ModelPackage
) -> None:
    from onnxsmith.runtime import OrtSession

    nodes = list(exported.main.model.graph)
    kinds = [node.op_type for node in nodes]
    # Query, key and value read one tensor, which is rounded once.
    assert kinds.count("QuantizeLinear") == 6 and kinds.count("DequantizeLinear") == 6 + 8
    stored = [
        v for v in exported.main.model.graph.initializers.values() if v.dtype and v.dtype.name == "INT8"
    ]
    sizes = sorted(int(np.prod(v.shape)) for v in stored if v.shape is not None and len(v.shape) == 2)
    assert sizes == [32 * 2, *[32 * 32] * 5, *[32 * 64] * 2]
    assert exported.precision == "int8"
    fixed = quantized[2]
    # The classifier rounds last. Before it, float rounding may move single values by a step.
    last = fixed.classifier
    weight = last.weight_integers.float() * last.weight_step
    bound = last.step * float(weight.abs().max())
    held = sentences(64, seed=5)
    batch = _inputs(held, range(64))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    feeds = {name: tensor.numpy() for name, tensor in batch.items()}
    with torch.no_grad():
        wanted = fixed(**batch).logits.numpy()
    with OrtSession(exported) as session:
        said = session.run(feeds)["logits"]
    assert np.abs(said - wanted).max() <= bound < 0.1 * np.abs(wanted).max()
    assert np.median(np.abs(said - wanted)) < 0.01 * bound
    # The control: a step that is wrong by a fiftieth is found.
    wrong = last.weight_step.clone()
    last.weight_step *= 1.3
    with torch.no_grad():
        other = fixed(**batch).logits.numpy()
    last.weight_step.copy_(wrong)
    assert np.abs(said - other).max() > bound


def test_onnx_runtime_multiplies_integers(exported: ModelPackage, tmp_path: Path) -> None:
    import onnx

    assert exported.main.path is not None
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported.main.path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    integer = sum(kinds.count(kind) for kind in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))
    # Pooler and classifier see one token of a text: ONNX Runtime makes a float Gemm of each first.
    assert integer == 6, sorted(set(kinds))


def test_what_cannot_be_quantized_is_said(tmp_path: Path) -> None:
    import json

    from onnxsmith import load_recipe

    with pytest.raises(BadInputError, match="no linear layer; expected some to find"):
        prepare_quantization(bert(), [_inputs(sentences(4), range(4))], skip=["*"])
    with pytest.raises(BadInputError, match="no data; expected some to find the first steps on"):
        prepare_quantization(bert(), [])
    recipe = {
        "schema_version": 1, "name": "a", "source": "x", "export": {"dtype": "float16"},
        "training": {"data": "a.jsonl", "steps": [{"finetune": {"quantization": "int8"}}]},
        "variants": [{"name": "a", "preset": "cpu-fp32"}],
    }  # fmt: skip
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="float16; expected float32, in which quantization is trained"):
        load_recipe(path)
