"""The same recipe twice gives the same bytes, and the few files that differ are known and still verified."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY_TEXT

from onnxsmith import Recipe, package_model, run_recipe, verify_artifact
from onnxsmith.errors import BadInputError, ModelFileError
from onnxsmith.package_io import RECORD_NAMES
from onnxsmith.pipeline.records import created_at

pytest.importorskip("torch")
pytest.importorskip("transformers")


def recipe_of(source: Path, **evaluation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema_version": 1,
            "name": "tiny",
            "source": str(source),
            "variants": [{"name": "fp32", "preset": "cpu-fp32"}, {"name": "int4", "preset": "cpu-int4"}],
            "evaluation": {"perplexity": {"data": "text.txt", "window": 32}, "benchmark": None} | evaluation,
            "prompt": "the smith",
        }
    )


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def differing(one: Path, two: Path) -> set[str]:
    first, second = contents(one), contents(two)
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("twice")
    (directory / "text.txt").write_text(TINY_TEXT * 3)
    return directory


@pytest.fixture(scope="module")
def twice(tiny_llama_dir: Path, work: Path) -> tuple[Path, Path]:
    recipe = recipe_of(tiny_llama_dir, benchmark={"prompt_tokens": 8, "new_tokens": 4, "runs": 1})
    for name in ("one", "two"):
        run_recipe(recipe, work / name, base=work)
    return work / "one", work / "two"


def test_only_the_records_of_two_runs_differ(twice: tuple[Path, Path]) -> None:
    # That they do differ shows that this compares two runs, and that times are in them.
    assert differing(*twice) == RECORD_NAMES
    assert {"model.onnx", "manifest.json", "README.md", "sbom.cdx.json"} <= contents(twice[0]).keys()


def test_packages_of_two_runs_are_the_same(twice: tuple[Path, Path], tmp_path: Path) -> None:
    for number, artifact in enumerate(twice):
        package_model([artifact], tmp_path / str(number) / "package")
    assert differing(tmp_path / "0" / "package", tmp_path / "1" / "package") == set()
    assert not RECORD_NAMES & contents(tmp_path / "0" / "package").keys()


def test_without_times_everything_is_the_same(
    tiny_llama_dir: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_recipe(recipe_of(tiny_llama_dir), Path("out"), base=work)
    assert differing(tmp_path / "a" / "out", tmp_path / "b" / "out") == set()
    assert (
        json.loads((tmp_path / "a" / "out" / "report.json").read_text())["created"] == "2023-11-14T22:13:20Z"
    )
    assert verify_artifact(tmp_path / "a" / "out") == []
    # The control: another input is seen in the bytes.
    (tmp_path / "text.txt").write_text(TINY_TEXT * 2)
    run_recipe(recipe_of(tiny_llama_dir), Path("other"), base=tmp_path)
    assert "manifest.json" in differing(tmp_path / "b" / "out", tmp_path / "b" / "other")


@pytest.mark.parametrize("text", ["soon", "-1", "1e9", "99999999999999"])
def test_a_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(BadInputError, match=r"SOURCE_DATE_EPOCH: .*; expected seconds since 1970-01-01"):
        created_at()


def _append(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes() + b" ")


def _edit_records(directory: Path) -> None:
    path = directory / "records.json"
    path.write_text(path.read_text().replace('"created": "20', '"created": "19'))


def _reseal_records(directory: Path) -> None:
    """As someone would who swaps the report and knows how the hash of the records is made."""
    path = directory / "records.json"
    plain = json.loads(path.read_text())
    plain["manifest_sha256"] = "0" * 64
    del plain["content_sha256"]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(plain | {"content_sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize(
    ("change", "where", "problem"),
    [
        (_append("report.html"), "report.html", "bytes; expected"),
        (lambda d: (d / "report.json").unlink(), "report.json", "it is missing"),
        (lambda d: (d / "records.json").unlink(), "records.json", "it is missing"),
        (_edit_records, "records.json", "it was edited"),
        (_reseal_records, "records.json", "it is of another manifest"),
        (_append("manifest.json"), "records.json", "it is of another manifest"),
        (lambda d: (d / "report2.json").write_text("{}"), "report2.json", "it is not in the manifest"),
    ],
)
def test_records_are_verified_too(
    twice: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], object], where: str, problem: str
) -> None:
    shutil.copytree(twice[0], tmp_path / "copy")
    assert verify_artifact(tmp_path / "copy") == []
    change(tmp_path / "copy")
    findings = {finding.where: finding.problem for finding in verify_artifact(tmp_path / "copy")}
    assert problem in findings[where]


def test_a_changed_byte_of_a_report_is_found(twice: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(twice[0], tmp_path / "copy")
    report = tmp_path / "copy" / "report.html"
    content = bytearray(report.read_bytes())
    content[len(content) // 2] ^= 1
    report.write_bytes(content)
    (finding,) = verify_artifact(tmp_path / "copy")
    assert (finding.where, finding.problem) == ("report.html", "its content was changed (SHA-256 differs)")


def test_records_that_are_none_are_refused(twice: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(twice[0], tmp_path / "copy")
    (tmp_path / "copy" / "records.json").write_text("[]")
    with pytest.raises(ModelFileError, match=r"cannot be read: .*; expected records of schema version 1"):
        verify_artifact(tmp_path / "copy")


def test_a_package_has_no_place_for_records(twice: tuple[Path, Path], tmp_path: Path) -> None:
    package_model([twice[0]], tmp_path / "package")
    shutil.copy(twice[0] / "report.html", tmp_path / "package")
    (finding,) = verify_artifact(tmp_path / "package")
    assert (finding.where, finding.problem) == ("report.html", "it is not in the manifest")
