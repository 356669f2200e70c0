"""onnxsim and onnxslim on optimum's export, run by ONNX Runtime. A variant is the tool."""

from __future__ import annotations

from pathlib import Path

from peer_adapters.contract import Adapter, Encoder
from peer_adapters.plain_ort import OrtEncoder, only_graph


class SimplifierAdapter(Adapter):
    """What each makes of a graph."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        import onnx

        if variant == "onnxslim":
            import onnxslim

            model = onnxslim.slim(str(only_graph(source)))
        else:
            import onnxsim

            model, held = onnxsim.simplify(str(only_graph(source)))
            assert held, "onnxsim's own check failed"
        onnx.save(model, target / "model.onnx")

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return OrtEncoder(path, threads)


ADAPTER = SimplifierAdapter()
