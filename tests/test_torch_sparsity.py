"""Zeros in PyTorch models, by the mathematics of the pass; they survive training. And rows of embeddings."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.sparse_rounding import prune_magnitude, prune_sparsegpt, prune_wanda
from onnxsmith.training import (
    Distillation,
    Example,
    Examples,
    PruningSettings,
    SparsitySettings,
    Supervision,
    TorchTeacher,
    TrainingSettings,
    fit,
    prune,
    prune_vocabulary,
    sparsify,
)
from onnxsmith.training.fake_quantization import prepare_quantization
from onnxsmith.training.sparsity import kept_zeros
from onnxsmith.training.teachers import forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config).eval()


def decoder(name: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61} if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config).eval()


def examples(count: int = 48, *, low: int = 5, high: int = 40) -> Examples:
    random = np.random.default_rng(3)
    rows = [
        Example(random.integers(low, high, int(random.integers(4, 12))).tolist(), int(random.integers(3)))
        for _ in range(count)
    ]
    return Examples(rows, kind="class")


def batches(data: Examples) -> list[dict[str, Any]]:
    found = [data.batch(list(range(i, min(i + 16, len(data))))) for i in range(0, len(data), 16)]
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in found]


def inputs_of(model: Any, name: str, data: list[dict[str, Any]]) -> Any:
    """What a projection is given, without padding."""
    seen: list[Any] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for batch in data:
            forward(model, batch)
            if seen[-1].shape[:2] == batch["attention_mask"].shape:
                seen[-1] = seen[-1][batch["attention_mask"].bool()]
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).numpy()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_each_matrix_becomes_what_the_pass_would_make_of_it(method: str, pattern: str) -> None:
    model, data = classifier(), batches(examples())
    whole = copy.deepcopy(model)
    report = sparsify(model, SparsitySettings(method=method, pattern=pattern), batches=data, call=forward)  # type: ignore[arg-type]
    assert report.zeros == pytest.approx(0.5, abs=0.01)
    assert "classifier" in report.layers and len(report.layers) == 2 * 6 + 2
    assert report.to_json()["speed"].startswith("not smaller and not faster")
    group = (2, 4) if pattern == "2:4" else None
    # Layer after layer: the second is measured behind the first, which has its zeros by then.
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.key",
                 "bert.encoder.layer.1.output.dense"):  # fmt: skip
        before = whole.get_submodule(name).weight.detach().numpy()
        after = model.get_submodule(name).weight.detach().numpy()
        partly = copy.deepcopy(whole)
        state = model.state_dict()
        if ".layer.1." in name:
            first = {n: t for n, t in state.items() if ".layer.0." in n}
            partly.load_state_dict(first, strict=False)
        x = inputs_of(partly, name, data)
        # Within a layer all are measured at once, on the layer as it was.
        moments = (x.T @ x) / len(x)
        expected = {
            "magnitude": lambda w, m=moments: prune_magnitude(w, 0.5, group),
            "wanda": lambda w, m=moments: prune_wanda(w, np.sqrt(np.diagonal(m)), 0.5, group),
            "sparsegpt": lambda w, m=moments: prune_sparsegpt(w, m, 0.5, group),
        }[method](before)
        assert ((after == 0) == (expected == 0)).mean() > 0.995
        np.testing.assert_allclose(after, expected, atol=2e-4, rtol=5e-2)
        if method != "sparsegpt":
            # The control: the weights that stay are as they were, and those of another layer are not these.
            np.testing.assert_array_equal(after[after != 0], before[after != 0])


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_magnitude() -> None:
    data = batches(examples(96))
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = decoder()
        whole = copy.deepcopy(model)
        sparsify(model, SparsitySettings(method=method), batches=data, call=forward)  # type: ignore[arg-type]
        with torch.no_grad():
            losses[method] = sum(
                float((forward(model, b).logits - forward(whole, b).logits).square().sum()) for b in data
            )
    assert losses["sparsegpt"] < losses["wanda"] < 1.2 * losses["magnitude"], losses


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_output_heads_and_tied_weights_stay(name: str) -> None:
    model = decoder(name)
    report = sparsify(model, SparsitySettings(method="magnitude", pattern="2:4", skip=("*mlp*",)))
    assert report.skipped["lm_head"] == "the output head"
    assert any(reason == "named in skip" for reason in report.skipped.values())
    assert all("mlp" not in layer for layer in report.layers)
    for layer in report.layers:
        weight = model.get_submodule(layer).weight.detach()
        # GPT-2 keeps its matrices as (in, out).
        rows = weight if isinstance(model.get_submodule(layer), torch.nn.Linear) else weight.T
        assert ((rows.reshape(len(rows), -1, 4) != 0).sum(-1) <= 2).all()


def test_a_global_budget_and_a_threshold() -> None:
    model = classifier()
    model.bert.encoder.layer[0].intermediate.dense.weight.data *= 0.01
    report = sparsify(model, SparsitySettings(method="magnitude", scope="global", ratio=0.5))
    assert report.zeros == pytest.approx(0.5, abs=0.02)
    assert report.layers["bert.encoder.layer.0.intermediate.dense"]["zeros"] > 0.95
    other = classifier()
    sparsify(other, SparsitySettings(method="magnitude", threshold=0.01))
    weight = other.bert.encoder.layer[1].output.dense.weight
    assert ((weight == 0) | (weight.abs() >= 0.01)).all() and (weight == 0).any()


SHORT = TrainingSettings(epochs=2, batch=16, learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_zeros_survive_training_and_other_weights_learn(precision: str) -> None:
    model, data = classifier(), examples()
    sparsify(model, SparsitySettings(method="wanda", pattern="2:4"), batches=batches(data), call=forward)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = TrainingSettings(**{**vars(SHORT), "precision": precision})
    fit(model, data, Supervision(), settings)
    for name, mask in kept_zeros(model).items():
        weight = model.get_parameter(name)
        zero = before[name] == 0
        assert zero.float().mean() >= 0.5
        assert (weight[zero] == 0).all() and (mask == (weight != 0)).all()
        assert not torch.equal(weight[~zero], before[name][~zero])
    # The control: without the mark they come back.
    free = classifier()
    free.load_state_dict(before, strict=False)
    fit(free, data, Supervision(), settings)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (free.get_parameter(name)[before[name] == 0] != 0).any()


def test_zeros_survive_a_kill_copies_structure_and_quantization(tmp_path: Any) -> None:
    model, data = classifier(), examples()
    teacher = TorchTeacher(copy.deepcopy(model))
    sparsify(model, SparsitySettings(method="magnitude"))
    prune(model, PruningSettings(neurons=0.25, method="l2"), batches=batches(data))
    assert len(kept_zeros(copy.deepcopy(model))) == 14
    prepare_quantization(model, batches(data))
    zeros = {name: ~mask for name, mask in kept_zeros(model).items()}
    assert len(zeros) == 14
    whole, killed = copy.deepcopy(model), copy.deepcopy(model)
    fit(whole, data, Distillation(teacher), SHORT)

    class StopError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.update == 3:
            raise StopError

    settings = TrainingSettings(**{**vars(SHORT), "checkpoint_seconds": 0.0})
    with pytest.raises(StopError):
        fit(killed, data, Distillation(teacher), settings, checkpoint=tmp_path / "a.pt", on_update=stop)
    again = copy.deepcopy(model)
    result = fit(again, data, Distillation(teacher), settings, checkpoint=tmp_path / "a.pt")
    assert result.resumed_at == 2
    for name, zero in zeros.items():
        assert (again.get_parameter(name)[zero] == 0).all() and zero.float().mean() > 0.4
        assert torch.equal(again.get_parameter(name), whole.get_parameter(name))


def test_rows_of_unused_tokens_go_and_ids_stay() -> None:
    model, data = classifier(), examples(low=5, high=20)
    whole = copy.deepcopy(model)
    used = {int(token) for row in data.rows for token in row.ids} | {0, 1}
    found = prune_vocabulary(model, used)
    assert found == {"rows_before": 61, "rows_left": len(used) + 1}
    assert model.get_input_embeddings().weight.shape == (len(used) + 1, 32)
    batch = batches(data)[0]
    with torch.no_grad():
        assert torch.equal(forward(model, batch).logits, forward(whole, batch).logits)
        # The control: a token that went has the mean of those that went.
        other = model.get_input_embeddings()(torch.tensor([[50, 60]]))
        gone = [n for n in range(61) if n not in used]
        mean = whole.get_input_embeddings().weight[gone].mean(0)
        torch.testing.assert_close(other, mean.expand(1, 2, 32))
    fit(model, data, Supervision(), SHORT)
    assert not torch.equal(
        model.get_input_embeddings().weight[1], whole.get_input_embeddings().weight[sorted(used)[1]]
    )
    with pytest.raises(BadInputError, match="an embedding that was pruned already; expected a whole one"):
        prune_vocabulary(model, used)


def test_what_cannot_be_pruned_is_said() -> None:
    with pytest.raises(BadInputError, match="whose weight is that of lm_head too; expected one that is no"):
        prune_vocabulary(decoder(tie_word_embeddings=True), [1])
    with pytest.raises(BadInputError, match=r"of type NoneType; expected a plain nn\.Embedding"):
        prune_vocabulary(torch.nn.Linear(4, 4), [1])
    with pytest.raises(BadInputError, match=r"by wanda: no data; expected at least one batch"):
        sparsify(classifier(), SparsitySettings(method="wanda"))
    with pytest.raises(BadInputError, match=r"no projection to prune \(.*named in skip.*at least one"):
        sparsify(classifier(), SparsitySettings(method="magnitude", skip=("*",)))
    with pytest.raises(UnknownNameError, match="magnitud"):
        SparsitySettings(method="magnitud")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="pruning of weights: ratio: 1; expected 0 to below 1"):
        SparsitySettings(ratio=1.0)
    with pytest.raises(BadInputError, match="pattern: 4:2; expected unstructured, or N:M"):
        SparsitySettings(pattern="4:2")
    with pytest.raises(BadInputError, match="a threshold with method wanda"):
        SparsitySettings(method="wanda", threshold=0.1)
