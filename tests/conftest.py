"""A tiny Llama, made on the spot and taken once down the whole road: directory, program, package, artifact.

The fixtures are made once per session and shared, so a test must not change what it is given: `derive()` a
package and copy a directory first. `tiny_llama_dir`, `tiny_loaded` and `tiny_program` need no export.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.package import ModelPackage
    from onnxsmith.program import TorchProgram

# Before transformers is imported: nothing here may reach for the hub, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
# No run takes anything from the cache of whoever runs the tests, or leaves anything there.
os.environ["ONNXSMITH_CACHE_SIZE"] = "0"

TINY_VOCABULARY = 64
TINY_TEXT = (
    "the quick brown fox jumps over the lazy dog. a smith forges the iron while it is hot, and the hammer "
    "sings on the anvil. the fire is kept with coal and the bellows breathe. what is forged well holds well."
)


def heed_interrupts() -> None:
    """For `preexec_fn`: in a shell's background Ctrl-C is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def onnx_package(tmp_path: Path) -> Callable[..., ModelPackage]:
    """Makes a package of a graph in ONNX's textual form; its file is `<name>.onnx` in `tmp_path`."""

    def make(text: str, name: str = "model") -> ModelPackage:
        import onnx

        from onnxsmith.package_io import load_package

        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
        onnx.checker.check_model(model, full_check=True)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        return load_package(path)

    return make


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The library with onnxsmith's own operators, compiled once for all tests."""
    from onnxsmith.runtime.kernel_library import kernel_library
    from onnxsmith.runtime.kernels.build import BuildError, find_compiler

    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return kernel_library().path


@pytest.fixture(scope="session")
def save_tiny_bert(tiny_llama_dir: Path) -> Callable[..., None]:
    """Saves a random BERT without a head, two layers of 64 neurons, with the tokenizer of the tiny Llama."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def save(directory: Path, *, positions: int) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=positions, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.BertModel(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return save


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a random Llama as safetensors, and a BPE tokenizer of 64 tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = _tokenizer(transformers)
    assert len(tokenizer) == TINY_VOCABULARY
    config = transformers.LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        # Large, or every prediction is nearly uniform and no comparison of predictions says anything.
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return directory


def _tokenizer(transformers: Any) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator([TINY_TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def tiny_loaded(tiny_llama_dir: Path) -> LoadedModel:
    """The directory as `load_torch` reads it."""
    from onnxsmith.exporters import load_torch
    from onnxsmith.source import ModelSource

    return load_torch(ModelSource.parse(str(tiny_llama_dir)))


@pytest.fixture(scope="session")
def tiny_program(tiny_loaded: LoadedModel) -> TorchProgram:
    """The torch model behind its flat signature: the reference of comparisons."""
    from onnxsmith.exporters import torch_program

    return torch_program(tiny_loaded)


@pytest.fixture(scope="session")
def tiny_package(tiny_loaded: LoadedModel, tiny_program: TorchProgram) -> ModelPackage:
    """Exported, then taken through the preset cpu-fp32; in memory."""
    from onnxsmith.exporters import export
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes

    exported = export(tiny_loaded, tiny_program)
    return run_passes(exported, make_passes(PRESETS["cpu-fp32"]))


@pytest.fixture(scope="session")
def tiny_artifact_dir(tiny_package: ModelPackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as files: model.onnx with the tokenizer and configuration files."""
    from onnxsmith.package_io import save_package

    directory = tmp_path_factory.mktemp("tiny-artifact")
    # A copy, because saving tells a package where its files are.
    save_package(tiny_package.derive(), directory)
    return directory
