"""Olive: an encoder in dynamic int8, by its own workflow of conversion and quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_adapters.contract import Adapter, Encoder
from peer_adapters.plain_ort import OrtEncoder


class OliveAdapter(Adapter):
    """Conversion and dynamic quantization, with the defaults of both."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        from olive.workflows import run

        settings: dict[str, Any] = {
            "input_model": {"type": "HfModel", "model_path": str(source), "task": "feature-extraction"},
            "systems": {
                "here": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                }
            },
            "passes": {"conversion": {"type": "OnnxConversion"}, "int8": {"type": "OnnxDynamicQuantization"}},
            "target": "here", "host": "here", "output_dir": str(target),
            "cache_dir": str(target.parent / f"{target.name}-cache"), "log_severity_level": 3,
        }  # fmt: skip
        run(settings)
        # It ends well without a model, too.
        assert list(target.rglob("*.onnx")), "Olive ended with status 0 and without a model"

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return OrtEncoder(path, threads)


ADAPTER = OliveAdapter()
