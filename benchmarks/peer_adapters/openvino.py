"""OpenVINO on optimum's export. A variant is ``f32``, or ``default``: what it chooses for the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Adapter, Encoder, Floats, Tokens, mean_pooled
from peer_adapters.plain_ort import only_graph


class _Encoder(Encoder):
    def __init__(self, path: Path, threads: int, variant: str) -> None:
        import openvino

        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if variant == "f32":
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = openvino.Core().compile_model(str(only_graph(path)), "CPU", options)
        self._names = {name for value in self._model.inputs for name in value.names}

    def embed(self, ids: Tokens, mask: Tokens) -> Floats:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found = self._model({k: v for k, v in feeds.items() if k in self._names})
        return mean_pooled(found[self._model.outputs[0]], mask)


class OpenVinoAdapter(Adapter):
    """Reads the graph as it is."""

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return _Encoder(path, threads, variant)


ADAPTER = OpenVinoAdapter()
