"""Parts of a graph as models of their own, and the tensors that they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtBackend, TorchBackend, cases_for
from onnxsmith.runtime.graph_parts import GivenValue, GraphValues, build_part
from onnxsmith.runtime.tensor_store import TensorStore, hide_padding
from onnxsmith.runtime.tracing_runs import trace_graph

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


def test_parts_compute_what_the_whole_does(tiny_package: ModelPackage) -> None:
    backend = OrtBackend(threads=1)
    with backend.open(tiny_package) as session, TensorStore() as small, TensorStore() as large:
        cases = list(cases_for(session, limits={"input_ids": 64}, samples=6))
        values = GraphValues(tiny_package.main.model)
        trace_graph(values, backend, cases, small, group=7)
        trace_graph(values, backend, cases, large, group=1000)
        assert small.names() == large.names()
        for number, case in enumerate(cases):
            outputs = session.run(case.feeds)
            for name, array in outputs.items():
                expected = hide_padding(array, case)
                np.testing.assert_allclose(
                    hide_padding(small.get(name, number).load(), case), expected, atol=2e-4
                )
        directory = small._directory
        assert directory.exists()
    assert not directory.exists()


def test_a_part_starts_from_given_values(tiny_package: ModelPackage) -> None:
    values = GraphValues(tiny_package.main.model)
    name = next(n for n in values.names if values.producers[n].op_type == "SkipSimplifiedLayerNormalization")
    source = values.inputs_of(values.producers[name])
    given = {n: GivenValue("float32", 3) for n in source}
    part = build_part(tiny_package.main.model, given=given, outputs=[name])
    assert [node.op_type for node in part.main.model.graph] == ["SkipSimplifiedLayerNormalization"]
    assert {spec.name for spec in part.main.inputs} == {f"{n}.given" for n in source}
    with OrtBackend(threads=1).open(part) as session:
        feeds = {f"{n}.given": np.ones((1, 2, 32), np.float32) for n in source}
        np.testing.assert_allclose(session.run(feeds)[name], 1.0, atol=1e-4)
    # The model itself is as it was.
    assert values.names == GraphValues(tiny_package.main.model).names


def test_padding_is_hidden_where_it_is(tiny_program: Any) -> None:
    with TorchBackend().open(tiny_program) as session:
        made = list(cases_for(session, limits={"input_ids": 64}))
    case = next(c for c in made if c.name == "prefill batch=2 length=9 left-padding=4")
    hidden = hide_padding(np.ones((2, 9, 5)), case)
    assert hidden[1, :4].sum() == 0
    assert hidden.sum() == 2 * 9 * 5 - 4 * 5
    assert hide_padding(np.ones((2, 3, 9, 5)), case)[1, :, :4].sum() == 0
    assert hide_padding(np.ones((18, 5)), case)[9:13].sum() == 0
    assert hide_padding(np.ones((7, 5)), case).sum() == 35
