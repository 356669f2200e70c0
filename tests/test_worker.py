"""Models that run apart: the same results, shared memory, and a death that is one candidate's alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest

from onnxsmith.errors import FeedError, ModelFileError, ResourceError, WorkerError
from onnxsmith.package import ModelPackage
from onnxsmith.runtime import OrtBackend, OrtSession, WorkerSession
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.tensor_channel import TensorReader, TensorWriter
from onnxsmith.runtime.worker_process import WorkerProcess

pytest.importorskip("onnxruntime")

Make = Callable[..., ModelPackage]
GRAPH = """g (float[n, 4] x, float[4] y) => (float[n, 4] sum, float[n, 4] product) {
    sum = Add(x, y) product = Mul(x, y) }"""


# Shared memory


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[tuple[TensorWriter, TensorReader]]:
    """Both ends."""
    writer, reader = TensorWriter((tmp_path,), "test"), TensorReader()
    yield writer, reader
    reader.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_all_kinds_arrive(channel: tuple[TensorWriter, TensorReader]) -> None:
    writer, reader = channel
    sent = {
        "scalar": np.array(3.5, np.float64),
        "empty": np.zeros((2, 0, 3), np.float32),
        "ids": np.arange(7, dtype=np.int64),
        "flags": np.array([[True, False]]),
        "half": np.array([1.5, -2.25], np.float16),
        "brain": np.array([1.5, -2.25], ml_dtypes.bfloat16),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    got = reader.read(json.loads(json.dumps(writer.write(sent))))
    assert list(got) == list(sent)
    for name, array in sent.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert np.array_equal(got[name], array)
    assert not got["ids"].flags.writeable


def test_the_memory_grows_and_is_used_again(channel: tuple[TensorWriter, TensorReader]) -> None:
    writer, reader = channel
    small, large = np.ones(10), np.ones(100_000)
    first = writer.write({"x": small})["file"]
    assert writer.write({"x": small * 2})["file"] == first
    message = writer.write({"x": large})
    assert message["file"] != first
    assert reader.read(message)["x"].sum() == 100_000
    assert writer.write({"x": small})["file"] == message["file"]


def test_a_full_place_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    missing = tmp_path / "missing"
    writer = TensorWriter((missing, tmp_path / "small"), "test")
    assert str(tmp_path / "small") in writer.write({"x": np.ones(4)})["file"]
    writer.close()
    with pytest.raises(ResourceError, match=r"tensors for another process: 32 MB do not fit in .*missing"):
        TensorWriter((missing,), "test").write({"x": np.ones(4_000_000)})


# A session apart


def test_a_session_apart_gives_the_same(onnx_package: Make) -> None:
    package = onnx_package(GRAPH)
    random = np.random.default_rng(0)
    with OrtBackend().open(package) as here, OrtBackend(apart=True).open(package) as apart:
        assert isinstance(apart, WorkerSession)
        assert (apart.inputs, apart.outputs, apart.provider) == (here.inputs, here.outputs, here.provider)
        assert "onnxruntime" in apart.versions
        assert apart.check_placement() == here.check_placement()
        for rows in (3, 1, 1000, 0, 2):
            feeds = {
                "x": random.standard_normal((rows, 4), np.float32),
                "y": random.standard_normal(4, np.float32),
            }
            expected, got = here.run(feeds), apart.run(feeds)
            assert list(got) == ["sum", "product"]
            for name in expected:
                assert np.array_equal(expected[name], got[name])
        assert list(apart.run(feeds, ["product"])) == ["product"]
        kept = apart.run(feeds)["sum"]
        before = kept.copy()
        apart.run({"x": feeds["x"] + 1, "y": feeds["y"]})
        assert np.array_equal(kept, before)
        with pytest.raises(FeedError, match="element type float64"):
            apart.run({"x": np.ones((1, 4)), "y": feeds["y"]})


def test_errors_there_are_errors_here(onnx_package: Make) -> None:
    frozen = "g (float[n, 4] x) => (float[2, 4] y) { s = Constant<value_ints=[2, 4]>() y = Reshape(x, s) }"
    with OrtBackend(apart=True).open(onnx_package(frozen), name="frozen") as session:
        with pytest.raises(ModelFileError, match=r"frozen: ONNX Runtime fails in CPU.*Reshape"):
            session.run({"x": np.ones((3, 4), np.float32)})
        # It goes on.
        assert session.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 4)


def test_a_process_that_dies_is_an_error_and_leaves_nothing(onnx_package: Make) -> None:
    feeds = {"x": np.ones((2, 4), np.float32), "y": np.ones(4, np.float32)}
    package = onnx_package(GRAPH)
    shared = set(Path("/dev/shm").glob(f"onnxsmith-{os.getpid()}-*"))
    with OrtBackend(apart=True).open(package, name="victim") as victim, OrtBackend().open(package) as other:
        assert isinstance(victim, WorkerSession)
        victim.run(feeds)
        pid = victim.worker.pid
        assert pid is not None
        psutil.Process(pid).kill()
        with pytest.raises(WorkerError, match=r"victim on CPU.*: its process was killed by SIGKILL"):
            victim.run(feeds)
        assert other.run(feeds)["sum"].sum() == 16
    assert not psutil.pid_exists(pid)
    assert set(Path("/dev/shm").glob(f"onnxsmith-{os.getpid()}-*")) == shared


def test_a_death_in_a_comparison_is_one_candidates(
    onnx_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith import compare_models
    from onnxsmith.runtime import worker_session

    onnx_package(GRAPH, "one")
    onnx_package(GRAPH, "two")
    run = worker_session.WorkerSession._run

    def kill_one(self: WorkerSession, *arguments: object) -> object:
        if self.name.endswith("one.onnx"):
            psutil.Process(self.worker.pid).kill()
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_session.WorkerSession, "_run", kill_one)
    monkeypatch.setattr(OrtBackend, "__post_init__", lambda self: object.__setattr__(self, "apart", True))
    one, two = compare_models(str(tmp_path / "two.onnx"), [tmp_path / "one.onnx", tmp_path / "two.onnx"])
    assert not one.passed
    assert "killed by SIGKILL" in one.reason
    assert two.passed
    assert two.placement is not None
    assert two.placement["CPUExecutionProvider"]["share"] == 1.0


def test_a_cache_stays_in_the_worker(tiny_package: ModelPackage) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(0, 64, (2, 7))
    mask = np.ones(prompt.shape, np.bool_)
    mask[1, :3] = False
    with OrtSession(tiny_package) as here, OrtBackend(apart=True).open(tiny_package) as apart:
        ours, theirs = open_decoder(here), open_decoder(apart)
        assert type(theirs).__name__ == "WorkerDecoder"
        for _ in range(2):
            assert np.allclose(ours.step(prompt, mask), theirs.step(prompt, mask), atol=1e-5)
            for token in (3, 5):
                tokens = np.full((2, 1), token)
                assert np.allclose(ours.step(tokens), theirs.step(tokens), atol=1e-5)
            assert ours.length == theirs.length == 9
            ours.reset()
            theirs.reset()


def test_a_worker_needs_nothing_but_numpy_and_onnxruntime(onnx_package: Make, tmp_path: Path) -> None:
    """It must run in an environment that has only a provider's package."""
    source = Path(__file__).resolve().parents[1] / "src"
    code = """
import sys
allowed = {"numpy", "onnxruntime", "ml_dtypes", "onnxsmith", "flatbuffers", "google", "packaging"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and not top.startswith("_"):
            # onnxruntime looks for some packages that it can do without.
            raise ModuleNotFoundError(f"refused: {name}", name=top)
sys.meta_path.insert(0, Refuse())
from onnxsmith.runtime.worker import main
sys.exit(main())
"""
    graph = GraphFile.of(onnx_package(GRAPH)).to_json()
    provider = {"name": "cpu", "ort_name": "CPUExecutionProvider"}
    requests = [
        {"do": "hello"},
        {
            "do": "open", "graph": graph, "provider": provider, "threads": 1, "optimize": True,
            "record": False, "name": "m", "directories": [str(tmp_path)], "prefix": "x",
        },
        {"do": "prepare", "settings": {"seed": 0, "batch": 2, "prompt_tokens": 3}},
        {"do": "round"},
        {"do": "profile", "runs": 1},
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input="".join(json.dumps(r) + "\n" for r in requests), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(requests), done.stderr[-2000:]
    assert not any("error" in answer for answer in answers), answers
    assert answers[3]["times"]["latency"]
    assert {node["op_type"] for node in answers[4]["nodes"]} == {"Add", "Mul"}


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('planted')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        WorkerProcess(where="somebody") as worker,
        pytest.raises(WorkerError, match=r"somebody: its process ended with status 1 \(Runtime.*planted\)"),
    ):
        worker.ask({"do": "hello"})
