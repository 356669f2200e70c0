"""The documents: examples run, commands parse, links lead somewhere, tables say what the code says.

An example is a fenced block after a comment `<!-- example: NAME; file: FILE -->`. All files of one example go
to one directory, and its `check.py` is run there.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pydantic
import pytest
import typer.main

import onnxsmith
from onnxsmith.comparison import TOLERANCES
from onnxsmith.exporters.loading import TASKS
from onnxsmith.graph_passes import PASSES
from onnxsmith.pipeline.artifact import FileEntry, Manifest, StepEntry
from onnxsmith.pipeline.batch_jobs import BatchSpec, JobSpec, load_batch
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.recipe import Recipe, load_recipe
from onnxsmith.runtime.providers import PROVIDERS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
TEXTS = [*DOCUMENTS, *sorted((ROOT / "examples").glob("*.*")), *sorted((ROOT / "benchmarks").glob("*.py"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")

EXAMPLE = re.compile(
    r"<!-- example: ([\w-]+); file: ([\w.]+) -->\n```(?:python|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
URL = re.compile(r"https?://[^\s)>'\"]+")
HOSTS = {
    "download.pytorch.org",
    "github.com",
    "keepachangelog.com",
    "onnxruntime.ai",
    "reproducible-builds.org",
    "semver.org",
    "www.w3.org",
    "arxiv.org",
}
# Paths of one machine, and notes to oneself.
FORBIDDEN = re.compile(r"/work/|/root/|/home/|/tmp/|shared/|localhost|127\.0\.0\.1|\bproxy\b|TODO|FIXME|XXX")


def _examples() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        matches = EXAMPLE.findall(text)
        assert len(matches) == text.count("<!-- example:"), f"{path.name}: a marker without its block"
        for name, file, content in matches:
            assert file not in found[name], f"{name}: two files {file}"
            found[name][file] = content
    return found


EXAMPLES = _examples()


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_all_examples_are_found() -> None:
    expected = {"readme", "pipeline", "add-a-pass", "add-a-task", "add-a-source", "add-a-backend"}
    assert set(EXAMPLES) == expected
    for name, files in EXAMPLES.items():
        assert "check.py" in files, f"{name} has no check.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in ("add-a-pass", "add-a-backend"):
        pytest.importorskip("torch")
    for file, content in EXAMPLES[name].items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    if name == "pipeline":
        # It goes on with the model of the example before it.
        (tmp_path / "my_model.py").write_text(EXAMPLES["readme"]["my_model.py"], encoding="utf-8")
    if name == "add-a-pass":
        _install(tmp_path, EXAMPLES[name]["pyproject.toml"])
    if name == "add-a-task":
        added = eval(EXAMPLES[name]["tasks.py"])
        monkeypatch.setattr("onnxsmith.exporters.loading.TASKS", {**TASKS, **added})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        left = runpy.run_path("check.py")
    finally:
        for module in set(sys.modules) - before:
            file = getattr(sys.modules[module], "__file__", None)
            if file and Path(file).parent == tmp_path:
                del sys.modules[module]
    if name == "pipeline":
        assert left["report"].passed and left["report"].chosen == "int8"
        assert (tmp_path / "artifact" / "report.html").is_file()
    if name == "readme":
        assert left["result"].passed
        assert left["result"].tolerance == TOLERANCES["int8"]
        assert sum(t.count for t in left["result"].tensors) > 0


def test_a_failing_example_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = EXAMPLES["add-a-pass"]
    spoilt = files["remove_dropout.py"].replace("changes.count += 1", "pass")
    assert spoilt != files["remove_dropout.py"]
    monkeypatch.setitem(EXAMPLES, "add-a-pass", {**files, "remove_dropout.py": spoilt})
    with pytest.raises(AssertionError):
        test_example("add-a-pass", tmp_path, monkeypatch)


def _install(directory: Path, project: str) -> None:
    """What pip does with entry points."""
    groups = tomllib.loads(project)["project"]["entry-points"]
    info = directory / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for language, content in FENCE.findall(path.read_text(encoding="utf-8")):
            if language not in ("console", "bash", "sh"):
                continue
            lines = content.replace("\\\n", " ").splitlines()
            found += [(path.name, line.strip()) for line in lines if line.strip().startswith("onnxsmith")]
    return found


@pytest.mark.parametrize(("document", "line"), _commands())
def test_command_parses(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    group = typing.cast(Any, typer.main.get_command(app))
    assert words[1] in group.commands, f"{document}: no command {words[1]!r}"
    command = group.commands[words[1]]
    command.make_context(words[1], words[2:])


def test_a_wrong_command_is_found() -> None:
    group = typing.cast(Any, typer.main.get_command(app))
    with pytest.raises(Exception, match="No such option"):
        group.commands["bench"].make_context("bench", ["model", "--promt-tokens", "4"])


def test_every_command_is_in_the_readme() -> None:
    group = typing.cast(Any, typer.main.get_command(app))
    shown = {shlex.split(line, comments=True)[1] for document, line in _commands() if document == "README.md"}
    assert shown == set(group.commands)


def _row(title: str) -> list[set[str]]:
    line = next(line for line in README.splitlines() if line.startswith(f"| {title} |"))
    return [set(re.findall(r"`([^`]+)`", cell)) for cell in line.strip("|").split("|")[1:]]


def test_the_readme_names_what_exists() -> None:
    run, untried, absent = _row("Tasks")
    assert run | untried == set(TASKS)
    run, untried, _ = _row("Passes")
    assert run | untried == set(PASSES)
    run, untried, _ = _row("Execution providers")
    assert run | untried == set(PROVIDERS)
    assert not absent


def test_what_the_readme_calls_missing_is_missing() -> None:
    group = typing.cast(Any, typer.main.get_command(app))
    *_, absent = _row("Commands")
    assert not absent & set(group.commands)
    options = {option for p in group.commands["run"].params for option in p.opts}
    assert ("run --resume" in absent) == ("--resume" not in options)


def test_public_names_in_documents_exist() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for names in re.findall(r"^from onnxsmith import ([\w, ]+)$", text, re.MULTILINE):
            for name in names.split(","):
                assert name.strip() in onnxsmith.__all__, f"{path.name}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if urlparse(target).scheme:
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in _anchors(linked), f"{path.name}: {target}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=ids(TEXTS))
def test_nothing_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not FORBIDDEN.findall(text)
    for url in URL.findall(text):
        assert urlparse(url).hostname in HOSTS, url


def _section(document: str, heading: str) -> dict[str, list[str]]:
    """The table below a heading: key to the cells after it."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert f"\n## {heading}\n" in text, f"{document}: no heading {heading}"
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", part, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows}


def _models(model: type[pydantic.BaseModel], path: str) -> dict[str, type[pydantic.BaseModel]]:
    found = {path: model}
    for name, field in model.model_fields.items():
        for part in (field.annotation, *_parts(field.annotation)):
            if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
                found |= _models(part, f"{path}.{name}".removeprefix("The recipe."))
    return found


def _parts(annotation: Any) -> list[Any]:
    return [inner for part in typing.get_args(annotation) for inner in (part, *_parts(part))]


RECIPE_MODELS = _models(Recipe, "The recipe")


@pytest.mark.parametrize(("heading", "model"), [("The list", BatchSpec), ("A job", JobSpec)])
def test_batch_keys_are_documented(heading: str, model: type[pydantic.BaseModel]) -> None:
    assert list(_section("batch.md", heading)) == list(model.model_fields)


@pytest.mark.parametrize("path", RECIPE_MODELS)
def test_recipe_keys_are_documented(path: str) -> None:
    heading = path if path == "The recipe" else f"`{path}`"
    rows, fields = _section("recipes.md", heading), RECIPE_MODELS[path].model_fields
    assert list(rows) == list(fields)
    for name, field in fields.items():
        shown = rows[name][0].strip("`")
        if field.is_required():
            assert shown == "required", name
        elif isinstance(field.default, pydantic.BaseModel):
            assert shown == "its defaults", name
        elif field.default is None:
            assert shown == "none", name
        else:
            expected = field.default if isinstance(field.default, str) else json.dumps(field.default)
            assert shown == expected, name


def test_recipes_in_documents_are_valid(tmp_path: Path) -> None:
    blocks = [
        content
        for path in DOCUMENTS
        for language, content in FENCE.findall(path.read_text(encoding="utf-8"))
        if language == "yaml"
    ]
    assert blocks
    for number, content in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content, encoding="utf-8")
        if "\njobs:" in content:
            assert load_batch(path).jobs
            continue
        recipe = load_recipe(path)
        assert all(variant.specs() for variant in recipe.variants)


@pytest.mark.parametrize(
    ("heading", "model"),
    [("The manifest", Manifest), ("`files`", FileEntry), ("`steps`", StepEntry)],
    ids=["manifest", "files", "steps"],
)
def test_manifest_fields_are_documented(heading: str, model: type[pydantic.BaseModel]) -> None:
    assert list(_section("artifact.md", heading)) == list(model.model_fields)


def test_tolerances_are_documented() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    part = text.split("\n### Tolerances\n")[1].split("\n## ")[0]
    shown = {
        precision: tuple(float(cell) if cell.strip() else None for cell in cells.split("|"))
        for precision, cells in re.findall(r"^\| (\w+) \|([^|]*\|[^|]*\|[^|]*)\|$", part, re.MULTILINE)
        if precision != "precision"
    }
    assert shown == {name: (t.atol, t.rtol, t.min_cosine) for name, t in TOLERANCES.items()}


@pytest.mark.slow
def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "reference.py"), str(tmp_path), "onnxsmith"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "onnxsmith.html").read_text(encoding="utf-8")
    # Names alone are no reference.
    assert "Does everything that a recipe asks for" in page and "ResourceError" in page
