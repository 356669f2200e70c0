"""onnxruntime-genai: its model builder and its runtime. A variant is ``PRECISION[:ALGORITHM]``."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peer_adapters.contract import Adapter, Decoder, Floats


class _Decoder(Decoder):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as og

        settings = json.loads((path / "genai_config.json").read_text())
        options = settings["model"]["decoder"].setdefault("session_options", {})
        if options.get("intra_op_num_threads") != threads:
            options["intra_op_num_threads"] = threads
            (path / "genai_config.json").write_text(json.dumps(settings, indent=4))
        self._og = og
        self._model = og.Model(str(path))
        self._generator: Any = None

    def _start(self) -> None:
        parameters = self._og.GeneratorParams(self._model)
        # Without a bound it allocates the cache for the model's whole context.
        parameters.set_search_options(do_sample=False, max_length=768, min_length=768)
        self._generator = self._og.Generator(self._model, parameters)

    def prefill(self, ids: list[int]) -> int:
        self._start()
        self._generator.append_tokens(np.array([ids], np.int32))
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def decode(self, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            self._generator.generate_next_token()
            tokens.append(int(self._generator.get_next_tokens()[0]))
        return tokens

    def logits(self, ids: list[int]) -> Floats:
        # All positions at once where the graph gives them; else token by token.
        self._start()
        self._generator.append_tokens(np.array([ids], np.int32))
        found = np.asarray(self._generator.get_output("logits"), np.float32)[0]
        if len(found) == len(ids):
            return found
        self._start()
        rows = []
        for token in ids:
            self._generator.append_tokens(np.array([[token]], np.int32))
            rows.append(np.asarray(self._generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)


class GenaiAdapter(Adapter):
    """The builder's defaults."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        precision, _, algorithm = variant.partition(":")
        extra = [f"algo_config={algorithm}"] if algorithm else []
        # As its documentation says to call it.
        sys.argv = [
            "builder", "-m", "local", "-i", str(source), "-o", str(target), "-p", precision, "-e", "cpu",
            "-c", str(target / "cache"), "--extra_options", "hf_token=false", *extra,
        ]  # fmt: skip
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)


ADAPTER = GenaiAdapter()
