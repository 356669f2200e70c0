"""A graph on ONNX Runtime as its users open it: ``InferenceSession`` with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Encoder, Floats, SteppingDecoder, Tokens, mean_pooled

__all__ = ["OrtDecoder", "OrtEncoder", "only_graph"]


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


class OrtDecoder(SteppingDecoder):
    """A decoder whose cache is inputs ``past_key_values.*`` and outputs ``present.*``, which are fed back."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._ort: Any = ort
        self._session: Any = ort.InferenceSession(
            str(only_graph(path)), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._past: dict[str, Any] = {}
        self._length = 0

    def _step(self, ids: list[int]) -> Floats:
        made = self._ort.OrtValue.ortvalue_from_numpy
        begin, self._length = self._length, self._length + len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(begin, self._length, dtype=np.int64)[None],
        }
        feeds = {name: made(array) for name, array in given.items() if name in self._inputs} | self._past
        found = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feeds), strict=True))
        self._past = {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name.startswith("present")
        }
        logits: Floats = np.asarray(found["logits"].numpy(), np.float32)[0]
        self._last = int(logits[-1].argmax())
        return logits

    def _reset(self) -> None:
        self._length = 0
        self._past = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values"):
                _, heads, _, width = value.shape
                kind = np.float16 if "float16" in value.type else np.float32
                empty = np.zeros((1, heads, 0, width), kind)
                self._past[name] = self._ort.OrtValue.ortvalue_from_numpy(empty)
