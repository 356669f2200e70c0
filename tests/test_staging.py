"""Directories that appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onnxsmith import Recipe, run_recipe, tune_recipe
from onnxsmith.errors import DestinationError, ResourceError
from onnxsmith.pipeline.staging import (
    beside,
    check_destination,
    check_report_place,
    require_space,
    staged_directory,
    write_beside,
)


def make_artifact(directory: Path, content: str = "old") -> Path:
    """The least that passes for an artifact of ours."""
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_text(content)
    (directory / "manifest.json").write_text(json.dumps({"onnxsmith": "0", "files": {"model.onnx": {}}}))
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Lets the system itself refuse large files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_the_block_makes_appears_at_its_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with staged_directory(target) as staging:
        (staging / "a.txt").write_text("1")
        assert not target.exists()
        assert staging.stat().st_dev == tmp_path.stat().st_dev
    assert names(target) == ["a.txt"]
    assert names(target.parent) == ["out"]


def test_a_failure_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "deep" / "er" / "out") as staging:
        (staging / "a.txt").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), staged_directory(target, force=True) as staging:
        (staging / "model.onnx").write_text("new")
        raise KeyboardInterrupt
    assert (target / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_artifact(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with staged_directory(target, force=True) as staging:
        (staging / "other.txt").write_text("new")
    assert names(target) == ["other.txt"]
    assert names(tmp_path) == ["out"]


def test_an_empty_directory_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a.txt").write_text("1")
    assert names(tmp_path / "out") == ["a.txt"]


def test_an_artifact_needs_force(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with pytest.raises(DestinationError, match=r"out: an artifact is already there.*Replace it with --force"):
        check_destination(target, force=False)
    check_destination(target, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_nothing_but_an_artifact_is_ever_replaced(tmp_path: Path, force: bool) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("x")
    with pytest.raises(DestinationError, match=r"photos: a directory with other things in it; expected"):
        check_destination(photos, force=force)
    (photos / "manifest.json").write_text("{}")
    with pytest.raises(DestinationError, match=r"a manifest\.json that is not onnxsmith's"):
        check_destination(photos, force=force)
    (photos / "manifest.json").write_text("{")
    with pytest.raises(DestinationError, match=r"a manifest\.json that cannot be read"):
        check_destination(photos, force=force)
    assert names(photos) == ["holiday.jpg", "manifest.json"]


def test_a_file_that_a_user_put_into_an_artifact_is_not_lost(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    (target / "notes.md").write_text("mine")
    with pytest.raises(DestinationError, match=r"an artifact with a file that is not its own, notes\.md"):
        check_destination(target, force=True)
    with pytest.raises(DestinationError, match=r"notes\.md"), staged_directory(target, force=True):
        pass
    assert (target / "notes.md").read_text() == "mine"


def test_what_appears_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(DestinationError, match="an artifact is already there"), staged_directory(target):
        make_artifact(target, "theirs")
    assert (target / "model.onnx").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_files_links_and_the_ground_under_our_feet_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match=r"file: a file; expected a directory"):
        check_destination(tmp_path / "file", force=True)
    with pytest.raises(DestinationError, match=r"file is a file; expected a directory"):
        check_destination(tmp_path / "file" / "out", force=True)
    real = make_artifact(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(DestinationError, match=r"link: a link; expected a path that does not exist"):
        check_destination(tmp_path / "link", force=True)
    monkeypatch.chdir(real)
    with pytest.raises(
        DestinationError, match=r"the current or the home directory.*Name a directory inside it"
    ):
        check_destination(real, force=True)
    with pytest.raises(DestinationError, match="mount point"):
        check_destination(Path("/proc"), force=True)


def test_what_is_beside_an_output_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert beside(Path("out"), ".failed") == Path("out.failed")
    assert beside(Path("."), ".failed") == tmp_path / "inner.failed"
    assert beside(Path(".."), ".failed") == tmp_path.with_name(f"{tmp_path.name}.failed")
    with pytest.raises(DestinationError, match="the root"):
        beside(Path("/"), ".failed")


@pytest.mark.parametrize("output", [".", "..", "/"])
@pytest.mark.parametrize("command", ["run", "tune"])
def test_an_output_without_a_name_is_refused(
    output: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    recipe = Recipe.model_validate(
        {"schema_version": 1, "name": "toy", "source": "module:make",
         "variants": [{"name": "a", "preset": "clean"}], "tune": {"passes": ["cleanup"]}}
    )  # fmt: skip
    with pytest.raises(DestinationError, match=r"current or the home directory|the root"):
        (run_recipe if command == "run" else tune_recipe)(recipe, Path(output))
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def test_a_place_that_cannot_be_written_is_refused_at_once() -> None:
    with pytest.raises(DestinationError, match=r"cannot be written: .*Choose another -o"):
        check_destination(Path("/proc/out"), force=False)


def test_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="cannot be written: File name too long"):
        check_destination(tmp_path / ("x" * 300), force=False)


def test_a_disk_without_space_is_found_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1, purpose="a test")
    with pytest.raises(
        ResourceError, match=r"a test: \d+ MB free on the disk of .*; expected about 10{12} MB"
    ):
        require_space(tmp_path, 10**18, purpose="a test")


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with (
        file_size_limit(1 << 16),
        pytest.raises(
            ResourceError, match=r"out: the disk does not take it: File too large.*Free some space"
        ),
        staged_directory(target, force=True) as staging,
    ):
        (staging / "large").write_bytes(bytes(1 << 20))
    assert (target / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_missing_file_of_the_work_is_not_blamed_on_the_destination(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "out"):
        Path("/nowhere/at/all").read_text()


CHILD = """
import sys, time
from pathlib import Path
from onnxsmith.pipeline.staging import staged_directory

with staged_directory(Path(sys.argv[1]), force=True) as staging:
    (staging / "model.onnx").write_text("new")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def busy_child(target: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with (
        busy_child(target),
        pytest.raises(DestinationError, match=r"another process is writing there; expected one at a time"),
        staged_directory(target, force=True),
    ):
        pass
    assert (target / "model.onnx").read_text() == "old"


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    with busy_child(target) as child:
        child.kill()
        child.wait()
    assert len(names(tmp_path)) == 2
    with staged_directory(target, force=True) as staging:
        (staging / "model.onnx").write_text("next")
    assert (target / "model.onnx").read_text() == "next"
    assert names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    target = make_artifact(tmp_path / "out")
    killed = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from onnxsmith.pipeline import staging

        rename = Path.rename
        def half(self, other):
            rename(self, other)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = half
        with staging.staged_directory(Path(sys.argv[1]), force=True) as new:
            (new / "model.onnx").write_text("new")
    """)
    done = subprocess.run([sys.executable, "-c", killed, str(target)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(ZeroDivisionError), staged_directory(target, force=True):
        raise ZeroDivisionError
    assert (target / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_failed_replacement_brings_back_what_stepped_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_artifact(tmp_path / "out")
    rename = Path.rename

    def refuse_the_second(self: Path, other: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse_the_second)
    with pytest.raises(OSError, match="Input/output"), staged_directory(target, force=True):
        pass
    assert (target / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_place_of_a_failed_report(tmp_path: Path) -> None:
    place = tmp_path / "out.failed"
    check_report_place(place)
    place.mkdir()
    (place / "report.json").write_text("{}")
    check_report_place(place)
    (place / "mine.txt").write_text("x")
    with pytest.raises(
        DestinationError, match=r"out\.failed: something that is not the report of a failed run"
    ):
        check_report_place(place)


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_beside(path, "old")
    with file_size_limit(1 << 10), pytest.raises(OSError, match="File too large"):
        write_beside(path, "x" * (1 << 16))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]
    write_beside(Path("/dev/null"), "gone")


def test_time_does_not_pass_while_nothing_is_written(tmp_path: Path) -> None:
    """A claim costs no wait: `staged_directory` is used for every export."""
    began = time.perf_counter()
    for number in range(20):
        with staged_directory(tmp_path / str(number)) as staging:
            (staging / "a").write_text("1")
    assert time.perf_counter() - began < 10
