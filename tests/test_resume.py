"""Runs that are killed at any point go on where they were, and make what they would have made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY_TEXT

from onnxsmith import Recipe, run_recipe, verify_artifact
from onnxsmith.errors import DestinationError
from onnxsmith.package_io import RECORD_NAMES
from onnxsmith.pipeline import variant_making
from onnxsmith.pipeline.run_steps import user_cache
from onnxsmith.pipeline.step_cache import StepCache

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Kills this process, for good and without a word, at a point that stands in KILL: before or after one of its
# renames (steps go into the cache by one, and the artifact into its place), or when a step begins or ends.
DRIVER = """
import contextlib, os, signal, sys
from pathlib import Path
from onnxsmith.pipeline import cli, console
from onnxsmith.progress import Progress

kind, _, what = os.environ["KILL"].partition(" ")
renames = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(Progress):
    @contextlib.contextmanager
    def step(self, name, total=None):
        if (kind, what) == ("step", name):
            die()
        with super().step(name, total) as step:
            yield step
        if (kind, what) == ("after", name):
            die()

def rename(path, target, real=Path.rename):
    global renames
    renames += 1
    if (kind, what) == ("before-rename", str(renames)):
        die()
    result = real(path, target)
    if (kind, what) == ("after-rename", str(renames)):
        die()
    return result

Path.rename = rename
console.progress_for = lambda stream=None: Deadly()
sys.argv = ["onnxsmith", "run", "recipe.json", "-o", "out", *sys.argv[1:]]
cli.main()
"""


def recipe_of(source: Path, **changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "schema_version": 1,
        "name": "tiny",
        "source": str(source),
        "variants": [
            {"name": "fp32", "preset": "cpu-fp32"},
            {"name": "gptq", "passes": ["cleanup", {"quantize_weights": {"bits": 4, "method": "gptq"}}]},
        ],
        "calibration": {"data": "calibration.txt", "samples": 4, "tokens": 32},
        "evaluation": {
            "perplexity": {"data": "text.txt", "window": 32},
            "benchmark": {"prompt_tokens": 8, "new_tokens": 4, "runs": 1},
        },
        "prompt": "the smith",
    }
    return Recipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def work(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    (directory / "text.txt").write_text(TINY_TEXT * 3)
    (directory / "calibration.txt").write_text(TINY_TEXT[::-1] * 3)
    (directory / "recipe.json").write_text(recipe_of(tiny_llama_dir).model_dump_json())
    return directory


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[str, str]:
    """What a run makes that nobody ends, and that uses no cache."""
    plain = Recipe.model_validate_json((work / "recipe.json").read_text())
    assert run_recipe(plain, work / "whole", base=work).passed
    return contents(work / "whole")


def contents(directory: Path) -> dict[str, str]:
    """Hashes of everything but what is of one run alone."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in RECORD_NAMES
    }


def run_child(directory: Path, home: Path, kill: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ONNXSMITH_HOME": str(home), "ONNXSMITH_CACHE_SIZE": "1GB", "KILL": kill}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kills",
    [
        # Each start is killed a little later than the one before it.
        pytest.param(["after export", "before-rename 2", "after-rename 1", "step check"], id="early"),
        pytest.param(["step benchmark", "after benchmark", "after pack"], id="late", marks=pytest.mark.slow),
        pytest.param(
            ["before-rename 1", "after-rename 1", "step variants", "after variants", "after reference"],
            id="every step",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [f"{when}-rename {number}" for number in range(1, 9) for when in ("before", "after")],
            id="every rename",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_goes_on(work: Path, whole: dict[str, str], tmp_path: Path, kills: list[str]) -> None:
    for name in ("text.txt", "calibration.txt", "recipe.json"):
        shutil.copy(work / name, tmp_path)
    killed = 0
    for kill in kills:
        child = run_child(tmp_path, tmp_path / "home", kill, "--resume")
        assert child.returncode in (0, -signal.SIGKILL), child.stderr
        killed += child.returncode == -signal.SIGKILL
        # Whatever was there when it was killed, it is the whole artifact or nothing.
        assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == whole
    assert killed >= min(len(kills), 3)
    child = run_child(tmp_path, tmp_path / "home", "", "--resume")
    assert child.returncode == 0, child.stderr
    assert contents(tmp_path / "out") == whole
    assert verify_artifact(tmp_path / "out") == []
    # Nothing of the killed ones is left beside it.
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_was_finished_is_not_done_again(
    work: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith import exporters

    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "1GB")
    recipe = Recipe.model_validate_json((work / "recipe.json").read_text())
    first = run_recipe(recipe, tmp_path / "one", base=work, cache=user_cache())
    assert contents(tmp_path / "one") == whole
    assert all(variant.from_cache == [] for variant in first.variants)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(exporters, "load_torch", never)
        resumed = run_recipe(recipe, tmp_path / "two", base=work, cache=user_cache(), resume=True)
    assert contents(tmp_path / "two") == whole
    assert all(variant.from_cache == ["made", "checked", "timed"] for variant in resumed.variants)
    assert [v.bench for v in resumed.variants] == [v.bench for v in first.variants]
    assert resumed.reference == first.reference
    assert [step.note for step in resumed.steps if step.name == "export"] == [
        "GroupQueryAttention, from the cache"
    ]

    # Without --resume, how fast it is now is measured now.
    again = run_recipe(recipe, tmp_path / "three", base=work, cache=user_cache())
    assert contents(tmp_path / "three") == whole
    assert all(variant.from_cache == ["made", "checked"] for variant in again.variants)
    assert [v.bench for v in again.variants] != [v.bench for v in first.variants]


def test_an_artifact_that_is_there_is_kept_if_it_is_the_same(
    work: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    cache = StepCache(tmp_path / "cache")
    recipe = recipe_of(tiny_llama_dir, evaluation={"benchmark": None}, calibration=None, variants=[
        {"name": "fp32", "preset": "cpu-fp32"}])  # fmt: skip
    run_recipe(recipe, tmp_path / "out", base=work, cache=cache)
    before = (tmp_path / "out" / "records.json").read_bytes()
    assert run_recipe(recipe, tmp_path / "out", base=work, cache=cache, resume=True).passed
    assert (tmp_path / "out" / "records.json").read_bytes() == before
    with pytest.raises(DestinationError, match="an artifact is already there"):
        run_recipe(recipe, tmp_path / "out", base=work, cache=cache)
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(DestinationError, match="an artifact is already there"):
        run_recipe(other, tmp_path / "out", base=work, cache=cache, resume=True)
    assert verify_artifact(tmp_path / "out") == []


def test_the_cache_does_not_share_files_with_artifacts(
    work: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    cache = StepCache(tmp_path / "cache")
    recipe = recipe_of(tiny_llama_dir, evaluation={"benchmark": None}, calibration=None, variants=[
        {"name": "fp32", "preset": "cpu-fp32"}])  # fmt: skip
    run_recipe(recipe, tmp_path / "one", base=work, cache=cache)
    with (tmp_path / "one" / "model.onnx").open("r+b") as stream:
        stream.write(b"overwritten in place")
    report = run_recipe(recipe, tmp_path / "two", base=work, cache=cache)
    assert report.variants[0].from_cache == ["made", "checked"]
    assert verify_artifact(tmp_path / "two") == []


def test_other_inputs_are_not_taken_from_the_cache(work: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Each change is seen by the steps that it decides, and by no others."""
    source = shutil.copytree(tiny_llama_dir, tmp_path / "source")
    (tmp_path / "text.txt").write_text(TINY_TEXT * 3)
    (tmp_path / "calibration.txt").write_text(TINY_TEXT[::-1] * 3)
    cache = StepCache(tmp_path / "cache")

    def run(output: str, **changes: Any) -> list[list[str]]:
        recipe = recipe_of(source, **changes)
        recipe = recipe.model_copy(
            update={"evaluation": recipe.evaluation.model_copy(update={"benchmark": None})}
        )
        return [
            v.from_cache for v in run_recipe(recipe, tmp_path / output, base=tmp_path, cache=cache).variants
        ]

    assert run("first") == [[], []]
    # Names and budgets decide what is made of it, and not what it is.
    assert run("same", name="other", budgets={"size_mb": 1000}) == [["made", "checked"]] * 2
    (tmp_path / "calibration.txt").write_text(TINY_TEXT[::-1] * 2 + "x")
    # What looks at calibration data is in the second variant; the address of both has them.
    assert run("calibration") == [[], []]
    (tmp_path / "text.txt").write_text(TINY_TEXT * 2)
    assert run("text", seed=5) == [["made"], ["made"]]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert run("config") == [[], []]


def test_it_makes_no_difference_what_was_kept_on_the_way(
    work: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass is kept, and its result read again before the next one."""
    monkeypatch.setattr(variant_making, "WORTH_KEEPING_S", 0.0)
    recipe = Recipe.model_validate_json((work / "recipe.json").read_text())
    # What takes longer to store than to make is not kept.
    monkeypatch.setattr(variant_making, "KEPT_BYTES_PER_S", 1.0)
    cache = StepCache(tmp_path / "dear")
    run_recipe(recipe, tmp_path / "dear-out", base=work, cache=cache)
    assert "passes" not in {entry.kind for entry in cache.entries()}
    monkeypatch.setattr(variant_making, "KEPT_BYTES_PER_S", math.inf)
    cache = StepCache(tmp_path / "cache")
    run_recipe(recipe, tmp_path / "out", base=work, cache=cache)
    assert contents(tmp_path / "out") == whole
    kept = [entry for entry in cache.entries() if entry.kind == "passes"]
    assert len(kept) >= 3
    # Of the variants only what was kept of their first passes is left.
    cache = StepCache(tmp_path / "cache")
    for entry in cache.entries():
        if entry.kind not in ("passes", "export"):
            shutil.rmtree(entry.directory)
    report = run_recipe(recipe, tmp_path / "again", base=work, cache=cache)
    assert contents(tmp_path / "again") == whole
    assert all(variant.from_cache == [] for variant in report.variants)


@pytest.mark.slow
def test_damage_in_the_cache_is_mended_on_the_way(work: Path, whole: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json((work / "recipe.json").read_text())
    cache = StepCache(tmp_path / "cache")
    run_recipe(recipe, tmp_path / "one", base=work, cache=cache)
    for entry in cache.entries():
        path = max((p for p in entry.directory.iterdir()), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    report = run_recipe(recipe, tmp_path / "two", base=work, cache=cache, resume=True)
    assert contents(tmp_path / "two") == whole
    assert all(variant.from_cache == [] for variant in report.variants)


@pytest.mark.slow
def test_two_runs_side_by_side_do_not_disturb_each_other(
    work: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    environment = os.environ | {
        "ONNXSMITH_HOME": str(tmp_path / "home"), "ONNXSMITH_CACHE_SIZE": "1GB", "KILL": "",
    }  # fmt: skip
    directories = [tmp_path / "a", tmp_path / "b"]
    children = []
    for directory in directories:
        directory.mkdir()
        for name in ("text.txt", "calibration.txt", "recipe.json"):
            shutil.copy(work / name, directory)
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER], cwd=directory, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for child in children:
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    assert contents(directories[0] / "out") == contents(directories[1] / "out") == whole
    cache = StepCache(tmp_path / "home" / "cache")
    assert not list((cache.root / "tmp").iterdir())
    assert "damaged" not in {entry.kind for entry in cache.entries()}


FACTORY = """
import torch
import {beside}


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), {beside}.Scaled()), torch.randn(2, 8)
"""
BESIDE = """
import torch


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * 2.0
"""


def test_a_factory_is_known_by_its_weights_and_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the same throughout; the second change is in a module that the factory imports."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cache = StepCache(tmp_path / "cache")

    def run(output: str, factory: str, beside: str) -> list[str]:
        for name, text in (("resumed_factory", factory), ("beside_the_factory", beside)):
            (tmp_path / f"{name}.py").write_text(text.format(beside="beside_the_factory"))
            sys.modules.pop(name, None)
        recipe = Recipe.model_validate(
            {
                "schema_version": 1,
                "name": "toy",
                "source": "resumed_factory:make",
                "variants": [{"name": "fp32", "preset": "clean"}],
                "evaluation": {"benchmark": None},
            }
        )
        return run_recipe(recipe, tmp_path / output, cache=cache).variants[0].from_cache

    assert run("first", FACTORY, BESIDE) == []
    assert run("same", FACTORY, BESIDE) == ["made", "checked"]
    assert contents(tmp_path / "same") == contents(tmp_path / "first")
    assert run("factory", FACTORY + "\n# other code\n", BESIDE) == []
    assert run("beside", FACTORY, BESIDE.replace("2.0", "3.0")) == []
    # What it computes is another thing, and so is the artifact.
    assert contents(tmp_path / "beside")["model.onnx"] != contents(tmp_path / "first")["model.onnx"]
