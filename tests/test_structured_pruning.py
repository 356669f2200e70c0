"""Heads, neurons and channels of graphs: found by following channels, removed without a change besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from hypothesis import given, settings

from generated_graphs import Array, assert_same, graph, run
from onnxsmith.errors import BadInputError, PassError
from onnxsmith.graph_passes import load_pass
from onnxsmith.graph_passes.context import PassContext, in_context
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.graph_passes.unit_groups import GraphUnits, WeightGroup, find_graph_units, positions

pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> '
RANDOM = np.random.default_rng(7)


def weight(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


MLP = "u = MatMul(n, up) v = Add(u, up_bias) a = Gelu(v) d = MatMul(a, down) y = Add(d, down_bias)"
GATED = "g = MatMul(n, gate) s = Sigmoid(g) w = Mul(g, s) u = MatMul(n, up) a = Mul(w, u) y = MatMul(a, down)"
PACKED = (
    "both = MatMul(n, gate_up) g, u = Split<axis = -1>(both, halves) w = Sigmoid(g) a = Mul(w, u) "
    "y = MatMul(a, down)"
)
SHARED_BIAS = MLP.replace("down_bias", "up_bias_of_y")
NORMED = "n = LayerNormalization(x, gain, shift)"
ATTENTION = """
    q = MatMul(n, wq) qb = Add(q, bq) k = MatMul(n, wk) v = MatMul(n, wv)
    q4 = Reshape(qb, four) k4 = Reshape(k, four) v4 = Reshape(v, four)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4) qs = Mul(qt, scale) s = MatMul(qs, kt) p = Softmax(s)
    c = MatMul(p, vt) ct = Transpose<perm = [0, 2, 1, 3]>(c) flat = Reshape(ct, three) y = MatMul(flat, wo)
"""
MULTI = """
    q = MatMul(n, wq) qb = Add(q, bq) k = MatMul(n, wk) v = MatMul(n, wv)
    c = com.microsoft.MultiHeadAttention<num_heads = 4>(qb, k, v, mha_bias) y = MatMul(c, wo)
"""
FUSED = """
    c = com.microsoft.Attention<num_heads = 4>(n, wqkv, bqkv) y = MatMul(c, wo)
"""
CONV = """
    a = Conv<pads = [1, 1, 1, 1]>(image, k1, b1) b = BatchNormalization(a, gain4, shift4, mean4, var4)
    r = Relu(b)
    c = Conv<pads = [1, 1, 1, 1]>(r, k2) sum = Add(c, r) t = Conv<pads = [1, 1, 1, 1]>(image, k3)
    w = Conv<group = 6, pads = [1, 1, 1, 1]>(t, depth) joined = Concat<axis = 1>(sum, w)
    pooled = GlobalAveragePool(joined) vector = Flatten(pooled) y = Gemm<transB = 1>(vector, fc, fc_bias)
"""
WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "gain": (8,), "shift": (8,), "up": (8, 12), "gate": (8, 12), "gate_up": (8, 24), "up_bias": (12,),
    "down": (12, 8), "down_bias": (8,), "up_bias_of_y": (8,), "wq": (8, 16), "wk": (8, 16), "wv": (8, 16),
    "bq": (16,), "mha_bias": (48,), "wo": (16, 8), "wqkv": (8, 48), "bqkv": (48,),
    "k1": (4, 3, 3, 3), "b1": (4,),
    "gain4": (4,), "shift4": (4,), "mean4": (4,), "k2": (4, 4, 3, 3), "k3": (6, 3, 3, 3),
    "depth": (6, 1, 3, 3),
    "fc": (5, 10), "fc_bias": (5,),
}  # fmt: skip
CONSTANTS = {
    "halves": np.array([12, 12]), "four": np.array([0, 0, 4, 4]), "three": np.array([0, 0, 16]),
    "scale": np.array(0.5, np.float32), "var4": np.full(4, 1.5, np.float32),
}  # fmt: skip


def model_of(body: str, signature: str = "float[b, s, 8] x", result: str = "float[b, s, 8] y") -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    made = {name: weight(*shape) for name, shape in WEIGHTS.items() if name in words}
    made |= {name: array for name, array in CONSTANTS.items() if name in words}
    model = graph(f"{HEAD} g ({signature}) => ({result}) {{ {body} }}", **made)
    common.ShapeInferencePass()(model)
    return model


def image_model(body: str = CONV) -> ir.Model:
    return model_of(body, "float[b, 3, 5, 5] image", "float[b, 5] y")


def feeds(model: ir.Model) -> dict[str, Array]:
    sizes = {"b": 2, "s": 5}
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        found[value.name or ""] = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return found


def units_of(model: ir.Model) -> tuple[GraphUnits, tuple[WeightGroup, ...]]:
    found = find_graph_units(model)
    return found, found.groups


def zeroed(model: ir.Model, kept: Callable[[WeightGroup], list[int]]) -> ir.Model:
    """The whole model, with zeros where weights read the units that go."""
    copy = model.clone()
    found, groups = units_of(model)
    for group in groups:
        gone = set(range(group.count)) - set(kept(group))
        for side in group.readers:
            value = copy.graph.initializers[side.source.name or ""]
            assert value.const_value is not None
            array = np.moveaxis(np.array(value.const_value.numpy()), side.axis, 0)
            for number, places in enumerate(positions(found, group, side)):
                if number in gone:
                    array[places] = 0
            value.const_value = ir.tensor(np.moveaxis(array, 0, side.axis), name=value.name)
    return copy


def parameters(model: ir.Model) -> int:
    tensors = [v.const_value for v in model.graph.initializers.values()]
    return sum(t.size for t in tensors if t is not None and t.dtype == ir.DataType.FLOAT)


CASES = {
    "mlp": (lambda: model_of(f"{NORMED} {MLP}"), "prune_neurons", 12),
    "gated": (lambda: model_of(f"{NORMED} {GATED}"), "prune_neurons", 12),
    "gate and up in one": (lambda: model_of(f"{NORMED} {PACKED}"), "prune_neurons", 12),
    "attention written out": (lambda: model_of(f"{NORMED} {ATTENTION}"), "prune_heads", 4),
    "MultiHeadAttention": (lambda: model_of(f"{NORMED} {MULTI}"), "prune_heads", 4),
    "Attention": (lambda: model_of(f"{NORMED} {FUSED}"), "prune_heads", 4),
}


@pytest.mark.parametrize("name", CASES)
def test_units_go_and_the_rest_computes_the_same(name: str) -> None:
    make, pass_name, count = CASES[name]
    model = make()
    _, (group,) = units_of(model)
    assert group.count == count
    before = run(model, feeds(model))
    scores = _l2(model, group)
    kept = sorted(np.argsort(scores)[count // 2 :].tolist())
    expected = run(zeroed(model, lambda _: kept), feeds(model))
    whole, full = model.clone(), parameters(model)
    outcome = load_pass(pass_name)(ratio=0.5)(model)
    assert outcome.modified
    assert outcome.changes.details["removed"] == count // 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert parameters(model) < full
    assert_same(expected, run(model, feeds(model)), rtol=1e-5)
    # The controls: it is not what it was, nor what other units would have left.
    others = sorted(set(range(count)) - set(kept))
    for wrong in (before, run(zeroed(whole, lambda _: others), feeds(model))):
        with pytest.raises(AssertionError):
            assert_same(expected, wrong, rtol=1e-3)


def _l2(model: ir.Model, group: WeightGroup) -> Array:
    """The norm of all weights of each unit, written down again."""
    found = find_graph_units(model)
    total = np.zeros(group.count)
    for side in next(g for g in found.groups if g.name == group.name).sides:
        array = np.moveaxis(
            model.graph.initializers[side.source.name or ""].const_value.numpy(), side.axis, 0
        )  # type: ignore[union-attr]
        for number, places in enumerate(positions(found, group, side)):
            total[number] += (array[places].astype(np.float64) ** 2).sum()
    return np.sqrt(total)


def test_channels_go_through_residuals_norms_depthwise_kernels_and_concatenations() -> None:
    model = image_model()
    _, groups = units_of(model)
    assert sorted(group.count for group in groups) == [4, 6]
    residual = next(group for group in groups if group.count == 4)
    # Made by both kernels whose sum it is, read by the second and by part of the last matrix.
    sides = {(side.source.name, side.axis) for side in residual.sides}
    assert sides == {("k1", 0), ("k2", 0), ("k2", 1), ("fc", 1)}

    def kept(group: WeightGroup) -> list[int]:
        scores = _l2(model, group)
        return sorted(np.argsort(scores)[group.count // 2 :].tolist())

    expected = run(zeroed(model, kept), feeds(model))
    load_pass("prune_channels")(ratio=0.5)(model)
    shapes = {name: tuple(v.shape.numpy()) for name, v in model.graph.initializers.items() if v.shape}
    assert shapes["k1"] == (2, 3, 3, 3)
    assert shapes["k2"] == (2, 2, 3, 3)
    assert shapes["depth"] == (3, 1, 3, 3)
    assert shapes["gain4"] == (2,)
    assert shapes["fc"] == (5, 5)
    assert_same(expected, run(model, feeds(model)), rtol=1e-5)


def test_neurons_that_do_nothing_cost_nothing() -> None:
    model = model_of(f"{NORMED} {GATED}")
    for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = np.moveaxis(np.array(value.const_value.numpy()), axis, 0)
        array[[1, 5, 6]] = 0
        value.const_value = ir.tensor(np.moveaxis(array, 0, axis), name=name)
    before = run(model, feeds(model))
    outcome = load_pass("prune_neurons")(ratio=0.25)(model)
    assert outcome.changes.details["layers"] == {"down": {"left": 9, "of": 12}}
    assert_same(before, run(model, feeds(model)), rtol=1e-6)


NEAR_MISSES = {
    "an output besides": (
        MLP.replace("y = ", "z = ") + " y = Concat<axis = -1>(z, a)", "it is the output 'y'",
    ),
    "a norm over the neurons": (
        MLP.replace("d = MatMul(a", "m = LayerNormalization(a, up_bias, up_bias) d = MatMul(m"), "",
    ),
    "a softmax over the neurons": (MLP.replace("a = Gelu(v)", "a = Softmax(v)"), ""),
    "an operator that nobody knows": (
        MLP.replace("a = Gelu(v)", "a = CumSum(v, last)"), "nothing is known of CumSum",
    ),
    "heads of unknown width": (ATTENTION.replace("Softmax(s)", "Softmax<axis = 1>(s)"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_and_left_alone(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    if "m = LayerNormalization" in body:
        body = MLP.replace(
            "d = MatMul(a, down)", "m = LayerNormalization(a, up_bias, up_bias) d = MatMul(m, down)"
        )
    made = {"last": np.array(-1)} if "last" in body else {}
    result = "float[b, s, 20] y" if "Concat" in body else "float[b, s, 8] y"
    names = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split()) | {"gain", "shift"}
    made |= {n: weight(*shape) for n, shape in WEIGHTS.items() if n in names}
    made |= {n: array for n, array in CONSTANTS.items() if n in names}
    model = graph(f"{HEAD} g (float[b, s, 8] x) => ({result}) {{ {NORMED} {body} }}", **made)
    kind = "prune_heads" if "Transpose" in body else "prune_neurons"
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(PreconditionError, match=reason or "that can be removed"):
        load_pass(kind)()(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_quantized_weights_say_when_to_prune() -> None:
    model = model_of(f"{NORMED} {MLP}")
    load_pass("quantize_dynamic")()(model)
    with pytest.raises(PreconditionError, match="Prune before quantization"):
        load_pass("prune_neurons")()(model)


def calibrated(model: ir.Model, x: Array) -> PassContext:
    def activations(_model: ir.Model, names: Any) -> Iterator[Mapping[str, Array]]:
        copy = model.clone()
        values = {v.name: v for node in copy.graph for v in node.outputs}
        for name in names:
            if values[name] not in copy.graph.outputs:
                copy.graph.outputs.append(values[name])
        for rows in np.split(x, 2):
            yield run(copy, {"x": rows})

    return PassContext(activations=activations)


def test_wanda_keeps_what_meets_large_activations() -> None:
    model = model_of(f"{NORMED} {MLP}")
    x = np.random.default_rng(5).standard_normal((4, 6, 8)).astype(np.float32)
    given = run(_with_output(model, "a"), {"x": x})["a"].reshape(-1, 12).astype(np.float64)
    down = model.graph.initializers["down"].const_value.numpy()  # type: ignore[union-attr]
    scores = np.sqrt((given**2).mean(0)) * np.abs(down).sum(1)
    expected = run(zeroed(model, lambda _: np.argsort(scores)[6:].tolist()), {"x": x})
    in_context(model, calibrated(model, x))
    load_pass("prune_neurons")(method="wanda")(model)
    assert_same(expected, run(model, {"x": x}), rtol=1e-5)


def _with_output(model: ir.Model, name: str) -> ir.Model:
    copy = model.clone()
    copy.graph.outputs.append(next(v for n in copy.graph for v in n.outputs if v.name == name))
    return copy


def test_what_stays_takes_over_what_goes() -> None:
    """With a neuron twice, one can go without any loss; by least squares its weight goes to the other."""
    model = model_of(f"{NORMED} {MLP}")
    for name, axis in (("up", 1), ("up_bias", 0)):
        value = model.graph.initializers[name]
        array = np.moveaxis(np.array(value.const_value.numpy()), axis, 0)  # type: ignore[union-attr]
        array[6:] = array[:6]
        value.const_value = ir.tensor(np.moveaxis(array, 0, axis), name=name)
    x = np.random.default_rng(5).standard_normal((40, 6, 8)).astype(np.float32)
    before = run(model, {"x": x})
    in_context(model, calibrated(model, x))
    plain = model.clone()
    in_context(plain, calibrated(plain, x))
    load_pass("prune_neurons")(ratio=0.5, method="hessian")(model)
    load_pass("prune_neurons")(ratio=0.5, method="wanda")(plain)
    error, control = (
        float(np.square(run(m, {"x": x})["y"] - before["y"]).mean() / np.square(before["y"]).mean())
        for m in (model, plain)
    )
    assert error < 1e-3 < control


def test_data_and_values_are_asked_for() -> None:
    model = model_of(f"{NORMED} {MLP}")
    with pytest.raises(PreconditionError, match="method wanda without calibration data"):
        load_pass("prune_neurons")(method="wanda")(model)
    with pytest.raises(PreconditionError, match="no heads that can be removed"):
        load_pass("prune_heads")()(model)
    with pytest.raises(BadInputError, match="ratio: 1; expected 0 to below 1"):
        load_pass("prune_heads")(ratio=1.0)
    remedy = "taylor, which needs gradients, and ONNX Runtime computes none; expected l1, .*`training.steps`"
    for make in (load_pass("prune_heads").create, lambda given: load_pass("prune_heads")(**given)):
        with pytest.raises(BadInputError, match=remedy):
            make({"method": "taylor"})
    with pytest.raises(BadInputError, match="threshold: -1"):
        load_pass("prune_heads")(threshold=-1.0)
    with pytest.raises(PassError, match="excluded by skip_nodes"):
        load_pass("prune_neurons")(skip_nodes=("down",))(model)
    image = image_model()
    in_context(image, PassContext(activations=lambda *_: iter(())))
    with pytest.raises(PreconditionError, match="l1, l2 or random where convolutions read"):
        load_pass("prune_channels")(method="wanda")(image)


def test_the_global_budget_spares_the_layer_that_matters() -> None:
    between = "h = LayerNormalization(h0, gain, shift)"
    body = f"{NORMED} {MLP.replace('y = Add', 'h0 = Add')} {between} " + MLP.replace("(n,", "(h,").replace(
        "u =", "u2 =").replace("(u,", "(u2,").replace("v =", "v2 =").replace("(v)", "(v2)").replace(
        "a =", "a2 =").replace("(a,", "(a2,").replace("d =", "d2 =").replace("(d,", "(d2,").replace(
        ", up)", ", up2)").replace(", down)", ", down2)")  # fmt: skip
    made = {
        n: weight(*s)
        for n, s in WEIGHTS.items()
        if n in ("gain", "shift", "up", "up_bias", "down", "down_bias")
    }
    spread = np.array([5.0] * 3 + [0.01] * 9, np.float32)
    made |= {"up2": weight(8, 12) * spread, "down2": weight(12, 8) * spread[:, None]}
    made["up"], made["down"] = np.ones((8, 12), np.float32), np.ones((12, 8), np.float32)
    model = graph(f"{HEAD} g (float[b, s, 8] x) => (float[b, s, 8] y) {{ {body} }}", **made)
    outcome = load_pass("prune_neurons")(ratio=0.375, scope="global")(model)
    assert outcome.changes.details["layers"] == {
        "down": {"left": 12, "of": 12},
        "down2": {"left": 3, "of": 12},
    }


@settings(max_examples=25, deadline=None)
@given(
    ratio=st.floats(0.05, 0.9),
    method=st.sampled_from(["l1", "l2", "random"]),
    scope=st.sampled_from(["layer", "global"]),
    case=st.sampled_from([*CASES]),
)
def test_any_share_leaves_a_model_that_computes_what_zeros_would(
    ratio: float, method: str, scope: str, case: str
) -> None:
    make, name, count = CASES[case]
    model = make()
    whole = model.clone()
    outcome = load_pass(name)(ratio=ratio, method=method, scope=scope)(model)
    left = count - outcome.changes.details.get("removed", 0)
    assert left == max(1, count - round(ratio * count))
    if not outcome.modified:
        return
    # What stays is told by the weights themselves: each row is one of the old ones.
    old = whole.graph.initializers[(reader := "wo" if "head" in name else "down")].const_value.numpy()  # type: ignore[union-attr]
    new = model.graph.initializers[reader].const_value.numpy()  # type: ignore[union-attr]
    rows = [int(np.flatnonzero((old == row).all(1))[0]) for row in new]
    width = len(old) // count
    kept = sorted({row // width for row in rows})
    assert len(kept) == left
    expected = run(zeroed(whole, lambda _: kept), feeds(whole))
    assert_same(expected, run(model, feeds(model)), rtol=1e-5)
