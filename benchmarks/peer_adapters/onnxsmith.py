"""This project, its checks left out. A variant is a preset, or one with another quantizing pass."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Adapter, Decoder, Encoder, Floats, Tokens, mean_pooled

_MINIMUMS = {"bits": 4, "minimums": True, "half_scales": True, "embedding_block_size": 16}
# Name to preset, the pass that quantizes instead of the preset's own, and its parameters.
_VARIANTS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "gguf-floats": ("cpu-gguf", "keep_gguf_blocks", {"accuracy_level": 1}),
    "hqq": ("cpu-int4", "quantize_weights", {**_MINIMUMS, "method": "hqq"}),
    "awq": ("cpu-int4", "quantize_weights", {**_MINIMUMS, "method": "awq"}),
    "zero-points": ("cpu-int4", "quantize_weights", {"bits": 4}),
    "symmetric": ("cpu-int4-newest", "quantize_weights", {"bits": 4, "symmetric": True, "half_scales": True}),
    "mixed-115mb": ("cpu-int4", "quantize_mixed", {"size_mb": 113.0}),
}
_NEEDS_DATA = frozenset(
    {
        "cpu-gguf-calibrated",
        "cpu-int8-calibrated",
        "cpu-int4-calibrated",
        "awq",
        "mixed-115mb",
        "cpu-int4-1pct",
        "cpu-int8-static",
    }
)
_TOPICS = "pydoc_data.topics:topics"


class _Decoder(Decoder):
    def __init__(self, path: Path, threads: int) -> None:
        from onnxsmith import OrtSession
        from onnxsmith.runtime.decoding import open_decoder
        from onnxsmith.runtime.graph_file import GraphFile

        self._session = OrtSession(GraphFile.open(path), threads=threads)
        self._decoder = open_decoder(self._session, capacity=768)
        self._last = 0

    def prefill(self, ids: list[int]) -> int:
        self._decoder.reset()
        logits = self._decoder.step(np.array([ids], np.int64), last_only=True)
        self._last = int(logits[0, -1].argmax())
        return self._last

    def decode(self, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            self._last = int(self._decoder.step(np.array([[self._last]]), last_only=True)[0, -1].argmax())
            tokens.append(self._last)
        return tokens

    def logits(self, ids: list[int]) -> Floats:
        self._decoder.reset()
        found: Floats = self._decoder.step(np.array([ids], np.int64))[0]
        return found


class _Encoder(Encoder):
    def __init__(self, path: Path, threads: int) -> None:
        from onnxsmith import OrtSession
        from onnxsmith.runtime.graph_file import GraphFile

        self._session = OrtSession(GraphFile.open(path), threads=threads)
        self._names = {spec.name for spec in self._session.inputs}

    def embed(self, ids: Tokens, mask: Tokens) -> Floats:
        feeds: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
        }
        hidden = self._session.run({k: v for k, v in feeds.items() if k in self._names})["last_hidden_state"]
        return mean_pooled(hidden, mask)


class OnnxsmithAdapter(Adapter):
    """``onnxsmith export --preset ... --no-verify``."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        # As `onnxsmith export` sets it.
        gc.set_threshold(5_000_000, 10, 10)
        from onnxsmith.graph_passes import PRESETS
        from onnxsmith.pipeline.calibration import CalibrationData
        from onnxsmith.pipeline.exporting import export_model

        preset, name, options = _VARIANTS.get(variant, (variant, "", {}))
        specs = [
            (name, options) if name and one.startswith(("quantize_", "keep_gguf_")) else (one, given)
            for one, given in PRESETS[preset]
        ]
        # A decoder's samples are pieces of the text, an encoder's are its lines.
        # AWQ looks for one exponent of each activation, for which few samples are enough.
        samples = 16 if variant == "awq" else 128
        data = CalibrationData(_TOPICS, samples=samples, tokens=512) if variant in _NEEDS_DATA else None
        export_model(str(source), target, specs=specs, calibration=data, verify=False, force=True)
        # The command line ends without Python's search through all that is in memory.
        gc.freeze()

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return _Encoder(path, threads)


ADAPTER = OnnxsmithAdapter()
