"""onnxsim and onnxslim on graphs of others, run by ONNX Runtime. A variant is the tool, or ``int4``."""

from __future__ import annotations

from pathlib import Path

from peer_adapters.contract import Adapter, Decoder, Encoder
from peer_adapters.plain_ort import OrtDecoder, OrtEncoder, only_graph


class SimplifierAdapter(Adapter):
    """What each makes of a graph."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        import onnx

        if variant == "onnxslim":
            import onnxslim

            model = onnxslim.slim(str(only_graph(source)))
        elif variant == "int4":
            import onnxsim

            graph = onnx.load(only_graph(source))
            # It leaves graphs of older operator sets as they are, and says nothing. What is in this one
            # means the same in 21, where only types were added.
            next(one for one in graph.opset_import if not one.domain).version = 21
            model = onnxsim.quantize_weight_only_int4(graph)
            assert "DequantizeLinear" in {node.op_type for node in model.graph.node}, "nothing was quantized"
            onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx.data")
            return
        else:
            import onnxsim

            model, held = onnxsim.simplify(str(only_graph(source)))
            assert held, "onnxsim's own check failed"
        onnx.save(model, target / "model.onnx")

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return OrtDecoder(path, threads)

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return OrtEncoder(path, threads)


ADAPTER = SimplifierAdapter()
