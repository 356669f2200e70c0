"""optimum-onnx: its export, its runtime for language models, and dynamic quantization of its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_adapters.contract import Adapter, Decoder, Encoder, Floats, SteppingDecoder
from peer_adapters.plain_ort import OrtEncoder, only_graph


class _Decoder(SteppingDecoder):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._torch = torch
        self._model: Any = ORTModelForCausalLM.from_pretrained(path, session_options=options)
        self._past: Any = None
        self._length = 0

    def _step(self, ids: list[int]) -> Floats:
        torch = self._torch
        self._length += len(ids)
        found = self._model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones((1, self._length), dtype=torch.int64),
            position_ids=torch.arange(self._length - len(ids), self._length)[None],
            past_key_values=self._past, use_cache=True,
        )  # fmt: skip
        self._past = found.past_key_values
        self._last = int(found.logits[0, -1].argmax())
        logits: Floats = found.logits[0].numpy()
        return logits

    def _reset(self) -> None:
        self._past, self._length = None, 0


class OptimumAdapter(Adapter):
    """Exports; a variant of an encoder says how its graph is quantized.

    ``fp32-decoder`` and ``fp32-encoder`` export. ``ort-transformers`` is the optimiser of encoders that ONNX
    Runtime brings; ``ort-dynamic`` is ``quantize_dynamic`` of ONNX Runtime with
    its defaults, ``dynamic`` optimum's own configuration for AVX512-VNNI, per channel; both start from the
    exported graph.
    """

    def convert(self, variant: str, source: Path, target: Path) -> None:
        if variant == "ort-dynamic":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(only_graph(source), target / "model.onnx", weight_type=QuantType.QInt8)
            return
        if variant == "ort-transformers":
            from onnxruntime.transformers.optimizer import optimize_model

            # Sizes of heads are read from the graph where they are 0.
            made = optimize_model(str(only_graph(source)), model_type="bert", num_heads=0, hidden_size=0)
            made.save_model_to_file(str(target / "model.onnx"))
            return
        if variant == "dynamic":
            from optimum.onnxruntime import ORTQuantizer
            from optimum.onnxruntime.configuration import AutoQuantizationConfig

            settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
            quantizer = ORTQuantizer.from_pretrained(source, file_name=only_graph(source).name)
            quantizer.quantize(save_dir=target, quantization_config=settings)
            return
        from optimum.exporters.onnx import main_export

        task = "text-generation-with-past" if variant == "fp32-decoder" else "feature-extraction"
        # Its own comparison with PyTorch is left out, as ours is.
        main_export(str(source), output=target, task=task, do_validation=False)

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return _Decoder(path, threads)

    def open_encoder(self, variant: str, path: Path, threads: int) -> Encoder:
        return OrtEncoder(path, threads)


ADAPTER = OptimumAdapter()
