"""llama.cpp, through llama-cpp-python, on the GGUF file itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peer_adapters.contract import Adapter, Decoder, Floats


class _Decoder(Decoder):
    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        # Logits of all positions only where they are asked for: otherwise a prompt would pay for them.
        self._path, self._threads = path, threads
        self._model = self._open(every=False)
        self._last = 0

    def _open(self, *, every: bool) -> object:
        return self._lib.Llama(
            str(self._path), n_ctx=768, n_batch=512, n_ubatch=512, n_threads=self._threads,
            n_threads_batch=self._threads, logits_all=every, verbose=False,
        )  # fmt: skip

    def _next(self) -> int:
        # Its own sampler copies the logits to Python first; the highest one is all that greedy needs.
        context = self._model.ctx  # type: ignore[attr-defined]
        row = self._lib.llama_get_logits_ith(context, -1)
        self._last = int(np.ctypeslib.as_array(row, (self._model.n_vocab(),)).argmax())  # type: ignore[attr-defined]
        return self._last

    def prefill(self, ids: list[int]) -> int:
        self._model.reset()  # type: ignore[attr-defined]
        self._model.eval(ids)  # type: ignore[attr-defined]
        return self._next()

    def decode(self, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            self._model.eval([self._last])  # type: ignore[attr-defined]
            tokens.append(self._next())
        return tokens

    def logits(self, ids: list[int]) -> Floats:
        model = self._open(every=True)
        model.eval(ids)  # type: ignore[attr-defined]
        found: Floats = np.array(model.scores[: len(ids)], np.float32)  # type: ignore[attr-defined]
        return found


class LlamaCppAdapter(Adapter):
    """Runs the file as it is."""

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)


ADAPTER = LlamaCppAdapter()
