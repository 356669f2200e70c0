"""Prompts on 8 bit integers: near enough, never for tokens, and in the same cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from generated_graphs import graph
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes import load_pass, make_passes, run_passes
from onnxsmith.package import ModelPackage, cache_is_shareable
from onnxsmith.package_io import load_package, save_package
from onnxsmith.runtime import OrtSession, generate
from onnxsmith.runtime.decoding import open_decoder

LONG = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
FORMS = (
    {"bits": 4, "block_size": 16, "minimums": True, "half_scales": True},
    {"bits": 4, "block_size": 16, "symmetric": True},
    {"bits": 8, "block_size": 16},
)


def quantized(package: ModelPackage, form: dict[str, object]) -> ModelPackage:
    # In float arithmetic, so that nothing else rounds.
    return run_passes(package, make_passes([("quantize_weights", form | {"accuracy_level": 1})]))


def branched(package: ModelPackage, tokens: int = 8) -> ModelPackage:
    return run_passes(package, make_passes([("fast_prompts", {"tokens": tokens})]))


def logits(package: ModelPackage, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    with OrtSession(package, threads=1) as session:
        found: npt.NDArray[np.float32] = open_decoder(session).step(ids)
    return found


def off(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("form", FORMS, ids=["minimums", "symmetric", "zero-points"])
def test_prompts_are_near_and_tokens_are_the_same(
    tiny_package: ModelPackage, form: dict[str, object]
) -> None:
    plain = quantized(tiny_package, form)
    fast = branched(plain)
    details = fast.steps[-1].details
    assert details["products"] > 0
    assert [node.op_type for node in fast.main.model.graph].count("If") == 1
    want = logits(plain, LONG)
    assert 0 < off(logits(fast, LONG), want) < 0.06
    np.testing.assert_array_equal(logits(fast, LONG[:, :8]), logits(plain, LONG[:, :8]))
    # A weight that is wrong would be seen.
    model = fast.main.model
    prompt = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    scales = next(value for name, value in prompt.initializers.items() if name.endswith("_prompt_scales"))
    assert scales.const_value is not None
    scales.const_value = ir.tensor(scales.const_value.numpy() * np.float32(2), name=scales.name)
    assert off(logits(fast, LONG), want) > 0.12


def test_the_cache_is_one_for_both(tiny_package: ModelPackage, tmp_path: Path) -> None:
    plain = quantized(tiny_package, FORMS[0])
    save_package(branched(plain), tmp_path)
    fast = load_package(tmp_path)
    assert cache_is_shareable(plain.main.model) and cache_is_shareable(fast.main.model)
    with OrtSession(plain, threads=1) as one, OrtSession(fast, threads=1) as two:
        assert two.shares_cache
        first, second = open_decoder(one), open_decoder(two)
        first.step(LONG)
        second.step(LONG)
        for token in ([[3], [4]], [[9], [8]]):
            got, want = second.step(np.array(token)), first.step(np.array(token))
            assert 0 < off(got, want) < 0.06
        padding = np.ones_like(LONG, np.bool_)
        padding[1, :3] = False
        first.reset()
        second.reset()
        got, want = second.step(LONG, padding), first.step(LONG, padding)
        assert off(got[0], want[0]) < 0.06
        assert off(got[1, 3:], want[1, 3:]) < 0.06
        assert len(list(generate(two, LONG[0].tolist(), max_new_tokens=12))) == 12


def test_a_cache_that_a_branch_concatenates_is_not_shared() -> None:
    model = graph("""<ir_version: 9, opset_import: ["": 18]>
    g (bool c, float[1, 2, p, 4] past) => (float[1, 2, t, 4] present) {
      present = If(c) <
        then_branch = a () => (float[1, 2, q, 4] k) { k = Concat<axis = 2>(past, past) },
        else_branch = b () => (float[1, 2, r, 4] l) { l = Identity(past) }>
    }""")
    model.graph.inputs[1].name, model.graph.outputs[0].name = "past_key_values.0.key", "present.0.key"
    assert not cache_is_shareable(model)


def test_it_refuses_and_says_why(tiny_package: ModelPackage) -> None:
    fast = branched(quantized(tiny_package, FORMS[0]))
    again = branched(fast)
    assert again.steps[-1].details["changes"] == 0
    assert "branches already" in str(again.steps[-1].details["skipped"])
    assert [*fast.steps[-1].details["skipped"].values()] == [
        "it is the output head, which a prompt needs for its last position only"
    ]
    unquantized = branched(tiny_package)
    assert "no MatMulNBits" in str(unquantized.steps[-1].details["skipped"])
    kind = load_pass("fast_prompts")
    outcome = kind()(
        graph('<ir_version: 9, opset_import: ["": 18]> g (float[2, 2] x) => (float[2, 2] y) { y = Abs(x) }')
    )
    assert outcome.changes.skipped == {"input_ids": "the graph has no such input of two axes"}
    with pytest.raises(BadInputError, match="tokens: 0; expected at least 1"):
        kind.create({"tokens": 0})
