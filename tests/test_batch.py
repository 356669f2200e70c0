"""Batches: real recipes in processes of their own, here and on Ray; failures, crashes and reruns."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.conftest import heed_interrupts

from onnxsmith import verify_artifact
from onnxsmith.errors import BadInputError, DestinationError, RecipeError, UnknownNameError
from onnxsmith.pipeline.batch import _Room, run_batch
from onnxsmith.pipeline.batch_jobs import expand_jobs, load_batch

pytest.importorskip("torch")

MODULE = """
import os, signal, time
from pathlib import Path

import torch


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()), torch.randn(2, 8)


def crash_once():
    marker = Path(__file__).with_name("crashed")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make()


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    Path(__file__).with_name("hanging").write_text(str(os.getpid()))
    time.sleep(600)


def slow_once():
    marker = Path(__file__).with_name("slow")
    if not marker.exists():
        marker.write_text(str(os.getppid()))
        time.sleep(600)
    return make()
"""

RECIPE = """
schema_version: 1
name: toy
source: batch_module:make
variants:
  - {name: fp32, preset: clean}
evaluation: {benchmark: null}
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "batch_module.py").write_text(MODULE)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path


def write(work: Path, *jobs: dict[str, Any], **changes: Any) -> Path:
    path = work / "jobs.yaml"
    path.write_text(json.dumps({"schema_version": 1, "output": str(work / "out"), "jobs": jobs, **changes}))
    return path


def job(name: str, factory: str = "make", **changes: Any) -> dict[str, Any]:
    settings = {"source": f"batch_module:{factory}"} | changes.pop("set", {})
    return {"name": name, "recipe": "toy.yaml", "set": settings, **changes}


def statuses(result: Any) -> dict[str, tuple[str, int]]:
    return {job.name: (job.status, job.attempts) for job in result.jobs}


def test_failures_and_crashes_stop_nothing_else(work: Path) -> None:
    jobs = write(
        work,
        job("good"),
        job("too-large", set={"budgets.size_mb": 1e-6}),
        job("typo", set={"chose": "size_mb"}),
        job("crashes-once", "crash_once"),
        job("crashes", "crash", retries=0),
    )
    result = run_batch(jobs, workers=2)
    assert not result.passed
    assert statuses(result) == {
        "good": ("done", 1),
        "too-large": ("failed", 1),
        "typo": ("failed", 1),
        "crashes-once": ("done", 2),
        "crashes": ("failed", 1),
    }
    reasons = {job.name: job.reason for job in result.jobs}
    assert re.match(r"no variant passes: fp32: size_mb is .*; expected at most 1e-06", reasons["too-large"])
    assert "unknown key 'chose'" in reasons["typo"] and "Did you mean 'choose'" in reasons["typo"]
    assert reasons["crashes"] == "its process was ended by SIGKILL, perhaps for want of memory"
    for name in ("good", "crashes-once"):
        assert verify_artifact(work / "out" / name) == []
    made = {path.name for path in (work / "out").iterdir() if not path.name.startswith(".")}
    assert made == {"good", "crashes-once", "too-large.failed"}
    assert result.jobs[2].log and "unknown key 'chose'" in Path(result.jobs[2].log).read_text()

    again = run_batch(write(work, job("good"), job("crashes-once", "crash_once")))
    assert again.passed
    assert [j.status for j in again.jobs] == ["kept", "kept"]
    assert again.jobs[0].size_mb == result.jobs[0].size_mb


def test_only_what_changed_is_made_again(work: Path) -> None:
    jobs = write(work, job("a"))
    assert statuses(run_batch(jobs)) == {"a": ("done", 1)}
    assert run_batch(jobs).jobs[0].status == "kept"
    (work / "toy.yaml").write_text(RECIPE.replace("seed: 0", "") + "seed: 1\n")
    assert run_batch(jobs).jobs[0].status == "done"
    # An artifact that is no longer what it was is no artifact.
    path = work / "out" / "a" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    assert run_batch(jobs).jobs[0].status == "done"
    assert verify_artifact(work / "out" / "a") == []


@pytest.mark.slow
def test_what_no_batch_made_is_not_replaced(work: Path) -> None:
    jobs = write(work, job("a"))
    assert run_batch(jobs).passed
    (work / "out" / ".batch" / "a.json").unlink()
    refused = run_batch(jobs)
    assert not refused.passed
    assert "an artifact is already there" in refused.jobs[0].reason
    assert run_batch(jobs, force=True).passed


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended_with_its_process(work: Path) -> None:
    result = run_batch(write(work, job("hangs", "hang", timeout_s=15, retries=0)))
    assert result.jobs[0].reason == "it took more than 15 s"
    child = int((work / "hanging").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert [path.name for path in (work / "out").iterdir()] == [".batch"]


def test_a_matrix_is_every_combination(work: Path) -> None:
    entry = job("m", matrix={"export.opset": [18, 20], "variants.fp32.preset": ["clean", "cpu-fp32"]})
    jobs = expand_jobs(load_batch(write(work, entry)), base=work, output=work / "out")
    assert [j.name for j in jobs] == ["m-18-clean", "m-18-cpu_fp32", "m-20-clean", "m-20-cpu_fp32"]
    assert 'variants.fp32.preset="cpu-fp32"' in jobs[1].settings
    assert len({j.fingerprint for j in jobs}) == 4


def test_an_interrupt_ends_the_jobs_and_leaves_nothing(work: Path) -> None:
    jobs = write(work, job("hangs", "hang"), job("also", "hang"))
    child = subprocess.Popen(
        [sys.executable, "-m", "onnxsmith.pipeline", "batch", str(jobs), "--workers", "1"],
        stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    wait_for(work / "hanging")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    hanging = int((work / "hanging").read_text())
    assert not psutil.pid_exists(hanging) or psutil.Process(hanging).status() == psutil.STATUS_ZOMBIE
    assert [path.name for path in (work / "out").iterdir()] == [".batch"]


@pytest.mark.parametrize("group", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_batch_says_what_is_done_and_the_next_goes_on(work: Path, group: bool) -> None:
    jobs = write(work, job("good"), job("slow", "slow_once"))
    command = [sys.executable, "-m", "onnxsmith.pipeline", "batch", str(jobs), "--workers", "1"]
    child = subprocess.Popen(
        [*command, "--json", "first.json"],
        cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    wait_for(work / "slow", 90)
    # From a terminal it comes to the whole group; from `kill` to the one process.
    (os.killpg if group else os.kill)(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, "Traceback" in err) == (130, False), err
    assert "interrupted; the same command goes on with the jobs that are left" in err
    assert "2 jobs: 1 done, 0 kept, 0 failed, 1 interrupted" in out
    first = json.loads((work / "first.json").read_text())
    assert (first["passed"], first["interrupted"]) == (False, True)
    assert [one["status"] for one in first["jobs"]] == ["done", "interrupted"]
    assert "the next one runs it" in first["jobs"][1]["reason"]
    assert verify_artifact(work / "out" / "good") == []
    assert {path.name for path in (work / "out").iterdir()} == {".batch", "good"}
    again = run_batch(jobs)
    assert statuses(again)["good"][0] == "kept"
    assert statuses(again)["slow"] == ("done", 1)
    assert again.passed and not again.interrupted


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def test_a_job_ends_with_the_batch_even_if_that_is_killed(work: Path) -> None:
    jobs = write(work, job("hangs", "hang"))
    child = subprocess.Popen([sys.executable, "-m", "onnxsmith.pipeline", "batch", str(jobs)])
    wait_for(work / "hanging")
    hanging = psutil.Process(int((work / "hanging").read_text()))
    child.kill()
    child.wait()
    gone, _ = psutil.wait_procs([hanging], timeout=30)
    assert gone or hanging.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema_version: 1\njobs: []\n", r"line 2: jobs: \[\]; expected .*at least 1 item"),
        ("schema_version: 1\njbos: []\n", r"line 2: jbos: unknown key 'jbos'.*Did you mean 'jobs'\?"),
        (
            "schema_version: 1\njobs:\n- {name: a, recipe: r.yaml, retires: 2}\n",
            r"line 3: jobs\.0\.retires: unknown key 'retires'.*Did you mean 'retries'\?",
        ),
        (
            "schema_version: 1\njobs: [{name: a, recipe: r.yaml}, {name: a, recipe: r.yaml}]\n",
            r"line 2: jobs\.1\.name: a second job named 'a'; expected unique names",
        ),
        (
            "schema_version: 1\njobs:\n- {name: a, recipe: r.yaml, matrix: {seed: []}}\n",
            r"line 3: jobs\.0\.matrix\.seed: \[\]; expected at least 1 item",
        ),
        (
            "schema_version: 1\njobs: [{name: ../a, recipe: r.yaml}]\n",
            r"jobs\.0\.name: \"\.\./a\"; expec",
        ),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        run_batch(tmp_path / "jobs.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused(work: Path) -> None:
    (work / "taken").write_text("")
    with pytest.raises(DestinationError, match="taken: cannot be written: Not a directory"):
        run_batch(write(work, job("a")), output=work / "taken")


def test_wrong_options_are_refused(work: Path) -> None:
    jobs = write(work, job("a"))
    with pytest.raises(UnknownNameError, match=r"unknown executor 'rya'.*Did you mean 'ray'\?"):
        run_batch(jobs, executor="rya")
    with pytest.raises(BadInputError, match=r"--workers: 0; expected at least 1"):
        run_batch(jobs, workers=0)
    with pytest.raises(BadInputError, match=r"--address: --executor local; expected --executor ray"):
        run_batch(jobs, address="auto")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{closed}", "Connection refused; expected a Ray cluster that runs there"),
        ("ray://127.0.0.1:{closed}", "Connection refused; expected a Ray cluster that runs there"),
        ("127.0.0.1", "no host with a port; expected HOST:PORT"),
        ("127.0.0.1:port", "no host with a port; expected HOST:PORT"),
    ],
)
def test_an_address_that_nobody_listens_at_is_refused_at_once(work: Path, address: str, said: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        # Bound, and nobody listens.
        text = address.format(closed=taken.getsockname()[1])
        with pytest.raises(BadInputError, match=rf"--address {text}: {said}"):
            run_batch(write(work, job("a")), executor="ray", address=text)


def test_jobs_wait_for_memory_and_a_large_one_runs_alone() -> None:
    import threading

    room = _Room(10)
    order: list[str] = []

    def run(name: str, needed: int, seconds: float) -> None:
        with room.taken(needed):
            order.append(f"{name} in")
            time.sleep(seconds)
            order.append(f"{name} out")

    first = threading.Thread(target=run, args=("first", 6, 0.4))
    first.start()
    time.sleep(0.1)
    large = threading.Thread(target=run, args=("large", 1000, 0.1))
    small = threading.Thread(target=run, args=("small", 4, 0.0))
    large.start()
    small.start()
    for thread in (first, large, small):
        thread.join()
    assert order.index("small out") < order.index("first out")
    assert order.index("first out") < order.index("large in")


def test_the_expected_memory_is_what_the_run_forecasts(tiny_llama_dir: Path, work: Path) -> None:
    from onnxsmith import load_recipe
    from onnxsmith.pipeline.forecast import forecast_run
    from onnxsmith.source import ModelSource

    jobs = write(work, job("a", set={"source": str(tiny_llama_dir)}), job("b", memory_gb=3))
    first, second = expand_jobs(load_batch(jobs), base=work, output=work / "out")
    recipe = load_recipe(first.recipe, overrides=first.settings)
    told = forecast_run(recipe, ModelSource.parse(str(tiny_llama_dir)), cache=None)
    assert first.memory_bytes == told.together > 500_000_000
    assert second.memory_bytes == 3_000_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_twelve_jobs_with_planted_failures_and_a_killed_worker(work: Path, executor: str) -> None:
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'onnxsmith[ray]'")
    good = [job(f"good-{number}", set={"seed": number}) for number in range(9)]
    planted = [job("too-large", set={"budgets.size_mb": 1e-6}), job("crashes", "crash", retries=0)]
    jobs = write(work, job("victim", "slow_once", memory_gb=2), *good, *planted)
    command = ["batch", str(jobs), "--executor", executor, "--workers", "2", "--json", str(work / "r.json")]
    # A cluster that somebody else has, or had, is not taken where no address is given.
    elsewhere = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    child = subprocess.Popen([sys.executable, "-m", "onnxsmith.pipeline", *command], env=elsewhere)
    wait_for(work / "slow", 240)
    # On Ray the job's parent is a worker; on one machine it is the batch, so there the job itself goes.
    parent = int((work / "slow").read_text())
    if executor == "ray":
        assert parent != child.pid
        os.kill(parent, signal.SIGKILL)
    else:
        [victim] = [p for p in psutil.Process(child.pid).children() if "victim" in " ".join(p.cmdline())]
        victim.kill()
    assert child.wait(800) == 1
    result = json.loads((work / "r.json").read_text())
    found = {j["name"]: j["status"] for j in result["jobs"]}
    assert found == {
        "victim": "done",
        **{f"good-{number}": "done" for number in range(9)},
        "too-large": "failed",
        "crashes": "failed",
    }
    for name, status in found.items():
        if status == "done":
            assert verify_artifact(work / "out" / name) == []
