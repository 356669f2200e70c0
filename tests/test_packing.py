"""Packages for other runtimes, each opened by its real client; bills of materials, cards, signatures."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith import PRESETS, export_model, load_package, optimize_model, package_model, verify_artifact
from onnxsmith.errors import BadInputError, ModelFileError, UnknownNameError
from onnxsmith.pipeline.layouts import LAYOUTS
from onnxsmith.pipeline.signing import sign_artifact

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT = "the smith"
TOKENS = 12


def need(module: str) -> None:
    """Skips without a client. Several take seconds to import, so they are looked for first."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; `make setup` brings it")


@pytest.fixture(scope="module")
def decoder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("decoder") / "fp32"
    export_model(str(tiny_llama_dir), directory, verify=False)
    return directory


@pytest.fixture(scope="module")
def packed(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "tiny"
    result = package_model([decoder], directory)
    assert list(result.layouts) == ["ort", "optimum", "genai", "transformers-js"]
    assert "modules.json" in result.refused["sentence-transformers"]
    return directory


@pytest.fixture(scope="module")
def greedy(tiny_llama_dir: Path, tiny_loaded: Any) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and what torch's own generate continues it with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        made = tiny_loaded.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
    return ids[0].tolist(), made[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> tuple[Path, Path]:
    """A tiny BERT as transformers writes it, and exported with what is said of its pooling."""
    root = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).eval().save_pretrained(root / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(root / "source")
    export_model(str(root / "source"), root / "fp32", task="feature-extraction", verify=False)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "normalize": True}
    (root / "fp32" / "pooling.json").write_text(json.dumps(pooling))
    return root / "source", root / "fp32"


def test_the_weights_stand_once_and_the_package_is_an_artifact(packed: Path, decoder: Path) -> None:
    assert verify_artifact(packed) == []
    graphs = [p.relative_to(packed).as_posix() for p in packed.rglob("*.onnx")]
    assert graphs == ["onnx/model.onnx"]
    size = sum(p.stat().st_size for p in (packed / "onnx").iterdir())
    assert size < 1.05 * sum(p.stat().st_size for p in decoder.glob("model.onnx*"))
    package = load_package(packed)
    assert package.task == "text-generation"
    assert [step.name for step in package.steps] == [step.name for step in load_package(decoder).steps]


def test_the_program_beside_it_says_what_torch_says(
    packed: Path, greedy: tuple[list[int], list[int]], tiny_llama_dir: Path
) -> None:
    assert len((packed / "infer.py").read_text().splitlines()) < 30
    command = [sys.executable, str(packed / "infer.py"), PROMPT, str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    assert done.stdout.split() == (PROMPT + tokenizer.decode(greedy[1])).split()
    source = (packed / "infer.py").read_text()
    assert "torch" not in source and "transformers" not in source
    assert "onnxruntime==" in (packed / "requirements.txt").read_text()
    assert "infer.py" in (packed / "Dockerfile").read_text()


@pytest.mark.slow
def test_each_line_of_the_dockerfile_does_what_it_should(
    packed: Path, greedy: tuple[list[int], list[int]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """In a fresh environment of this Python, in place of the image of the same version."""
    image, work = tmp_path / "image", tmp_path
    subprocess.run([sys.executable, "-m", "venv", str(image)], check=True, timeout=300)
    # pip's settings and proxies are the machine's; of everything else an image knows nothing.
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    alone = kept | {"PATH": f"{image / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(tmp_path)}
    done: list[str] = []
    for line in (packed / "Dockerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        done.append(word)
        if word == "FROM":
            assert rest == f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        elif word == "WORKDIR":
            work = tmp_path / rest.lstrip("/")
            work.mkdir()
        elif word == "COPY" and rest == ". .":
            shutil.copytree(packed, work, dirs_exist_ok=True)
        elif word == "COPY":
            shutil.copy(packed / rest.split()[0], work)
        elif word == "RUN":
            ran = subprocess.run(
                rest,
                shell=True,
                cwd=work,
                env=alone,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            if "connection" in ran.stderr.lower() and ran.returncode:
                pytest.skip(f"pip cannot fetch packages here: {ran.stderr[-200:]}")
            assert ran.returncode == 0, ran.stderr
        else:
            assert word == "ENTRYPOINT", f"{word} is not known to this test"
            said = subprocess.run(
                [*json.loads(rest), PROMPT, str(TOKENS)],
                cwd=work, env=alone, capture_output=True, text=True, timeout=120, check=True,
            ).stdout  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
            assert said.split() == (PROMPT + tokenizer.decode(greedy[1])).split()
    assert done == ["FROM", "WORKDIR", "COPY", "RUN", "COPY", "ENTRYPOINT"]


def test_onnxruntime_genai_generates_with_it(packed: Path, greedy: tuple[list[int], list[int]]) -> None:
    need("onnxruntime_genai")
    import onnxruntime_genai as og

    told = json.loads((packed / "genai_config.json").read_text())
    assert told["search"]["past_present_share_buffer"] is True
    model = og.Model(str(packed))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(greedy[0]) + TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([greedy[0]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    made = [int(i) for i in generator.get_sequence(0)][len(greedy[0]) :]
    assert made == greedy[1][: len(made)] and len(made) == TOKENS


def test_optimum_opens_it(packed: Path, greedy: tuple[list[int], list[int]]) -> None:
    need("optimum.onnxruntime")
    # In a process of its own: optimum warns, of its own deprecations, when it is imported.
    code = (
        "import json, sys, torch\n"
        "from optimum.onnxruntime import ORTModelForCausalLM\n"
        "model = ORTModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor([json.loads(sys.argv[2])])\n"
        "mask = torch.ones_like(ids)\n"
        "made = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)\n"
        "print(json.dumps(made[0, ids.shape[1]:].tolist()))\n"
    )
    command = [sys.executable, "-c", code, str(packed), json.dumps(greedy[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == greedy[1]


def test_sentence_transformers_opens_it(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    need("sentence_transformers")
    source, exported = encoder
    result = package_model([exported], tmp_path / "out")
    assert "sentence-transformers" in result.layouts
    code = (
        "import json, sys\n"
        "from sentence_transformers import SentenceTransformer\n"
        "options = {'provider': 'CPUExecutionProvider'}\n"
        "model = SentenceTransformer(sys.argv[1], backend='onnx', model_kwargs=options)\n"
        "print(json.dumps(model.encode(['the smith', 'the fire is kept with coal']).tolist()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    made = np.array(json.loads(done.stdout.splitlines()[-1]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.BertModel.from_pretrained(source).eval()
    batch = tokenizer(["the smith", "the fire is kept with coal"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_the_program_of_an_encoder_runs(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    package_model([encoder[1]], tmp_path / "out", layouts=["ort"])
    command = [sys.executable, str(tmp_path / "out" / "infer.py"), "the smith", "the fire is kept with coal"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "last_hidden_state (2, " in done.stdout


def test_the_program_of_a_plain_module_runs(onnx_package: Callable[..., Any], tmp_path: Path) -> None:
    onnx_package("toy (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }", "toy")
    result = package_model([tmp_path / "toy.onnx"], tmp_path / "out")
    assert list(result.layouts) == ["ort"]
    np.savez(tmp_path / "in.npz", x=np.array([[1, -1, 2, -2]], np.float32))
    command = [sys.executable, "out/infer.py", "in.npz", "out.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["y"], [[1, 0, 2, 0]])


@pytest.mark.slow
def test_transformers_js_opens_every_variant(
    decoder: Path, greedy: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    optimize_model(decoder, tmp_path / "int8", PRESETS["cpu-int8"])
    result = package_model([decoder, tmp_path / "int8"], tmp_path / "models" / "tiny")
    assert sorted(result.graphs) == ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    quiet = os.environ | {"ONNXRUNTIME_NODE_INSTALL": "skip"}
    install = [npm, "install", "--no-audit", "--no-fund", "--silent", "@huggingface/transformers@4.3.1"]
    done = subprocess.run(install, cwd=tmp_path, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install transformers.js: {done.stderr.strip()[-200:]}")
    (tmp_path / "run.mjs").write_text(
        "import { env, AutoModelForCausalLM, Tensor } from '@huggingface/transformers';\n"
        "env.allowRemoteModels = false; env.localModelPath = 'models/';\n"
        "const ids = JSON.parse(process.argv[2]).map(BigInt);\n"
        "const made = {};\n"
        "for (const dtype of ['fp32', 'q8']) {\n"
        "  const model = await AutoModelForCausalLM.from_pretrained('tiny', { dtype });\n"
        "  const input_ids = new Tensor('int64', ids, [1, ids.length]);\n"
        "  const attention_mask = new Tensor('int64', ids.map(() => 1n), [1, ids.length]);\n"
        "  const asked = { input_ids, attention_mask, max_new_tokens: 12, do_sample: false };\n"
        "  const out = await model.generate(asked);\n"
        "  made[dtype] = Array.from(out.data).slice(ids.length).map(Number);\n"
        "}\n"
        "console.log(JSON.stringify(made));\n"
    )
    command = ["node", "run.mjs", json.dumps(greedy[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["fp32"] == greedy[1]
    assert len(made["q8"]) == TOKENS


def test_variants_stand_side_by_side(decoder: Path, tmp_path: Path) -> None:
    optimize_model(decoder, tmp_path / "int8", PRESETS["cpu-int8"])
    optimize_model(decoder, tmp_path / "int4", PRESETS["cpu-int4"])
    result = package_model([tmp_path / "int4", decoder, tmp_path / "int8"], tmp_path / "out")
    assert result.graphs == ["onnx/model.onnx", "onnx/model_q4.onnx", "onnx/model_quantized.onnx"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["dtype"] == "q4"
    assert load_package(tmp_path / "out").precision == "int4"
    assert verify_artifact(tmp_path / "out") == []


def test_what_does_not_belong_together_is_refused(
    decoder: Path, encoder: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        BadInputError, match=r"a second variant in float32, as .*; expected one of each precision"
    ):
        package_model([decoder, decoder], tmp_path / "out")
    optimize_model(encoder[1], tmp_path / "half", [("to_float16", {})])
    with pytest.raises(BadInputError, match=r"other graphs, inputs or outputs; expected a variant of"):
        package_model([decoder, tmp_path / "half"], tmp_path / "out")
    with pytest.raises(
        BadInputError, match=r"layout genai: the task is feature-extraction; expected text-gen"
    ):
        package_model([encoder[1]], tmp_path / "out", layouts=["genai"])
    with pytest.raises(UnknownNameError, match=r"unknown layout 'genia'.*Did you mean 'genai'\?"):
        package_model([decoder], tmp_path / "out", layouts=["genia"])
    with pytest.raises(BadInputError, match="package: no model; expected at least one"):
        package_model([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_layout_says_why_not(onnx_package: Callable[..., Any]) -> None:
    bare = onnx_package("toy (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }", "toy")
    reasons = {name: layout.refusal(bare) for name, layout in LAYOUTS.items()}
    assert [name for name, reason in reasons.items() if not reason] == ["ort"]


def test_the_bill_of_materials_is_valid_and_the_same_each_time(
    decoder: Path, packed: Path, tmp_path: Path
) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (packed / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    entries = json.loads((packed / "manifest.json").read_text())["files"]
    hashes = {c["name"]: c["hashes"][0]["content"] for c in model["components"]}
    assert hashes == {name: e["sha256"] for name, e in entries.items() if name != "sbom.cdx.json"}
    kinds = {component["type"] for component in bill["components"]}
    assert kinds == {"data", "library"}
    package_model([decoder], tmp_path / "tiny")
    for name in ("sbom.cdx.json", "README.md", "onnx/model.onnx", "genai_config.json"):
        assert (tmp_path / "tiny" / name).read_bytes() == (packed / name).read_bytes()


def test_the_card_says_what_the_manifest_says(packed: Path) -> None:
    card = (packed / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    assert "pipeline_tag: text-generation" in head and "library_name: onnx" in head
    assert "LlamaForCausalLM" in body and "not made (--no-verify)" in body
    assert "The licence of the source is not known" in body
    source = json.loads((packed / "manifest.json").read_text())["source"]["files"][0]
    assert source["sha256"] in body


# Signatures.


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    made: dict[str, Path] = {}
    for name in ("ours", "theirs", "rsa"):
        key = rsa.generate_private_key(65537, 2048) if name == "rsa" else ed25519.Ed25519PrivateKey.generate()
        made[name] = tmp_path / f"{name}.pem"
        made[name].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        made[f"{name} public"] = tmp_path / f"{name}.pub.pem"
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        made[f"{name} public"].write_bytes(public)
    return made


@pytest.fixture
def signed(decoder: Path, keys: dict[str, Path], tmp_path: Path) -> Path:
    result = package_model([decoder], tmp_path / "signed", layouts=["ort"], sign_key=keys["ours"])
    assert result.signed_by and len(result.signed_by) == 64
    return tmp_path / "signed"


def problems(directory: Path, key: Path | None = None) -> dict[str, str]:
    return {finding.where: finding.problem for finding in verify_artifact(directory, key=key)}


def test_a_signature_holds_for_its_key_only(signed: Path, keys: dict[str, Path]) -> None:
    assert problems(signed) == problems(signed, keys["ours public"]) == {}
    assert "expected" in problems(signed, keys["theirs public"])["manifest.sig"]


def test_a_manifest_that_was_sealed_again_does_not_have_the_signature(signed: Path) -> None:
    manifest = (signed / "manifest.json").read_text()
    (signed / "manifest.json").write_text(manifest.replace('"task": "text-generation"', '"task": null'))
    assert problems(signed)["manifest.sig"] == "the signature is not of this manifest"


def test_a_signature_by_someone_else_is_no_signature_by_us(signed: Path, keys: dict[str, Path]) -> None:
    sign_artifact(signed, keys["theirs"])
    assert problems(signed) == {}
    assert problems(signed, keys["ours public"])["manifest.sig"].startswith("signed by ")


def test_a_missing_signature_is_found_where_one_is_expected(signed: Path, keys: dict[str, Path]) -> None:
    (signed / "manifest.sig").unlink()
    assert problems(signed) == {}
    assert "there is no signature" in problems(signed, keys["ours public"])["manifest.sig"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"algorithm": "rsa", "signed": "manifest.json"}'])
def test_what_is_no_signature_is_refused(signed: Path, content: str) -> None:
    (signed / "manifest.sig").write_text(content)
    with pytest.raises(ModelFileError, match=r"manifest\.sig: cannot be read: .*; expected a signature"):
        verify_artifact(signed)


def test_a_key_that_is_none_is_refused(decoder: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        tmp_path / "gone.pem": "cannot be read: No such file",
        keys["rsa"]: "expected an Ed25519 private key.*openssl genpkey -algorithm ed25519",
        keys["ours public"]: "expected an Ed25519 private key in PEM",
    }
    for path, message in cases.items():
        with pytest.raises(BadInputError, match=message):
            package_model([decoder], tmp_path / "out", layouts=["ort"], sign_key=path)
        assert not (tmp_path / "out").exists()
