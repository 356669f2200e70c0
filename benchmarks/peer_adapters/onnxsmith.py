"""This project. A variant is a preset; conversions are those of a user, their checks left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Adapter, Decoder, Encoder, Floats, Tokens, mean_pooled


class _Decoder(Decoder):
    def __init__(self, path: Path, threads: int) -> None:
        from onnxsmith import OrtSession, load_package
        from onnxsmith.runtime.decoding import open_decoder

        self._session = OrtSession(load_package(path), threads=threads)
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
        from onnxsmith import OrtSession, load_package

        self._session = OrtSession(load_package(path), threads=threads)
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
    """Export, passes, and one write."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        from onnxsmith import make_passes, run_passes
        from onnxsmith.exporters import export, load_torch, torch_program
        from onnxsmith.graph_passes import PRESETS
        from onnxsmith.graph_passes.context import PassContext
        from onnxsmith.package_io import save_package
        from onnxsmith.source import ModelSource, SourceKind

        parsed = ModelSource.parse(str(source))
        loaded = load_torch(parsed)
        package = export(loaded, torch_program(loaded))
        context = PassContext(gguf=parsed.path if parsed.kind is SourceKind.GGUF else None)
        save_package(run_passes(package, make_passes(PRESETS[variant]), context=context), target)

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return _Encoder(path, threads)


ADAPTER = OnnxsmithAdapter()
