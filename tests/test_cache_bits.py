"""The KV cache in 8 bits: what it computes, how the rest of the house treats it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxsmith.comparison import tolerance_for
from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.graph_passes.cache_bits import QuantizeCache, _Cached, _magnitudes
from onnxsmith.graph_passes.contract import PreconditionError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.calibration import CalibrationData, context_for
from onnxsmith.runtime import OrtBackend, OrtSession, cases_for, compare_sessions, generate, reference_outputs

TEXT = "the quick brown fox jumps over the lazy dog. a smith forges the iron while it is hot. "


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationData:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    # Made-up inputs are random tokens, so the data has to be as random.
    letters = np.random.default_rng(0).choice(list(TEXT), 4000)
    path.write_text("".join(letters))
    return CalibrationData(str(path), samples=32, tokens=64)


def in_8_bits(package: ModelPackage, data: CalibrationData, **options: Any) -> ModelPackage:
    context = context_for(None, package, data)
    return run_passes(package, make_passes([("quantize_cache", options)]), context=context)


@pytest.mark.parametrize("scales", ["per_channel", "per_tensor"])
def test_results_stay_and_the_cache_is_a_quarter(
    tiny_package: ModelPackage, calibration: CalibrationData, scales: str
) -> None:
    quantized = in_8_bits(tiny_package, calibration, scales=scales)
    details = quantized.steps[-1].details
    assert (tiny_package.precision, quantized.precision) == ("float32", "int8")
    assert details["caches"] == 2 and details["bytes_per_token"] == 2 * 2 * 2 * 8
    assert {spec.dtype for spec in quantized.main.inputs if "past" in spec.name} == {"int8"}
    assert {spec.dtype for spec in quantized.main.outputs if "present" in spec.name} == {"int8"}
    with OrtSession(tiny_package) as reference, OrtSession(quantized) as candidate:
        expected = reference_outputs(reference, cases_for(reference, limits={"input_ids": 64}))
        result = compare_sessions(reference, candidate, expected, tolerance=tolerance_for("int8"))
        assert result.passed, result.reason
        assert any(t.name.startswith("present.") for t in result.tensors)
        worst = min(t.cosine for t in result.tensors if t.name == "logits")
        # A prompt's own keys and values are rounded too, so nothing is equal and nothing is far off.
        assert 0.95 < worst < 1
        # Control: scales that are off by a factor are found.
        spoiled = quantized.derive()
        for node in spoiled.main.model.graph:
            if node.op_type == "GroupQueryAttention":
                scale = node.inputs[12].const_value  # type: ignore[union-attr]
                node.inputs[12].const_value = type(scale)(scale.numpy() * 0.1, name="spoiled")  # type: ignore
        spoiled.main.path = None
        with OrtSession(spoiled) as wrong:
            assert not compare_sessions(reference, wrong, expected, tolerance=tolerance_for("int8")).passed


def test_it_is_written_opened_and_generates(
    tiny_package: ModelPackage, calibration: CalibrationData, tmp_path: Path
) -> None:
    quantized = in_8_bits(tiny_package, calibration)
    save_package(quantized, tmp_path)
    again = load_package(tmp_path)
    onnx.load(tmp_path / "model.onnx")
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    with OrtSession(again) as session, OrtSession(tiny_package) as reference:
        assert session.shares_cache
        assert set(session.cache_scales) == {
            f"{side}.{layer}.{part}"
            for side in ("past_key_values", "present")
            for layer in (0, 1)
            for part in ("key", "value")
        }
        ours = list(generate(session, prompt, max_new_tokens=6))
        theirs = list(generate(reference, prompt, max_new_tokens=6))
    assert len(ours) == 6 and ours[0] == theirs[0]
    backend = OrtBackend(apart=True)
    with backend.open(again) as apart:
        assert list(generate(apart, prompt, max_new_tokens=6)) == ours


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotated_keys_keep_in_range(interleaved: int) -> None:
    """With rotation inside of the operator only the unrotated keys are seen."""
    x = ir.Value(name="keys")
    node = ir.node(
        "GroupQueryAttention",
        [None, x],
        {"do_rotary": 1, "rotary_interleaved": interleaved},
        domain="com.microsoft",
    )
    random = np.random.default_rng(0)
    keys = random.standard_normal((1, 50, 2 * 6)).astype(np.float32)
    bound = _magnitudes(_Cached(node, 2, 6), 1, {"keys": keys})
    assert bound.shape == (2, 6)
    pairs = keys.reshape(50, 2, 3, 2) if interleaved else keys.reshape(50, 2, 2, 3).swapaxes(2, 3)
    angles = random.uniform(0, 2 * np.pi, (1000, 1, 1, 3))
    chosen = pairs[random.integers(0, 50, 1000)][:, None]
    one = chosen[..., 0] * np.cos(angles) - chosen[..., 1] * np.sin(angles)
    per_pair = bound.reshape(2, 3, 2) if interleaved else bound.reshape(2, 2, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(per_pair[..., 0], per_pair[..., 1])
    assert np.all(np.abs(one).max((0, 1)) <= per_pair[..., 0] * 1.0001)
    # Control: what is seen before the rotation is not enough.
    assert np.any(np.abs(one).max((0, 1)) > np.abs(pairs).max(0)[..., 0])


def test_what_has_no_cache_in_8_bits_is_refused(
    tiny_package: ModelPackage, calibration: CalibrationData, onnx_package: Any
) -> None:
    plain = onnx_package("g (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }")
    with pytest.raises(PreconditionError, match=r"there is no KV cache.*attention=fused"):
        run_passes(plain, make_passes([("quantize_cache", {})]))
    concatenated = onnx_package(
        "g (float[1, h, n, 8] x, float[1, h, p, 8] past) => (float[1, h, t, 8] present)"
        "{ [join] present = Concat<axis = 2>(past, x) }"
    )
    next(iter(concatenated.main.model.graph)).inputs[0].name = "past_key_values.0.key"
    with pytest.raises(PreconditionError, match="join: Concat has no 8 bit cache"):
        run_passes(concatenated, make_passes([("quantize_cache", {})]))
    with pytest.raises(PreconditionError, match=r"no calibration data.*--calibration-data"):
        run_passes(tiny_package, make_passes([("quantize_cache", {})]))
    quantized = in_8_bits(tiny_package, calibration)
    with pytest.raises(PreconditionError, match="its cache is INT8 already"):
        in_8_bits(quantized, calibration)
    with pytest.raises(BadInputError, match=r"headroom: 0\.5; expected 1 or more"):
        QuantizeCache(headroom=0.5)
