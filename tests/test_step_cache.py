"""The store of steps: whole entries or none, whoever is killed; damage is seen; what is open stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.package import TensorSpec
from onnxsmith.pipeline.recorded_reference import load_expected, save_expected
from onnxsmith.pipeline.run_steps import RunSteps, cache_directory, on_one_disk, user_cache
from onnxsmith.pipeline.step_cache import OpenStep, StepCache
from onnxsmith.pipeline.step_keys import StepKey, file_identity, step_key
from onnxsmith.runtime import cases_for, reference_outputs
from onnxsmith.runtime.session import Array, Session
from onnxsmith.user_directories import bytes_of

KEY = step_key("test", number=1)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[StepCache]:
    made = StepCache(tmp_path / "cache")
    yield made
    made.close()


def put(cache: StepCache, key: StepKey = KEY, size: int = 1000, **facts: Any) -> OpenStep:
    def make(directory: Path) -> Mapping[str, Any]:
        (directory / "part").mkdir()
        (directory / "part" / "data").write_bytes(bytes(size))
        return facts

    return cache.result(key, make)


def never(_: Path) -> Mapping[str, Any]:
    raise AssertionError("it was made although it is there")


def test_what_was_made_is_found(cache: StepCache) -> None:
    assert cache.open(KEY) is None and not cache.has(KEY)
    made = put(cache, value=0.1, none=float("nan"))
    found = cache.result(KEY, never)
    assert (made.hit, found.hit) == (False, True)
    assert made.facts == found.facts == {"value": 0.1, "none": None}
    assert (found.directory / "part" / "data").read_bytes() == bytes(1000)
    (entry,) = cache.entries()
    assert entry.kind == "test" and entry.bytes > 1000 and entry.key == KEY.digest


def test_what_is_to_be_made_anew_is(cache: StepCache) -> None:
    put(cache, value=1)
    renewed = cache.result(KEY, lambda _: {"value": 2}, renew=True)
    assert not renewed.hit and renewed.facts == {"value": 2}
    assert cache.result(KEY, never).facts == {"value": 2}


def test_a_step_that_fails_leaves_nothing(cache: StepCache) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.result(KEY, lambda directory: {"x": (directory / "a").write_text("a") / 0})
    assert not cache.has(KEY) and not list((cache.root / "tmp").iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "entry", "facts", "other"])
def test_damage_is_seen_and_mended(cache: StepCache, damage: str) -> None:
    place = put(cache, value=1).directory
    data, entry = place / "part" / "data", place / ".entry"
    if damage == "flip":
        data.write_bytes(bytes(500) + b"\1" + bytes(499))
    elif damage == "cut":
        data.write_bytes(bytes(999))
    elif damage == "remove":
        data.unlink()
    elif damage == "entry":
        entry.write_text(entry.read_text()[:-5])
    elif damage == "facts":
        entry.write_text(entry.read_text().replace('"value": 1', '"value": 2'))
    else:
        other = put(cache, step_key("test", number=2), value=1).directory
        entry.write_text((other / ".entry").read_text())
    assert cache.open(KEY) is None
    mended = put(cache, value=1)
    assert not mended.hit and cache.result(KEY, never).facts == {"value": 1}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "cache")
    keys = [step_key("test", number=number) for number in range(4)]
    for number, key in enumerate(keys):
        place = put(cache, key).directory
        os.utime(place / ".entry", (number, number))
    cache.close()
    assert cache.open(keys[0]) is not None
    cache.close()
    size = sum(entry.bytes for entry in cache.entries())
    removed = cache.prune(size - 1)
    # Number 0 was used last, number 1 the longest ago.
    assert [entry.key for entry in removed] == [keys[1].digest]
    assert [cache.has(key) for key in keys] == [True, False, True, True]
    assert [entry.key for entry in cache.prune(None, unused_s=3600)] == [keys[2].digest, keys[3].digest]


def test_a_limit_is_kept_while_entries_come(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "cache", max_bytes=5000)
    for number in range(10):
        put(cache, step_key("test", number=number))
        cache.close()
        assert sum(entry.bytes for entry in cache.entries()) <= 5000
    assert 2 <= len(cache.entries()) < 10


def test_what_is_open_is_not_evicted(cache: StepCache) -> None:
    place = put(cache).directory
    assert cache.prune(0) == [] and place.is_dir()
    cache.close()
    assert len(cache.prune(0)) == 1 and not place.exists()


def test_what_a_killed_process_left_is_swept(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from onnxsmith.pipeline.step_cache import StepCache\n"
        "from onnxsmith.pipeline.step_keys import step_key\n"
        "def make(place):\n"
        "    (place / 'data').write_bytes(bytes(10**6)); os.kill(os.getpid(), signal.SIGKILL)\n"
        "StepCache(Path(sys.argv[1])).result(step_key('test', number=1), make)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(cache.root)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert cache.open(KEY) is None and len(list((cache.root / "tmp").iterdir())) == 1
    cache.prune(None)
    # It may be somebody's who has not locked it yet.
    assert len(list((cache.root / "tmp").iterdir())) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    cache.prune(None)
    assert not list((cache.root / "tmp").iterdir())


def _hammer(root: Path, seed: int) -> int:
    """Makes, reads and evicts the same few entries as fast as it can; counts what was wrong."""
    random = np.random.default_rng(seed)
    cache, wrong = StepCache(root, max_bytes=40_000), 0
    for _ in range(60):
        number = int(random.integers(5))

        def make(directory: Path, number: int = number) -> Mapping[str, Any]:
            (directory / "data").write_bytes(bytes([number]) * 10_000)
            return {"number": number}

        try:
            step = cache.result(step_key("race", number=number), make)
            data = (step.directory / "data").read_bytes()
            wrong += step.facts["number"] != number or data != bytes([number]) * 10_000
        finally:
            cache.close()
    return wrong


def test_processes_side_by_side_never_see_each_others_halves(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_hammer, [(tmp_path / "cache", seed) for seed in range(3)]) == [0, 0, 0]
    cache = StepCache(tmp_path / "cache")
    assert not list((cache.root / "tmp").iterdir())
    assert all(entry.kind == "race" for entry in cache.entries())


def test_an_address_covers_versions_code_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxsmith.pipeline import step_keys

    def digest(**made_from: Any) -> str:
        return step_key("test", **made_from).digest

    assert digest(number=1) == KEY.digest == digest(number=1, summary="words")
    assert digest(number=2) != KEY.digest != step_key("other", number=1).digest
    monkeypatch.setattr(step_keys, "_versions", lambda: (("torch", "0"),))
    assert digest(number=1) != KEY.digest
    monkeypatch.undo()
    monkeypatch.setattr(step_keys, "_code_sha256", lambda: "edited")
    assert digest(number=1) != KEY.digest
    monkeypatch.undo()
    file = tmp_path / "file"
    file.write_text("a")
    before = file_identity(file)
    file.write_text("b")
    assert file_identity(file) != before
    assert len(step_keys._code_sha256()) == 64 and dict(step_keys._versions())["numpy"]


def test_the_code_of_every_module_counts() -> None:
    """The folders are links, which a search may pass by."""
    import onnxsmith
    from onnxsmith.pipeline.step_keys import _modules

    root = Path(str(onnxsmith.__file__)).parent
    names = {path.relative_to(root).as_posix() for path in _modules(root)}
    assert {"package.py", "graph_passes/gptq.py", "exporters/tracing.py", "runtime/scoring.py"} <= names


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("1.5 g", 15 * 10**8), ("500MB", 5 * 10**8), ("7", 7), ("0", 0)]
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text, where="--max-size") == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1 GiB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match=r"--max-size: .*; expected a size such as 20GB or 500MB"):
        bytes_of(text, where="--max-size")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXSMITH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_directory() == tmp_path / "xdg" / "onnxsmith"
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / "cache"
    # Switched off, as in all tests.
    assert user_cache() is None
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "1MB")
    cache = user_cache()
    assert cache is not None and cache.max_bytes == 10**6
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "file"))
    assert user_cache() is None
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "lots")
    with pytest.raises(BadInputError, match="ONNXSMITH_CACHE_SIZE: 'lots'; expected a size"):
        user_cache()


def fill_the_disk(directory: Path) -> None:
    """Writes where the system says that there is no space."""
    with open("/dev/full", "wb") as full:
        full.write(b"0")


def test_where_the_disk_of_the_cache_is_full_the_run_goes_on_without_it(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or on_one_disk(memory, tmp_path):
        pytest.skip("there is no second file system to be had")
    with tempfile.TemporaryDirectory(dir=memory) as text:
        root = Path(text)
        steps = RunSteps(StepCache(root / "cache"), tmp_path / "scratch")

        def make(directory: Path) -> Mapping[str, Any]:
            if directory.is_relative_to(root):
                fill_the_disk(directory)
            (directory / "data").write_bytes(b"x")
            return {}

        found = steps.result(KEY, make)
        assert steps.is_ours(found) and (found.directory / "data").read_bytes() == b"x"
        # It is not tried again and again.
        assert not steps.keeps(1)
        assert StepCache(root / "cache").entries() == []

        def broken(directory: Path) -> Mapping[str, Any]:
            raise PermissionError(13, "not a matter of space")

        with pytest.raises(PermissionError):
            RunSteps(StepCache(root / "cache"), tmp_path / "scratch").result(KEY, broken)
        steps.close()


def test_on_the_disk_of_the_run_itself_a_full_disk_is_an_error(tmp_path: Path) -> None:
    steps = RunSteps(StepCache(tmp_path / "cache"), tmp_path / "scratch")
    calls = []

    def make(directory: Path) -> Mapping[str, Any]:
        calls.append(directory)
        fill_the_disk(directory)
        return {}

    with pytest.raises(OSError, match="No space left"):
        steps.result(KEY, make)
    assert len(calls) == 1


def test_what_is_too_large_for_the_cache_goes_with_the_run(tmp_path: Path) -> None:
    cache = StepCache(tmp_path / "cache", max_bytes=10_000)
    cache.root.mkdir()
    steps = RunSteps(cache, tmp_path / "scratch")
    small = steps.result(KEY, lambda _: {}, expected_bytes=1000)
    large = steps.result(step_key("test", number=2), lambda _: {}, expected_bytes=9000)
    assert small.directory.is_relative_to(cache.root) and not steps.is_ours(small)
    assert large.directory.is_relative_to(tmp_path / "scratch") and steps.is_ours(large)
    steps.close()


class _Doubling(Session):
    inputs = (TensorSpec("x", "float32", ("batch", 3)),)
    outputs = (TensorSpec("y", "bfloat16", ("batch", 3)), TensorSpec("n", "int64", ()))
    provider, name = "numpy", "doubling"

    def _run(self, feeds: Mapping[str, Array], outputs: Any) -> dict[str, Array]:
        import ml_dtypes

        return {"y": (feeds["x"] * 2).astype(ml_dtypes.bfloat16), "n": np.array(7, np.int64)}


def test_what_a_reference_gave_is_recorded_to_the_bit(tmp_path: Path) -> None:
    session = _Doubling()
    expected = {"model": reference_outputs(session, cases_for(session, limits={}))}
    told = json.loads(json.dumps(save_expected({"model": session}, expected, tmp_path)))
    sessions, again = load_expected(tmp_path, told)
    assert sessions["model"].inputs == session.inputs and sessions["model"].outputs == session.outputs
    assert len(again["model"]) == len(expected["model"]) > 1
    for (case, outputs), (case2, outputs2) in zip(expected["model"], again["model"], strict=True):
        assert case.name == case2.name
        for one, two in ((case.feeds, case2.feeds), (outputs, outputs2)):
            assert one.keys() == two.keys()
            for name in one:
                assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape
                assert one[name].tobytes() == two[name].tobytes()
    with pytest.raises(FeedError, match="doubling: a record of what it gave; expected a model that is open"):
        sessions["model"].run({"x": np.zeros((1, 3), np.float32)})
