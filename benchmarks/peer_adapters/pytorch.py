"""PyTorch itself in float32, eager or compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Adapter, Decoder, Encoder, Floats, Tokens, mean_pooled


class _Decoder(Decoder):
    def __init__(self, path: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._past: Any = None
        self._last = 0

    def _step(self, ids: list[int]) -> int:
        with self._torch.inference_mode():
            tokens = self._torch.tensor([ids])
            found = self._model(tokens, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = found.past_key_values
        self._last = int(found.logits[0, -1].argmax())
        return self._last

    def prefill(self, ids: list[int]) -> int:
        self._past = None
        return self._step(ids)

    def decode(self, count: int) -> list[int]:
        return [self._step([self._last]) for _ in range(count)]

    def logits(self, ids: list[int]) -> Floats:
        with self._torch.inference_mode():
            found: Floats = self._model(self._torch.tensor([ids])).logits[0].numpy()
        return found


class _Encoder(Encoder):
    def __init__(self, path: Path, threads: int, compiled: bool) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        if compiled:
            self._model = torch.compile(self._model, dynamic=True)

    def embed(self, ids: Tokens, mask: Tokens) -> Floats:
        torch = self._torch
        with torch.inference_mode():
            found = self._model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        return mean_pooled(found.last_hidden_state.numpy(), np.asarray(mask))


class PytorchAdapter(Adapter):
    """Runs the checkpoint; a variant is ``eager`` or ``compiled``."""

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return _Encoder(path, threads, variant == "compiled")


ADAPTER = PytorchAdapter()
