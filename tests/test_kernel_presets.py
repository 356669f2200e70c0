"""Whole models with the presets for kernels: against PyTorch, with the library and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from onnxsmith.exporters import export, load_torch, torch_program
from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
from onnxsmith.graph_passes.context import PassContext
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package, save_package
from onnxsmith.pipeline.stepwise import StepVerifier
from onnxsmith.runtime import OrtSession, cases_for, value_limits
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.samples import Case
from onnxsmith.source import ModelSource
from test_gguf_types import every_type

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
__all__ = ["every_type"]

Array = npt.NDArray[Any]


def models() -> dict[str, Any]:
    """Configurations whose layers have biases, gates and attention of several kinds."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.2}
    grouped = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {
        "gpt2": transformers.GPT2Config(
            vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, **tokens
        ),
        "opt": transformers.OPTConfig(
            **sizes, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=3, init_std=0.2,
        ),
        "qwen2": transformers.Qwen2Config(**sizes, **grouped, **tokens),
        "gemma": transformers.GemmaConfig(**sizes, **grouped, **tokens, head_dim=16),
        "llama": transformers.LlamaConfig(**sizes, **grouped, **tokens, tie_word_embeddings=True),
    }  # fmt: skip


def saved(name: str, directory: Path, tokenizer: Path) -> Path:
    config = models()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        # Biases begin as zeros.
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


def halves(package: ModelPackage, preset: str, context: PassContext | None = None) -> tuple[Any, Any]:
    """With ONNX Runtime's operators in float arithmetic, and the whole preset."""
    specs = list(PRESETS[preset])
    at = next(number for number, (name, _) in enumerate(specs) if name == "use_packed_kernels")
    before = run_passes(package, make_passes(specs[:at]), context=context)
    exact = run_passes(before, make_passes([("set_accuracy_level", {"level": 1})]))
    return exact, run_passes(before, make_passes(specs[at:]), context=context)


def own(package: ModelPackage) -> list[str]:
    return [node.op_type for node in package.main.model.graph.all_nodes() if node.domain == "onnxsmith"]


def plain_runtime(package: ModelPackage, cases: list[Case], directory: Path) -> list[dict[str, Array]]:
    """What ONNX Runtime makes of a model without the library."""
    directory.mkdir()
    save_package(package.derive(), directory)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    return [
        dict(
            zip(names, session.run(names, {k: v for k, v in case.feeds.items() if k in wanted}), strict=True)
        )
        for case in cases
    ]


def cosine(got: Array, want: Array) -> float:
    return float((got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want))


def assert_agrees(
    exact: ModelPackage, packed: ModelPackage, directory: Path, output: str, bound: float, count: int = 4
) -> None:
    """The functions compute what the blocks stand for; the kernels that, but for rounded activations."""
    with OrtSession(exact, threads=1) as reference, OrtSession(packed, threads=1) as candidate:
        cases = list(cases_for(reference, limits=value_limits(exact), samples=count, seed=0))
        expected = [reference.run(case.feeds)[output] for case in cases]
        rounded = [candidate.run(case.feeds)[output] for case in cases]
    functions = [one[output] for one in plain_runtime(packed, cases, directory)]
    assert len(cases) >= count
    for case, want, by_function, by_kernel in zip(cases, expected, functions, rounded, strict=True):
        kept = slice(None) if case.tokens is None else case.tokens[:, -want.shape[1] :]
        scale = np.abs(want[kept]).max()
        np.testing.assert_allclose(
            by_function[kept], want[kept], rtol=0, atol=1e-4 * scale, err_msg=case.name
        )
        assert bound < cosine(by_kernel[kept], want[kept]), case.name
        assert not np.array_equal(by_kernel, by_function), "the library was not used"


@pytest.mark.parametrize("preset", ["cpu-int4-kernels", "cpu-int8-kernels"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "gemma", "llama"])
def test_decoders(name: str, preset: str, tmp_path: Path, tiny_llama_dir: Path, kernels: Path) -> None:
    loaded = load_torch(ModelSource.parse(str(saved(name, tmp_path / "model", tiny_llama_dir))))
    exact, packed = halves(export(loaded, torch_program(loaded)), preset)
    kinds = own(packed)
    assert "GatherPacked" in kinds and len(kinds) > 4
    left = {node.op_type for node in packed.main.model.graph.all_nodes()}
    assert not left & {"MatMulNBits", "GatherBlockQuantized"}
    if name in ("qwen2", "llama"):
        (step,) = (step for step in packed.steps if step.name == "use_packed_kernels")
        assert (step.details["gates"], step.details["joined"], step.details["skipped"]) == (2, 2, {})
    assert_agrees(exact, packed, tmp_path / "packed", "logits", 0.99)


@pytest.mark.parametrize("preset", ["cpu-int8-kernels", "cpu-int8-dynamic-kernels"])
def test_an_encoder_in_8_bits(
    preset: str, save_tiny_bert: Callable[..., None], tmp_path: Path, kernels: Path
) -> None:
    save_tiny_bert(tmp_path / "model", positions=64)
    loaded = load_torch(ModelSource.parse(str(tmp_path / "model")))
    exact, packed = halves(export(loaded, torch_program(loaded)), preset)
    assert own(packed).count("GatherPacked") >= 1 and own(packed).count("MatMulPacked") >= 8
    assert_agrees(exact, packed, tmp_path / "packed", "last_hidden_state", 0.999)


def test_every_type_of_a_gguf_file(every_type: tuple[Path, Any], tmp_path: Path, kernels: Path) -> None:
    path, _ = every_type
    loaded = load_torch(ModelSource.parse(str(path)), lazy=True)
    package = export(loaded, torch_program(loaded))
    exact, packed = halves(package, "cpu-gguf-kernels", PassContext(gguf=path))
    (kept,) = (step for step in packed.steps if step.name == "keep_gguf_blocks")
    assert kept.details["copied"] >= 10
    (step,) = (step for step in packed.steps if step.name == "use_packed_kernels")
    assert step.details["products"] + step.details["lookups"] == len(kept.details["layers"])
    assert_agrees(exact, packed, tmp_path / "packed", "logits", 0.9)


def test_a_prompt_in_pieces_and_written_files(
    tiny_package: ModelPackage, tmp_path: Path, kernels: Path
) -> None:
    """Rows are computed alike whatever else is computed with them, also from files."""
    _, packed = halves(tiny_package, "cpu-int4-kernels")
    save_package(packed.derive(), tmp_path)
    ids = np.arange(4, 24).reshape(1, 20)
    with OrtSession(packed, threads=1) as one, OrtSession(load_package(tmp_path), threads=2) as two:
        whole = open_decoder(one).step(ids)
        pieces = open_decoder(two)
        parts = [pieces.step(ids[:, at : at + 1]) for at in range(20)]
    assert cosine(np.concatenate(parts, axis=1), whole) > 0.9999


def test_each_step_is_verified(tiny_package: ModelPackage, kernels: Path) -> None:
    """Activations are rounded in other blocks, so what is compared is float arithmetic, by the functions."""
    specs = [
        ("quantize_weights", {"bits": 8, "block_size": 32, "symmetric": True}),
        *PRESETS["cpu-int8-kernels"],
    ]
    at = next(number for number, (name, _) in enumerate(specs) if name == "use_packed_kernels")
    after = run_passes(tiny_package, make_passes([specs[0], *specs[at:]]), verify=StepVerifier())
    (step,) = (step for step in after.steps if step.name == "use_packed_kernels")
    assert step.details["verified"]["compared"] and step.details["verified"]["max_abs"] < 1e-4


def test_branches_for_prompts_and_tokens(tiny_package: ModelPackage, kernels: Path) -> None:
    """Products in branches go over too; a weight that both branches read stands in front of them."""
    form = {"bits": 4, "block_size": 32, "minimums": True, "half_scales": True}
    plain = run_passes(tiny_package, make_passes([("quantize_weights", form)]))
    two = run_passes(plain, make_passes([("fast_prompts", {}), ("use_packed_kernels", {})]))
    (branched,) = (step for step in two.steps if step.name == "fast_prompts")
    assert branched.details["products"] > 4 and len(own(two)) > 4
    long, short = np.arange(2, 14)[None], np.arange(2, 6)[None]
    found = []
    for package in (plain, two):
        with OrtSession(package, threads=1) as session:
            decoder = open_decoder(session)
            first = decoder.step(long)
            decoder.reset()
            found.append((first, decoder.step(short)))
    assert cosine(found[1][0], found[0][0]) > 0.99
    assert cosine(found[1][1], found[0][1]) > 0.99
