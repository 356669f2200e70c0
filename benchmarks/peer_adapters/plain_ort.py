"""A graph on ONNX Runtime as its users open it: ``InferenceSession`` with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Encoder, Floats, Tokens, mean_pooled

__all__ = ["OrtEncoder", "only_graph"]


def only_graph(path: Path) -> Path:
    """The graph in a directory."""
    found = sorted(path.rglob("*.onnx"))
    assert len(found) == 1, f"{path} has {len(found)} graphs"
    return found[0]


class OrtEncoder(Encoder):
    """An encoder whose first output is the last hidden state."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = ort.InferenceSession(
            str(only_graph(path)), options, providers=["CPUExecutionProvider"]
        )
        self._names = {value.name for value in self._session.get_inputs()}

    def embed(self, ids: Tokens, mask: Tokens) -> Floats:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._session.run(None, {k: v for k, v in feeds.items() if k in self._names})[0]
        return mean_pooled(hidden, mask)
