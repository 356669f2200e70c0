"""Searching under budgets, on a tiny Llama with the real Optuna: choice, early ends, resuming, workers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import TINY_TEXT, heed_interrupts

from onnxsmith import Recipe, load_recipe, run_recipe, tune_recipe, verify_artifact
from onnxsmith.errors import BadInputError, DestinationError, OnnxsmithError
from onnxsmith.pipeline.tuning import TuneResult

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optuna")

PASSES: list[Any] = [
    "transpose_weights",
    "cleanup",
    "fuse_transformer",
    {
        "one_of": {
            "float": [],
            "blocks": [
                {
                    "quantize_weights": {
                        "bits": {"choices": [4, 8]},
                        "block_size": {"choices": [16, 32]},
                        "half_scales": True,
                    }
                }
            ],
        }
    },
    "lower_opset",
    "lower_ir_version",
]


def plain_recipe(directory: Path, **changes: Any) -> dict[str, Any]:
    """Five points: float, and 4 or 8 bits in blocks of 16 or 32."""
    tune = {"passes": PASSES} | changes.pop("tune", {})
    plain: dict[str, Any] = {
        "schema_version": 1,
        "name": "tiny",
        "source": str(directory),
        "evaluation": {
            "comparison": {"samples": 1},
            "perplexity": {"data": "text.txt", "window": 16, "max_tokens": 512},
            "benchmark": None,
        },
        "budgets": {"kl_to_reference": 0.01},
        "tune": tune,
    }
    return plain | changes


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TINY_TEXT * 3)
    return tmp_path


def tuned(plain: dict[str, Any], work: Path, **options: Any) -> TuneResult:
    return tune_recipe(Recipe.model_validate(plain), work / "out", base=work, **options)


def trials_of(result: TuneResult) -> dict[str, dict[str, Any]]:
    """By what was chosen."""
    return {
        " ".join(str(value) for value in trial["parameters"].values()): trial
        for trial in result.tuning["trials"]
    }


@pytest.fixture(scope="module")
def first(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, Path]:
    """All five points, measured to the end, and the artifact of the best one."""
    work = tmp_path_factory.mktemp("first")
    (work / "text.txt").write_text(TINY_TEXT * 3)
    plain = plain_recipe(tiny_llama_dir, tune={"prune": False})
    return tuned(plain, work, command="onnxsmith tune tiny.yaml"), work


@pytest.fixture
def known(first: tuple[TuneResult, Path], tmp_path: Path) -> Path:
    """A directory in which all points were measured already, and nothing else is known."""
    (tmp_path / "text.txt").write_text(TINY_TEXT * 3)
    shutil.copytree(first[1] / "out.tune" / "measurements", tmp_path / "out.tune" / "measurements")
    return tmp_path


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("something was measured again")


def test_the_smallest_point_that_keeps_the_budget_is_chosen_and_packed(
    first: tuple[TuneResult, Path],
) -> None:
    result, work = first
    assert result.passed, result.verdict
    trials = trials_of(result)
    # Few points are all tried.
    assert result.tuning["sampler"] == "grid" and set(trials) == {
        "float", "blocks 4 16", "blocks 4 32", "blocks 8 16", "blocks 8 32",
    }  # fmt: skip
    losses = {name: trial["values"]["kl_to_reference"] for name, trial in trials.items()}
    assert losses["float"] < 1e-6 < losses["blocks 8 32"] < 0.01 < losses["blocks 4 32"]
    sizes = {name: trial["values"]["size_mb"] for name, trial in trials.items()}
    assert sizes["blocks 4 32"] < sizes["blocks 4 16"] < sizes["blocks 8 32"] < sizes["float"]
    assert {name for name, trial in trials.items() if trial["feasible"]} == {
        "float", "blocks 8 16", "blocks 8 32"
    }  # fmt: skip
    assert [name for name, trial in trials.items() if trial["chosen"]] == ["blocks 8 32"]
    for name, trial in trials.items():
        beaten = any(sizes[o] <= sizes[name] and losses[o] < losses[name] for o in trials)
        beaten |= any(sizes[o] < sizes[name] and losses[o] <= losses[name] for o in trials)
        assert trial["front"] == (not beaten), name
    assert verify_artifact(work / "out") == []
    report = json.loads((work / "out" / "report.json").read_text())
    assert report["tuning"]["chosen"] == result.tuning["chosen"] and report["passed"]
    page = (work / "out" / "report.html").read_text()
    assert 'id="tuning"' in page and result.tuning["why"].split(":")[0] in page


def test_the_result_is_judged_on_what_the_search_did_not_see(first: tuple[TuneResult, Path]) -> None:
    result, work = first
    assert result.report is not None
    plain = load_recipe(work / "out.tune" / "recipe.yaml")
    assert plain.evaluation.perplexity is not None and plain.evaluation.perplexity.share == (0.5, 1.0)
    assert plain.tune is None and [variant.name for variant in plain.variants] == ["tuned"]
    searched = result.tuning["reference"]["perplexity"]
    judged = result.report["reference"]["perplexity"]
    assert abs(searched["windows"] - judged["windows"]) <= 1
    assert searched["value"] != judged["value"]


def test_the_plain_recipe_makes_the_same_bytes(first: tuple[TuneResult, Path], tmp_path: Path) -> None:
    _, work = first
    again = run_recipe(
        load_recipe(work / "out.tune" / "recipe.yaml"), tmp_path / "again", base=work / "out.tune"
    )
    assert again.passed
    for name in ("model.onnx", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (work / "out" / name).read_bytes()


def test_a_second_run_measures_nothing(
    first: tuple[TuneResult, Path], tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, work = first
    assert before.measured > 10
    made = (work / "out" / "manifest.json").read_bytes()
    for name in ("tuning_training.prepare", "tuning.run_recipe"):
        monkeypatch.setattr(f"onnxsmith.pipeline.{name}", refuse)
    again = tuned(plain_recipe(tiny_llama_dir, tune={"prune": False}), work)
    assert again.measured == 0 and again.tuning["measured"] == 0
    assert again.passed and again.report == before.report
    assert [t["values"] for t in again.tuning["trials"]] == [t["values"] for t in before.tuning["trials"]]
    assert (work / "out" / "manifest.json").read_bytes() == made


def test_another_search_finds_what_was_measured(
    known: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxsmith.pipeline.tuning_training.prepare", refuse)
    plain = plain_recipe(tiny_llama_dir, tune={"prune": False, "sampler": "random", "trials": 4})
    monkeypatch.setattr("onnxsmith.pipeline.tuning._Search.judge", lambda *_, **__: {"passed": True})
    result = tuned(plain, known)
    assert result.measured == 0 and result.tuning["reused"] == 3 * 4
    # A library in another version may give another result: then all is measured again.
    changed = {"versions": {"onnxruntime": "0"}, "machine": {}}
    monkeypatch.setattr("onnxsmith.pipeline.tuning.measuring_environment", lambda: changed)
    with pytest.raises(AssertionError, match="measured again"):
        tuned(plain, known)


def test_what_cannot_win_ends_early(
    known: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxsmith.pipeline.tuning._Search.judge", lambda *_, **__: {"passed": True})
    result = tuned(plain_recipe(tiny_llama_dir, budgets={"kl_to_reference": 0.01, "size_mb": 0.09}), known)
    trials = trials_of(result)
    size = trials["float"]["values"]["size_mb"]
    assert 0.09 < size < 0.12 and f"size_mb is {size:.4g}; expected at most 0.09" in trials["float"]["reason"]
    # Size comes first: nothing else was measured.
    assert trials["float"]["state"] == "stopped" and set(trials["float"]["values"]) == {"size_mb"}
    assert trials["blocks 8 16"]["feasible"] and trials["blocks 8 32"]["chosen"]
    assert trials["blocks 4 32"]["state"] in ("stopped", "complete") and not trials["blocks 4 32"]["feasible"]


def test_a_point_that_is_no_smaller_than_the_best_ends_early(
    known: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxsmith.pipeline.tuning._Search.judge", lambda *_, **__: {"passed": True})
    result = tuned(plain_recipe(tiny_llama_dir, budgets={}), known)
    trials = trials_of(result)
    assert trials["blocks 4 32"]["chosen"] and trials["blocks 8 16"]["state"] == "stopped"
    best = trials["blocks 4 32"]["values"]["size_mb"]
    assert f"a point that keeps the budgets has {best:.4g}" in trials["blocks 8 16"]["reason"]


def test_a_damaged_study_is_named_and_what_was_measured_stays(known: Path, tiny_llama_dir: Path) -> None:
    (known / "out.tune" / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(DestinationError, match=r"study\.db: SQLite says: file is not a database; .*Remove"):
        tuned(plain_recipe(tiny_llama_dir), known)
    (known / "out.tune" / "study.db").unlink()
    assert tuned(plain_recipe(tiny_llama_dir), known).passed


def test_without_data_nothing_is_said_to_be_held_out(first: tuple[TuneResult, Path]) -> None:
    result, _ = first
    assert result.verdict.endswith("It holds on held-out data") and result.report is not None
    unscored = dict(result.report) | {"recipe": {"evaluation": {"perplexity": None, "task": None}}}
    assert dataclasses.replace(result, report=unscored).verdict.endswith("It holds when measured again")


def test_budgets_that_no_point_keeps_are_a_failure_with_reasons(known: Path, tiny_llama_dir: Path) -> None:
    result = tuned(plain_recipe(tiny_llama_dir, budgets={"size_mb": 0.001}), known)
    assert not result.passed and not (known / "out").exists() and result.measured == 0
    assert "none of 5 points keeps the budgets" in result.verdict
    least = min(trial["values"]["size_mb"] for trial in trials_of(result).values())
    assert f"size_mb is at least {least:.4g} (point 2); expected at most 0.001" in result.verdict
    page = (known / "out.failed" / "report.html").read_text()
    assert "none of 5 points" in page and 'id="tuning"' in page


def test_the_command_ends_with_1_where_nothing_keeps_the_budgets(known: Path, tiny_llama_dir: Path) -> None:
    from typer.testing import CliRunner

    from onnxsmith.pipeline.cli import app

    (known / "tiny.yaml").write_text(yaml.safe_dump(plain_recipe(tiny_llama_dir, budgets={"size_mb": 0.001})))
    line = ["tune", str(known / "tiny.yaml"), "-o", str(known / "out"), "--trials", "9", "--json", "-"]
    ended = CliRunner().invoke(app, line)
    assert ended.exit_code == 1, ended.output
    found = json.loads(ended.stdout)
    assert found["command"] == "tune" and not found["passed"] and len(found["tuning"]["trials"]) == 5


def test_a_point_that_breaks_is_a_result_and_the_others_go_on(tiny_llama_dir: Path, work: Path) -> None:
    broken = {"one_of": {"good": [], "bad": [{"quantize_static": {}}]}}
    result = tuned(plain_recipe(tiny_llama_dir, tune={"passes": ["cleanup", broken]}), work)
    trials = trials_of(result)
    assert trials["good"]["chosen"] and trials["bad"]["state"] == "failed"
    assert "calibration data" in trials["bad"]["reason"]


@pytest.mark.slow
def test_variants_of_the_recipe_are_points_too(tiny_llama_dir: Path, work: Path) -> None:
    plain = plain_recipe(
        tiny_llama_dir, tune={"passes": ["cleanup"]}, variants=[{"name": "mine", "preset": "cpu-int8"}]
    )
    result = tuned(plain, work)
    assert result.tuning["chosen"] == "mine" and result.passed
    assert load_recipe(work / "out.tune" / "recipe.yaml").variants[0].name == "mine"


@pytest.mark.parametrize(
    ("sampler", "objectives"), [("tpe", []), ("random", []), ("nsga2", ["size_mb", "kl_to_reference"])]
)
def test_samplers_are_seeded(
    sampler: str, objectives: list[str], tiny_llama_dir: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.pipeline.tuning_study import Study
    from onnxsmith.pipeline.tuning_trial import Trial

    def asked(seed: int, name: str) -> list[dict[str, Any]]:
        plain = plain_recipe(tiny_llama_dir, seed=seed)
        plain["tune"] |= {"sampler": sampler, "objectives": objectives, "trials": 8}
        plain["tune"]["passes"] = [
            {"quantize_mixed": {"max_divergence": {"low": 0.001, "high": 1.0, "log": True}}}
        ]
        study = Study(Recipe.model_validate(plain), work / f"{name}.db", limits=["size_mb"], content={})
        found = []
        for number in range(6):
            ask = study.ask()
            assert ask is not None
            trial = Trial(ask[0], ask[1], "complete", values={"size_mb": number / 7, "kl_to_reference": 1.0})
            found.append(dict(ask[1].parameters))
            study.tell(ask[0], trial)
        assert [trial.point.parameters for trial in study.told()] == found
        study.close()
        return found

    one, two, other = asked(1, "one"), asked(1, "two"), asked(2, "other")
    assert one == two != other
    values = [point["quantize_mixed.max_divergence"] for point in one]
    assert len(set(values)) == 6 and all(0.001 <= value <= 1 for value in values)


def test_a_point_that_waits_when_a_process_is_killed_is_the_next(tiny_llama_dir: Path, work: Path) -> None:
    from onnxsmith.pipeline.tuning_study import Study

    recipe = Recipe.model_validate(plain_recipe(tiny_llama_dir))
    studies = [Study(recipe, work / "study.db", limits=[], content={})]
    assert studies[0].sampler == "grid" and studies[0]._enqueue_next()
    studies[0].close()
    studies.append(Study(recipe, work / "study.db", limits=[], content={}))
    alone = Study(recipe, work / "other.db", limits=[], content={})
    found, expected = ([] for _ in range(2))
    for study, points in ((studies[1], found), (alone, expected)):
        while (ask := study.ask()) is not None:
            points.append(dict(ask[1].parameters))
        study.close()
    assert found == expected and len(found) > 1


def test_folds_fit_passes_without_the_data_that_they_are_scored_on(tiny_llama_dir: Path, work: Path) -> None:
    (work / "more.txt").write_text("\n".join([TINY_TEXT.upper().lower()] * 6))
    plain = plain_recipe(tiny_llama_dir, calibration={"data": "more.txt", "samples": 6, "tokens": 16})
    plain["tune"] = {
        "folds": 3, "prune": False,
        "passes": ["transpose_weights", {"one_of": {"float": [], "mixed": [{"quantize_mixed": {}}]}}],
    }  # fmt: skip
    result = tuned(plain, work)
    trials = trials_of(result)
    # One model for each fold where data are looked at, one for all where not; three scores for each.
    kinds = [path.name.partition("-")[0] for path in (work / "out.tune" / "measurements").iterdir()]
    assert kinds.count("make") == 1 + 1 and kinds.count("score") == 6
    assert trials["float"]["errors"]["kl_to_reference"] < 1e-6
    assert trials["mixed"]["errors"]["kl_to_reference"] > 1e-6


def command(work: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "onnxsmith.pipeline",
        "tune",
        str(work / "tiny.yaml"),
        "-o",
        str(work / "out"),
        *more,
    ]


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_search_that_was_ended_goes_on(end: signal.Signals, tiny_llama_dir: Path, work: Path) -> None:
    (work / "tiny.yaml").write_text(yaml.safe_dump(plain_recipe(tiny_llama_dir, tune={"prune": False})))
    known = work / "out.tune" / "measurements"
    process = subprocess.Popen(command(work), stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    try:
        wait_for(lambda: known.is_dir() and len(list(known.glob("score-*"))) >= 2, process)
    finally:
        process.send_signal(end)
    said = process.communicate()[1].decode()
    assert not (work / "out").exists()
    if end == signal.SIGINT:
        assert process.returncode == 130 and "run it again and it goes on" in said, said
        assert json.loads((work / "out.tune" / "tune.json").read_text())["trials"]
    before = {path.name: path.stat().st_mtime_ns for path in known.iterdir()}
    result = tune_recipe(load_recipe(work / "tiny.yaml"), work / "out", base=work)
    assert result.passed and len(result.tuning["trials"]) == 5
    after = {path.name: path.stat().st_mtime_ns for path in known.iterdir()}
    # What was measured before the end was not measured again.
    assert {name: after[name] for name in before if not name.startswith("reference")} == {
        name: time for name, time in before.items() if not name.startswith("reference")
    }
    assert set(after) > set(before)


@pytest.mark.slow
def test_workers_share_the_work_and_times_are_measured_alone(tiny_llama_dir: Path, work: Path) -> None:
    plain = plain_recipe(
        tiny_llama_dir, tune={"workers": 2, "prune": False, "objectives": ["size_mb", "latency_ms"]}
    )
    plain["evaluation"]["benchmark"] = {"prompt_tokens": 8, "new_tokens": 4, "runs": 2, "reference": False}
    result = tuned(plain, work)
    assert result.tuning["chosen"] is not None and result.report is not None, result.verdict
    # Whether a model this small is slower when it is quantized is left to chance. All else holds.
    (packed,) = result.report["variants"]
    assert packed["error"] is None and packed["comparison"]["passed"], result.verdict
    assert [(b["name"], b["passed"]) for b in packed["budgets"]] == [("kl_to_reference", True)]
    assert all(" times as long as " in said for said in packed["warnings"]), result.verdict
    assert result.passed is not bool(packed["warnings"])
    assert len(result.tuning["trials"]) == 5
    assert all(t["values"]["latency_ms"] > 0 for t in result.tuning["trials"] if t["state"] == "complete")
    times = sorted(
        (found["began"], found["ended"])
        for path in (work / "out.tune" / "measurements").glob("time-*")
        for found in [json.loads(path.read_text())]
    )
    assert len(times) == 5
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tiny_llama_dir: Path, work: Path) -> None:
    import psutil

    (work / "tiny.yaml").write_text(yaml.safe_dump(plain_recipe(tiny_llama_dir, tune={"workers": 2})))
    process = subprocess.Popen(command(work, "--json", str(work / "out.json")), stdout=subprocess.DEVNULL)
    killed = 0
    try:
        while process.poll() is None and not killed:
            for child in psutil.Process(process.pid).children():
                if "spawn_main" in " ".join(child.cmdline()):
                    time.sleep(0.5)
                    child.send_signal(signal.SIGKILL)
                    killed += 1
                    break
            time.sleep(0.02)
        assert process.wait(240) == 0
    finally:
        process.kill()
    assert killed
    found = json.loads((work / "out.json").read_text())
    assert found["passed"] and not [t for t in found["tuning"]["trials"] if t["state"] == "failed"]


def test_two_searches_do_not_share_a_directory(tiny_llama_dir: Path, work: Path) -> None:
    from onnxsmith.pipeline.tuning_store import alone_in

    (work / "out.tune").mkdir()
    with alone_in(work / "out.tune"), pytest.raises(DestinationError, match="another search is at work"):
        tuned(plain_recipe(tiny_llama_dir), work)


def test_a_foreign_artifact_is_not_replaced(tiny_llama_dir: Path, work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "diary.txt").write_text("mine")
    with pytest.raises(DestinationError):
        tuned(plain_recipe(tiny_llama_dir), work)
    assert (work / "out" / "diary.txt").exists()


def test_a_recipe_without_the_key_is_refused(tiny_llama_dir: Path, work: Path) -> None:
    plain = plain_recipe(tiny_llama_dir, variants=[{"name": "one", "preset": "clean"}])
    del plain["tune"]
    with pytest.raises(BadInputError, match=r"no key tune.*onnxsmith run"):
        tuned(plain, work)


def test_run_says_that_a_recipe_is_only_tuned(tiny_llama_dir: Path, work: Path) -> None:
    with pytest.raises(BadInputError, match=r"variants: none.*onnxsmith tune"):
        run_recipe(Recipe.model_validate(plain_recipe(tiny_llama_dir)), work / "out", base=work)


def test_without_optuna_the_message_says_what_to_install(
    tiny_llama_dir: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OnnxsmithError, match=r"optuna.*Run `pip install 'onnxsmith\[tune\]'`"):
        tuned(plain_recipe(tiny_llama_dir), work)


def test_too_little_text_to_hold_some_out_is_an_error(tiny_llama_dir: Path, work: Path) -> None:
    plain = plain_recipe(tiny_llama_dir)
    plain["evaluation"]["perplexity"]["window"] = 256
    with pytest.raises(BadInputError, match=r"no window from 0% to .*Take more max_tokens"):
        tuned(plain, work)
