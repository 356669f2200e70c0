"""How the time of the pass `cleanup` grows with the graph: ``python benchmarks/cleanup_scaling.py``.

Graphs are chains of blocks of ten nodes, of which some are no-ops, doubled, dead or computable. What is
printed is the time for each node of the input; if the pass is linear, it stays the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxsmith import make_passes
from onnxsmith.environment import describe_environment
from onnxsmith.graph_passes import operator_counts

BLOCK_NODES = 10


def chain(nodes: int) -> ir.Model:
    """A graph of about so many nodes on float32 (batch, 8)."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    body: list[ir.Node] = []
    weights: list[ir.Value] = []

    def add(kind: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(kind, inputs=inputs, name=f"{kind}_{len(body)}")
        node.outputs[0].name = f"value_{len(body)}"
        body.append(node)
        return node.outputs[0]

    def weight(seed: int) -> ir.Value:
        array = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
        tensor = ir.tensor(array, name=f"weight_{len(weights)}")
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        weights.append(value)
        return value

    value = x
    for block in range(nodes // BLOCK_NODES):
        inner = add("Identity", value)  # no-op
        left = add("MatMul", inner, weight(block))
        right = add("MatMul", inner, weight(block))  # doubled: the same weight again
        add("Exp", left)  # dead
        folded = add("Add", add("Abs", weight(2 * block)), weight(2 * block + 1))  # computable
        mixed = add("MatMul", add("Add", left, right), folded)
        value = add("Tanh", mixed)
        value = add("Relu", value)
    value.shape, value.type = ir.Shape(["batch", 8]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=body, initializers=weights, opset_imports={"": 20}, name="chain")
    return ir.Model(graph, ir_version=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/cleanup_scaling.json"))
    arguments = parser.parse_args()
    rows = []
    print(f"{'nodes':>8} {'left':>8} {'median s':>9} {'low':>7} {'high':>7} {'us/node':>8}")
    for nodes in arguments.nodes:
        times = []
        for _ in range(arguments.runs):
            model = chain(nodes)
            before = sum(operator_counts(model).values())
            [cleanup] = make_passes([("cleanup", {})])
            # Of the processor, which other programs do not change much; the pass has one thread.
            began = time.process_time()
            cleanup(model)
            times.append(time.process_time() - began)
        left = sum(operator_counts(model).values())
        median = statistics.median(times)
        rows.append(
            {"nodes": before, "nodes_left": left, "seconds": times, "us_per_node": median / before * 1e6}
        )
        print(
            f"{before:>8} {left:>8} {median:>9.2f} {min(times):>7.2f} {max(times):>7.2f} "
            f"{median / before * 1e6:>8.0f}",
            flush=True,
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": describe_environment(), "runs": arguments.runs, "results": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
