"""Generation asks a graph that can for the last position's logits only, and writes the same text."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsmith.graph_passes import make_passes, run_passes
from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtSession, generate
from onnxsmith.runtime.decoding import open_decoder


@pytest.fixture(scope="module")
def cut(tiny_package: ModelPackage) -> ModelPackage:
    return run_passes(tiny_package, make_passes([("logits_to_keep", {})]))


def test_a_graph_with_the_input_gives_one_position(tiny_package: ModelPackage, cut: ModelPackage) -> None:
    tokens = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    with OrtSession(tiny_package) as plain, OrtSession(cut) as able:
        whole = open_decoder(plain).step(tokens)
        assert open_decoder(plain).step(tokens, last_only=True).shape == whole.shape
        decoder = open_decoder(able)
        last = decoder.step(tokens, last_only=True)
        assert last.shape == (2, 1, whole.shape[2])
        np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(open_decoder(able).step(tokens), whole, rtol=1e-5, atol=1e-5)
        # A next token on the cache, without and with.
        following = np.array([[1], [2]])
        reference = open_decoder(plain)
        reference.step(tokens)
        np.testing.assert_allclose(decoder.step(following), reference.step(following), rtol=1e-5, atol=1e-5)


def test_the_text_is_the_same(tiny_package: ModelPackage, cut: ModelPackage) -> None:
    with OrtSession(tiny_package) as plain, OrtSession(cut) as able:
        texts = [list(generate(one, [5, 6, 7], max_new_tokens=12)) for one in (plain, able)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12
