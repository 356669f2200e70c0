"""Torch's own archives, adapters of PEFT, and ONNX models as sources of an export."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from onnxsmith import export_model
from onnxsmith.errors import SourceError, UnknownNameError
from onnxsmith.exporters import load_torch
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.artifact import verify_artifact
from onnxsmith.source import ModelSource, SourceKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a batch that may change and a length that may not."""

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 2)

        def forward(self, x: Any, mask: Any) -> dict[str, Any]:
            return {"scores": self.linear(x).sum(-1) * mask}

    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Scores().eval(),
        (torch.rand(3, 5, 4),),
        {"mask": torch.ones(3, 5)},
        dynamic_shapes={"x": {0: batch}, "mask": {0: batch}},
    )
    path = tmp_path_factory.mktemp("pt2") / "scores.pt2"
    torch.export.save(program, path)
    return path


def test_an_exported_program_keeps_its_axes(archive: Path, tmp_path: Path) -> None:
    assert ModelSource.parse(str(archive)).kind is SourceKind.EXPORTED_PROGRAM
    package, comparison = export_model(str(archive), tmp_path / "artifact")
    assert comparison is not None and comparison.passed
    assert [str(s) for s in package.main.inputs] == ["x: float32[batch, 5, 4]", "mask: float32[batch, 5]"]
    assert [str(s) for s in package.main.outputs] == ["scores: float32[batch, 5]"]
    assert {t.case for t in comparison.tensors} == {"batch=1", "batch=2", "batch=3"}
    assert package.source["files"][0]["name"] == "scores.pt2"


class WritesAFile:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def rewritten(archive: Path, path: Path, replace: Any) -> Path:
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(path, "w") as made:
        for name in given.namelist():
            for new_name, content in replace(name, given.read(name)):
                made.writestr(new_name, content)
    return path


def test_a_damaged_or_hostile_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(SourceError, match=r"no archive: .*expected what torch\.export\.save writes"):
        load_torch(ModelSource.parse(str(tmp_path / "text.pt2")))
    marker = tmp_path / "ran"
    code = pickle.dumps(WritesAFile(marker))

    def with_object(name: str, data: bytes) -> list[tuple[str, bytes]]:
        more = [("scores/data/constants/custom_obj_0", code)] if name.endswith("model.json") else []
        return [(name, data), *more]

    bad = rewritten(archive, tmp_path / "object.pt2", with_object)
    with pytest.raises(SourceError, match=r"object custom_obj_0, which can run code.*tensors only"):
        load_torch(ModelSource.parse(str(bad)))
    # A pickle in the place of the example inputs: read with weights_only, and refused.
    torch.save(WritesAFile(marker), tmp_path / "inputs.pt")
    hostile = (tmp_path / "inputs.pt").read_bytes()
    bad = rewritten(
        archive,
        tmp_path / "inputs.pt2",
        lambda name, data: [(name, hostile if "sample_inputs" in name else data)],
    )
    with pytest.raises(SourceError, match=r"cannot be read: "):
        load_torch(ModelSource.parse(str(bad)))
    bad = rewritten(
        archive,
        tmp_path / "broken.pt2",
        lambda name, data: [(name, b"{" if name.endswith("model.json") else data)],
    )
    with pytest.raises(SourceError, match=r"cannot be read: .*of this version of torch"):
        load_torch(ModelSource.parse(str(bad)))
    assert not marker.exists()


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_into_its_model(adapter: Path, tiny_llama_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    source = ModelSource.parse(str(adapter))
    assert source.kind is SourceKind.ADAPTER
    loaded = load_torch(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ids = torch.arange(6)[None]
    before = base(ids).logits
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
        got = loaded.module(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - before).abs().max() > 1e-2
    assert loaded.task == "text-generation" and "tokenizer.json" in loaded.files
    assert not any("lora" in name for name in loaded.module.state_dict())
    assert {f["name"] for f in loaded.provenance["files"]} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert loaded.provenance["base"]["files"][0]["name"] == "model.safetensors"


def test_an_adapter_that_stays_beside_its_model(adapter: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Its weights are defaults of inputs: given others, the same graph is another adapter."""
    ort = pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors.numpy")
    package, comparison = export_model(str(adapter), tmp_path / "beside", adapter="inputs")
    assert comparison is not None and comparison.passed
    stored = safetensors.load_file(adapter / "adapter_model.safetensors")
    wanted = {name.removeprefix("base_model.model."): value for name, value in stored.items()}
    assert package.steps[0].details["adapter_inputs"] == len(wanted) >= 8
    # Nobody has to give them.
    assert not any("lora" in spec.name for spec in package.main.inputs)
    session = ort.InferenceSession(tmp_path / "beside" / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {one.name: tuple(one.shape) for one in session.get_overridable_initializers()}
    assert shapes == {name: value.shape for name, value in wanted.items()}
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    ids = torch.arange(6)[None]
    feeds = {
        one.name: torch.zeros(
            [1 if axis == "batch" else 0 if isinstance(axis, str) else axis for axis in one.shape]
        )
        for one in session.get_inputs()
        if one.name.startswith("past")
    }
    feeds |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids.clone()}
    named = {name: value.numpy() for name, value in feeds.items()}
    none = {name: value * 0 for name, value in wanted.items()}
    with torch.no_grad():
        plain = base(ids).logits.numpy()
    adapted, without = (session.run(["logits"], {**named, **given})[0] for given in ({}, none))
    assert abs(without - plain).max() < 1e-4
    assert abs(adapted - plain).max() > 1e-2
    assert session.run(["logits"], {**named, **wanted})[0].tolist() == adapted.tolist()


def test_what_cannot_stay_beside_its_model_is_refused(adapter: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(SourceError, match="a hf-directory source, and --adapter inputs"):
        load_torch(ModelSource.parse(str(tiny_llama_dir)), adapter="inputs")
    with pytest.raises(UnknownNameError, match="elsewhere"):
        load_torch(ModelSource.parse(str(adapter)), adapter="elsewhere")
    config = adapter / "adapter_config.json"
    told = json.loads(config.read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "an adapter of the kind IA3; expected one of the kind LORA"),
        ({"modules_to_save": ["lm_head"]}, "an adapter that replaces .'lm_head'.; .*--adapter merge"),
    ):
        config.write_text(json.dumps(told | change))
        with pytest.raises(SourceError, match=message):
            load_torch(ModelSource.parse(str(adapter)), adapter="inputs")


def test_an_adapter_that_does_not_fit_is_refused(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"target_modules": ["nothing"]}))
    with pytest.raises(SourceError, match=r"the adapter cannot be merged: .*adds to weights, such as LoRA"):
        load_torch(ModelSource.parse(str(adapter)))
    config.write_text(json.dumps(plain | {"base_model_name_or_path": None}))
    with pytest.raises(SourceError, match="without base_model_name_or_path; expected the model's directory"):
        load_torch(ModelSource.parse(str(adapter)))
    config.write_text("{")
    with pytest.raises(SourceError, match=r"adapter_config\.json cannot be read: .*expected JSON"):
        load_torch(ModelSource.parse(str(adapter)))
    config.write_text(json.dumps(plain))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no adapter_model\.safetensors; expected weights as safetensors"):
        load_torch(ModelSource.parse(str(adapter)))


def test_an_onnx_model_becomes_an_artifact(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    package, comparison = export_model(str(tiny_artifact_dir / "model.onnx"), tmp_path / "artifact")
    assert comparison is not None and comparison.passed and len(comparison.tensors) > 1
    assert package.source["kind"] == "onnx"
    assert verify_artifact(tmp_path / "artifact") == []
    assert load_package(tmp_path / "artifact").steps[-1].name == "lower_ir_version"


def test_an_export_without_comparison_says_so(archive: Path, tmp_path: Path) -> None:
    _, comparison = export_model(str(archive), tmp_path / "artifact", verify=False)
    assert comparison is None
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["measurements"]["comparison"] == {"verified": False}
