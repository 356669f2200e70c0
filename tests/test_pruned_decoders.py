"""Pruning before export and after it, on one decoder: both roads lead to the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from generated_graphs import Array, assert_same, run
from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.context import PassContext
from onnxsmith.package import ModelPackage
from onnxsmith.runtime.samples import decoder_feeds

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

IDS = np.array([[5, 9, 33, 21, 7, 50, 2, 11, 40, 3, 18, 29]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("deep-llama")
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    torch.random.set_rng_state(state)
    return made


def loaded(directory: Path) -> Any:
    from onnxsmith.exporters import load_torch
    from onnxsmith.source import ModelSource

    return load_torch(ModelSource.parse(str(directory)))


def exported(model: Any, attention: str = "auto") -> ModelPackage:
    from onnxsmith.exporters import export

    return run_passes(export(model, attention=attention), make_passes(PRESETS["clean"]))


@pytest.fixture(scope="module")
def whole(directory: Path) -> ModelPackage:
    return exported(loaded(directory))


def batches() -> list[dict[str, Any]]:
    return [{"input_ids": torch.from_numpy(IDS)}]


def context() -> PassContext:
    def activations(model: Any, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        copy = model.clone()
        values = {v.name: v for node in copy.graph for v in node.outputs}
        copy.graph.outputs[:] = [values[name] for name in names]
        yield run(copy, decoder_feeds(ModelPackage({"model": _component(model)}).main.inputs, IDS))

    return PassContext(activations=activations)


def _component(model: Any) -> Any:
    from onnxsmith.package import Component

    return Component(model)


def outputs(package: ModelPackage) -> dict[str, Array]:
    return run(package.main.model, decoder_feeds(package.main.inputs, IDS))


@pytest.mark.parametrize("attention", ["auto", pytest.param("standard", marks=pytest.mark.slow)])
def test_both_roads_lead_to_one_model(directory: Path, whole: ModelPackage, attention: str) -> None:
    from onnxsmith.training import PruningSettings, prune

    before = loaded(directory)
    prune(before.module, PruningSettings(heads=0.5, neurons=0.5, method="l2"), batches=batches())
    expected = outputs(exported(before, attention))
    start = whole if attention == "auto" else exported(loaded(directory), attention)
    passes = make_passes([("prune_heads", {"ratio": 0.5}), ("prune_neurons", {"ratio": 0.5})])
    got = outputs(run_passes(start, passes))
    assert got["present.0.key"].shape == (1, 2, 12, 8)
    assert_same(expected, got, rtol=1e-5)
    # The control: other neurons.
    by_chance = {"ratio": 0.5, "method": "random"}
    other = make_passes([("prune_heads", {"ratio": 0.5}), ("prune_neurons", by_chance)])
    with pytest.raises(AssertionError):
        assert_same(expected, outputs(run_passes(start, other)), rtol=1e-3)


def test_layers_go_by_influence_on_both_roads(directory: Path, whole: ModelPackage) -> None:
    from onnxsmith.training import PruningSettings, prune

    before = loaded(directory)
    report = prune(before.module, PruningSettings(layers=2), batches=batches())
    after = run_passes(whole, make_passes([("prune_layers", {"layers": 2})]), context=context())
    details = after.steps[-1].details
    (scores,) = report.scores.values()
    np.testing.assert_allclose(details["scores"], scores, rtol=1e-3)
    assert sorted({*range(4)} - set(details["dropped"])) == list(report.plan.layers["model.layers"])
    assert_same(outputs(exported(before)), outputs(after), rtol=1e-5)
    names = [spec.name for spec in after.main.inputs if spec.name.startswith("past")]
    assert names == [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]


def test_what_clients_read_is_what_is_left(directory: Path, whole: ModelPackage, tmp_path: Path) -> None:
    from onnxsmith.package_io import save_package
    from onnxsmith.runtime import OrtSession

    specs = [
        ("prune_layers", {"drop": (1, 2)}), ("prune_heads", {"ratio": 0.25}),
        ("prune_neurons", {"ratio": 0.5}),
        *((name, options) for name, options in PRESETS["cpu-int8"] if name != "transpose_weights"),
    ]  # fmt: skip
    package = run_passes(whole, make_passes(specs))
    config = json.loads(package.files["config.json"])
    wanted = {
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
        "intermediate_size": 24,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert json.loads(whole.files["config.json"])["num_hidden_layers"] == 4
    save_package(package, tmp_path)
    with OrtSession(package, name="small") as session:
        logits = session.run(decoder_feeds(package.main.inputs, IDS))["logits"]
    assert np.isfinite(logits).all()
    # The same sizes as PyTorch makes of this configuration.
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    assert made.model.layers[0].self_attn.q_proj.weight.shape == (48, 32)


def test_layers_that_cannot_go_are_told(whole: ModelPackage) -> None:
    def refused(package: ModelPackage, message: str, **options: Any) -> None:
        with pytest.raises(PassError, match=message):
            run_passes(package, make_passes([("prune_layers", options)]))

    refused(whole, r"4 of 4 layers; expected at most 3", layers=4, method="random")
    refused(whole, r"drop: 1, 7; expected some of the layers 0 to 3", drop=(1, 7))
    refused(whole, "method influence without calibration data")
    fused = run_passes(whole, make_passes(PRESETS["cpu-fp32"]))
    refused(fused, "run it before fusion", drop=(1,))
    with pytest.raises(BadInputError, match=r"layers: 1\.5; expected a share below 1"):
        make_passes([("prune_layers", {"layers": 1.5})])


def test_shapes_of_layers_that_differ_are_told(whole: ModelPackage) -> None:
    specs = [("prune_heads", {"ratio": 0.4, "scope": "global"})]
    package = run_passes(whole, make_passes(specs))
    left = {part["left"] for part in package.steps[-1].details["layers"].values()}
    if len(left) > 1:
        assert "config" not in package.steps[-1].details
        assert package.files["config.json"] == whole.files["config.json"]
    keys = [value for name, value in outputs(package).items() if name.endswith(".key")]
    assert sum(value.shape[1] for value in keys) == 16 - round(0.4 * 16)
