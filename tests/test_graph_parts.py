"""Parts of a graph as models of their own, and the tensors that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxsmith.package import ModelPackage
from onnxsmith.runtime import Case, OrtBackend, TorchBackend, cases_for
from onnxsmith.runtime.divergence import changed_kernels
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


def test_large_values_are_computed_in_small_pieces(onnx_package: Callable[..., ModelPackage]) -> None:
    """What a piece gives is in memory at once: no more values than fit, and at least one."""
    lines = "\n".join(f"v{n + 1} = Sin(v{n})" for n in range(60))
    package = onnx_package(f"g (float[n, 1000] v0) => (float[n, 1000] y) {{ {lines}\n y = Neg(v60) }}")
    backend, cases = OrtBackend(threads=1), [Case("one", {"v0": np.ones((2, 1000), np.float32)})]

    def ends(group_bytes: float) -> list[int]:
        done: list[int] = []
        with TensorStore() as store:
            trace_graph(
                GraphValues(package.main.model), backend, cases, store, group_bytes=group_bytes,
                on_piece=lambda number, total: done.append(number),
            )  # fmt: skip
            assert len(store.names()) == 61
        return done

    assert ends(1e9) == [16, 61]
    assert ends(10 * 8000) == [16, 26, 36, 46, 56, 61]
    assert ends(1) == list(range(16, 62))


@pytest.mark.parametrize("apart", [False, True])
def test_kernels_that_fusion_made_are_seen_and_pieces_lack_them(
    onnx_package: Callable[..., ModelPackage], apart: bool
) -> None:
    package = onnx_package("""
        g (float[n, 4] x) => (float[n, 4] y)
        <float[4] b = {1, 2, 3, 4}, float root = {1.41421354}, float one = {1}, float half = {0.5}>
        { a = Add(x, b)  d = Div(a, root)  e = Erf(d)  f = Add(e, one)  p = Mul(a, f)
          q = Mul(p, half)  y = Neg(q) }""")
    backend = OrtBackend(threads=1, record=True, apart=apart)
    case = Case("one", {"x": np.ones((2, 4), np.float32)})
    pieces: dict[str, str] = {}
    with TensorStore() as store:
        trace_graph(GraphValues(package.main.model), backend, [case], store, kernels=pieces)
    with backend.open(package) as session:
        session.run(case.feeds)
        session.run(case.feeds)
        whole = session.kernels()
    assert sorted(whole.values()) == ["BiasGelu", "Neg"]
    assert sorted(pieces.values()) == ["Add", "Add", "Div", "Erf", "Mul", "Mul", "Neg"]
    assert changed_kernels(pieces, whole, named=False) == {
        "Add": (0, 2), "BiasGelu": (1, 0), "Div": (0, 1), "Erf": (0, 1), "Mul": (0, 2)
    }  # fmt: skip
    with OrtBackend(threads=1, apart=apart).open(package) as session:
        session.run(case.feeds)
        assert not session.kernels()


def test_which_kernels_count_as_changed() -> None:
    one, two, three = ({str(n): "Mul" for n in range(count)} for count in (1, 2, 3))
    assert changed_kernels(two, {}, named=True) == {}
    assert changed_kernels(two, two, named=True) == {}
    assert changed_kernels(one, two, named=False) == {"Mul": (2, 1)}
    assert changed_kernels(three, two, named=True) == {"Mul": (2, 3)}
    # Pieces may have computed the same node again.
    assert changed_kernels(three, two, named=False) == {}
    compiled = {"x": "compiled by X"}
    assert changed_kernels(compiled, compiled, named=True) == {"compiled by X": (1, 1)}
