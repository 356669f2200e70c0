"""Structured pruning on PyTorch: what is found, what scores are, and that what stays computes the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, CheckFailedError, UnknownNameError
from onnxsmith.training import PruningPlan, PruningSettings, apply_plan, prune
from onnxsmith.training.depth import drop_layers, find_layers
from onnxsmith.training.importance import block_influence, scores
from onnxsmith.training.shrinking import masked, shrink
from onnxsmith.training.structured import choose_units
from onnxsmith.training.units import FoundUnits, UnitGroup, find_units

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_BASE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 40,
}
_GPT = {"vocab_size": 61, "n_embd": 48, "n_layer": 3, "n_head": 6}
_DISTIL = {"vocab_size": 61, "dim": 48, "n_layers": 3, "n_heads": 6, "hidden_dim": 40}
_EXPERTS = {**_BASE, "num_key_value_heads": 2, "num_local_experts": 3}


def _make(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**options)
    kind = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "LMHeadModel"
    kind = "Model" if name in ("Albert", "Bert", "DistilBert") else kind
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{kind}")(config).eval()


def _llama(**options: Any) -> Any:
    return _make("Llama", **{**_BASE, "num_key_value_heads": 2, **options})


def _batch(rows: int = 2) -> dict[str, Any]:
    return {"input_ids": torch.arange(16 * rows).reshape(rows, 16) * 7 % 61}


def _run(model: Any) -> Callable[[], Any]:
    batch, cached = _batch(), hasattr(model.config, "use_cache")
    return lambda: model(**batch, **({"use_cache": False} if cached else {}))


def _result(model: Any) -> Any:
    with torch.no_grad():
        return _run(model)()[0]


def _found(model: Any) -> FoundUnits:
    return find_units(model, _run(model))


# Architecture to (heads or groups of heads, columns of each), neurons, groups.
FAMILIES = {
    "Llama": ({**_BASE, "num_key_value_heads": 2}, (2, 24), 40, 6),
    "Bert": (_BASE, (6, 8), 40, 6),
    "GPT2": (_GPT, (6, 8), 192, 6),
    "Qwen3": ({**_BASE, "num_key_value_heads": 3, "head_dim": 8}, (3, 16), 40, 6),
    "Phi3": ({**_BASE, "num_key_value_heads": 2, "pad_token_id": 0}, (2, 24), 40, 6),
    "GPTNeoX": (_BASE, (6, 8), 40, 6),
    "DistilBert": (_DISTIL, (6, 8), 40, 6),
    "Mixtral": (_EXPERTS, (2, 24), 40, 12),
    "Albert": ({**_BASE, "embedding_size": 16}, (6, 8), 40, 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_every_family_goes_and_the_rest_computes_the_same(name: str) -> None:
    options, heads, neurons, groups = FAMILIES[name]
    model = _make(name, **options)
    found = _found(model)
    assert len(found.groups) == groups
    assert {group.columns.shape for group in found.of("heads")} == {heads}
    assert {group.count for group in found.of("neurons")} == {neurons}

    before, size = _result(model), sum(p.numel() for p in model.parameters())
    chosen = [(group, np.arange(0, group.count, 2)) for group in found.groups]
    with masked(model, chosen):
        expected = _result(model)
    twin = copy.deepcopy(model)
    report = prune(model, PruningSettings(heads=0.5, neurons=0.5, method="l2"), batches=[_batch()])
    assert report.after == sum(p.numel() for p in model.parameters()) < size == report.before
    assert not torch.allclose(_result(model), before, atol=1e-3)

    plan = shrink(twin, chosen, _run(twin))
    torch.testing.assert_close(_result(twin), expected, atol=1e-5, rtol=1e-4)
    # The control: other units would have been noticed.
    fresh = _make(name, **options)
    apply_plan(fresh, plan)
    torch.testing.assert_close(_result(fresh), _result(twin))
    with torch.no_grad():
        fresh.get_submodule(chosen[0][0].name).weight[0, 0] += 1
    assert not torch.allclose(_result(fresh), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Phi3", "Qwen3", "Mixtral"])
def test_the_configuration_describes_what_is_left(name: str, tmp_path: Any) -> None:
    model = _make(name, **FAMILIES[name][0])
    settings = PruningSettings(heads=0.5, neurons=0.5, layers=1, method="wanda")
    prune(model, settings, batches=[_batch()])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_result(again), _result(model))
    assert again.config.num_hidden_layers == 2
    assert again.config.intermediate_size == 20


def test_neurons_that_do_nothing_cost_nothing() -> None:
    model = _llama()
    group = _found(model).of("neurons")[1]
    dead = [3, 4, 11, 39]
    with torch.no_grad():
        model.get_submodule(group.name).weight[:, dead] = 0
    before = _result(model)
    by_data = scores(model, [group], "wanda", batches=[_batch()])[group.name]
    assert np.flatnonzero(by_data == 0).tolist() == dead
    by_loss = scores(model, [group], "taylor", batches=[_batch()])[group.name]
    assert np.flatnonzero(by_loss == 0).tolist() == dead
    shrink(model, [(group, np.flatnonzero(by_data))], _run(model))
    assert model.model.layers[1].mlp.up_proj.weight.shape == (36, 48)
    torch.testing.assert_close(_result(model), before, atol=1e-6, rtol=1e-5)


class _Sum(torch.nn.Module):
    """A network that is linear in what each neuron contributes, so that Taylor's first order is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = torch.nn.Linear(5, 8)
        self.down = torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


def _sum_group(model: _Sum) -> tuple[UnitGroup, Any]:
    torch.manual_seed(4)
    x = torch.randn(12, 5)
    (group,) = find_units(model, lambda: model(torch.randn(64, 5))).groups
    assert (group.name, group.kind, list(group.rows)) == ("down", "neurons", ["up"])
    return group, x


def test_taylor_is_the_change_of_a_linear_loss() -> None:
    model = _Sum()
    group, x = _sum_group(model)

    def loss(module: Any, batch: Any) -> Any:
        return module(batch["x"]).sum(-1).mean()

    got = scores(model, [group], "taylor", batches=[{"x": x[:5]}, {"x": x[5:]}], loss=loss)["down"]
    expected = np.zeros(8)
    with torch.no_grad():
        whole = model(x).sum(-1)
        for unit in range(8):
            with masked(model, [(group, np.delete(np.arange(8), unit))]):
                expected[unit] = (whole - model(x).sum(-1)).abs().mean()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_magnitude_and_wanda_are_their_formulas() -> None:
    model = _Sum()
    group, x = _sum_group(model)
    up, bias, down = (t.detach().numpy() for t in (model.up.weight, model.up.bias, model.down.weight))
    l1 = np.abs(up).sum(1) + np.abs(bias) + np.abs(down).sum(0)
    l2 = np.sqrt((up**2).sum(1) + bias**2 + (down**2).sum(0))
    given = np.maximum(x.numpy() @ up.T + bias, 0)
    wanda = np.sqrt((given**2).sum(0)) * np.abs(down).sum(0)
    for method, expected in (("l1", l1), ("l2", l2), ("wanda", wanda)):
        batches = [{"x": x[:7]}, {"x": x[7:]}]
        got = scores(model, [group], method, batches=batches)["down"]  # type: ignore[arg-type]
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=method)


def test_layers_go_by_how_little_they_change() -> None:
    model = _llama(num_hidden_layers=4)
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.mul_(1e-3)
    expected = _result(model)
    ids = torch.tensor([[5, 9, 2, 7]])
    kept_state = copy.deepcopy(model.state_dict())
    report = prune(model, PruningSettings(layers=1), batches=[_batch()])
    assert report.plan.layers == {"model.layers": [0, 1, 3]}
    assert np.argmin(report.scores["model.layers"]) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3
    torch.testing.assert_close(_result(model), expected, atol=1e-2, rtol=1e-2)
    # With a cache, which is kept by the number of the layer.
    whole = model(input_ids=ids, use_cache=False).logits
    step = model(input_ids=ids[:, :3], use_cache=True)
    last = model(input_ids=ids[:, 3:], past_key_values=step.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], atol=1e-5, rtol=1e-4)
    # The control: another layer is missed.
    other = _llama(num_hidden_layers=4)
    other.load_state_dict(kept_state)
    drop_layers(other, "model.layers", [0, 2, 3])
    assert not torch.allclose(_result(other), expected, atol=1e-2, rtol=1e-2)


def test_block_influence_is_one_minus_the_cosine_and_padding_does_not_count() -> None:
    model = _llama()
    batch = _batch() | {"attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    batch["attention_mask"][1, :6] = 0
    (stack,) = find_layers(model, _run(model))
    got = block_influence(model, stack.layers, [batch])
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    for layer in range(2):
        cosine = torch.cosine_similarity(hidden[layer], hidden[layer + 1], dim=-1)[mask]
        assert got[layer] == pytest.approx(float(1 - cosine.mean()), abs=1e-5)


def test_a_global_budget_takes_where_it_hurts_least() -> None:
    groups = [UnitGroup(name, "neurons", np.arange(10)[:, None], {}) for name in ("a", "b", "c")]
    found = {"a": np.arange(10.0) + 100, "b": np.arange(10.0), "c": np.arange(10.0) + 50}
    settings = PruningSettings(neurons=0.5, scope="global", method="taylor")
    kept = {group.name: units for group, units in choose_units(groups, found, settings)}
    assert kept == {"a": list(range(10)), "b": [9], "c": [6, 7, 8, 9]}
    # Sums of weights are compared within their layer's scale.
    by_size = PruningSettings(neurons=0.5, scope="global", method="l1")
    scaled = {name: (np.arange(10.0) + 1) * factor for name, factor in (("a", 1), ("b", 1e3), ("c", 1e-3))}
    assert {g.name: len(u) for g, u in choose_units(groups, scaled, by_size)} == {"a": 5, "b": 5, "c": 5}
    even = PruningSettings(neurons=0.3)
    assert [len(units) for _, units in choose_units(groups, found, even)] == [7, 7, 7]
    low = PruningSettings(threshold=0.5)
    assert dict((g.name, u) for g, u in choose_units(groups, found, low))["b"] == [3, 4, 5, 6, 7, 8, 9]


def test_a_plan_survives_json_and_tells_another_model() -> None:
    model = _llama()
    report = prune(model, PruningSettings(neurons=0.25, layers=1, method="random"), batches=[_batch()])
    plan = PruningPlan.from_json(json.loads(json.dumps(report.plan.to_json())))
    fresh = _llama()
    apply_plan(fresh, plan)
    torch.testing.assert_close(_result(fresh), _result(model))
    with pytest.raises(BadInputError, match="expected a model that has"):
        apply_plan(_llama(intermediate_size=16), plan)
    with pytest.raises(BadInputError, match=r"pruning plan: .*expected attributes, columns"):
        PruningPlan.from_json({"heads": {}})


def test_what_cannot_be_pruned_stays_as_it_was() -> None:
    # Its positions are a slope for each head, computed outside of the layers from the number of heads.
    model = _make("Bloom", vocab_size=61, hidden_size=48, n_layer=3, n_head=6)
    before, state = _result(model), copy.deepcopy(model.state_dict())
    with pytest.raises(CheckFailedError, match="does not compute what the model with zeros in these places"):
        prune(model, PruningSettings(heads=0.5, layers=1, method="l1"), batches=[_batch()])
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(_result(model), before)
    report = prune(model, PruningSettings(neurons=0.5, method="l1"), batches=[_batch()])
    assert report.ratio < 1


def test_norms_and_readers_besides_are_told() -> None:
    # The query's norm goes over all heads, so none can leave.
    model = _make("Olmo2", **_BASE, num_key_value_heads=2)
    assert not _found(model).of("heads")
    with pytest.raises(BadInputError, match="no heads or neurons that can be removed"):
        prune(model, PruningSettings(heads=0.5, method="l1"), batches=[_batch()])

    class Forked(_Sum):
        def forward(self, x: Any) -> Any:
            middle = torch.relu(self.up(x))
            return self.down(middle), middle

    forked = Forked()
    units = find_units(forked, lambda: forked(torch.randn(64, 5)))
    assert units.groups == ()
    assert units.skipped == {"down": "what up gives is read by the model's output too"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heads": 1.0}, BadInputError, r"heads: 1; expected a share from 0 to below 1"),
        ({"layers": 2.5}, BadInputError, "expected a share below 1, or a whole number"),
        ({"threshold": -1.0}, BadInputError, "threshold: -1; expected 0 or more"),
        ({"method": "l3"}, UnknownNameError, "unknown method 'l3'"),
        ({"scope": "all"}, UnknownNameError, "unknown scope 'all'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PruningSettings(**settings)


def test_too_much_and_too_little_are_refused() -> None:
    model = _llama()
    with pytest.raises(BadInputError, match="3 of 3 layers; expected at most 2"):
        prune(model, PruningSettings(layers=3, method="random"), batches=[_batch()])
    with pytest.raises(BadInputError, match="neither run nor batches"):
        prune(model, PruningSettings(heads=0.5))
    with pytest.raises(BadInputError, match="importance by wanda: no batch of data"):
        prune(model, PruningSettings(heads=0.5, method="wanda"), run=_run(model))
    group = _found(model).groups[0]
    with pytest.raises(BadInputError, match=r"units \[7\]; expected some of 0 to 1"):
        shrink(model, [(group, [7])], _run(model))
