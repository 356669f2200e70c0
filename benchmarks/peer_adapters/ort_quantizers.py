"""ONNX Runtime's own quantizers, on the float32 graph of this project and run as this project runs its own.

What differs between these rows and ours is how weights were rounded, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_adapters import onnxsmith as ours
from peer_adapters.contract import Adapter, Decoder
from peer_adapters.plain_ort import only_graph

_BLOCK = 32


class OrtQuantizers(Adapter):
    """``MatMulNBitsQuantizer`` by each algorithm, 4 bits in blocks of 32, and ``quantize_dynamic``."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        graph = only_graph(source)
        for file in source.iterdir():
            # Tokenizer and configuration, for who runs it.
            if file.suffix == ".json" and file.name != "manifest.json":
                (target / file.name).write_bytes(file.read_bytes())
        if variant == "dynamic":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                graph, target / "model.onnx", weight_type=QuantType.QInt8, use_external_data_format=True
            )
            return
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        model = onnx.load(graph)

        algorithms: dict[str, Any] = {
            "default": lambda: None,
            "rtn": nbits.RTNWeightOnlyQuantConfig,
            "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=_BLOCK, bits=4),
            "k_quant": nbits.KQuantWeightOnlyQuantConfig,
        }
        quantizer = nbits.MatMulNBitsQuantizer(
            model, bits=4, block_size=_BLOCK, is_symmetric=False, accuracy_level=4,
            nodes_to_exclude=_outer_products(model), algo_config=algorithms[variant](),
        )  # fmt: skip
        quantizer.process()
        kinds = {node.op_type for node in quantizer.model.model.graph.node}
        assert "MatMulNBits" in kinds, "it quantized nothing, and said nothing"
        quantizer.model.save_model_to_file(str(target / "model.onnx"), use_external_data_format=True)

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return ours.ADAPTER.open_decoder(variant, path, threads)


def _outer_products(model: Any) -> list[str]:
    """The MatMul of positions with the rotary frequencies: rows of 1, which ours leaves alone, too.

    RTN and k-quant fail on it, as on any weight with an odd number of blocks: they pack the zero points of
    all rows two to a byte, and not those of each row.
    """
    single = {tensor.name for tensor in model.graph.initializer if list(tensor.dims[:1]) == [1]}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in single]


ADAPTER = OrtQuantizers()
