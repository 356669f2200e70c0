"""What is built and installed: nothing more and nothing less than the package.

Everything happens in a copy of the files that git would take, so that the checkout stays clean and a file
that git ignores cannot sneak into a wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import _INSTALL as INSTALL

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("exporters", "graph_passes", "pipeline", "runtime", "training")
# Notes for those who read the source; not part of what runs.
NOT_SHIPPED = {".md"}


@dataclass(frozen=True)
class Built:
    """A copy of the source and what was built from it."""

    source: Path
    sdist: Path
    wheel: Path


def run(command: Sequence[str | Path], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> list[Path]:
    """The files of the checkout that git tracks or would add, relative to its root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a git checkout, to know which files belong to the source")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    names = {Path(name) for name in listed.split("\0") if name}
    # A deleted file is listed until the deletion is staged.
    return sorted(name for name in names if os.path.lexists(ROOT / name))


def build(source: Path, destination: Path, *formats: str) -> None:
    # Without isolation there is nothing to download: setuptools comes from this environment.
    run(
        [sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", destination, source],
        cwd=destination.parent,
        env={"PIP_NO_INDEX": "1"},
    )


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected_members(source: Path) -> set[str]:
    """The files of the package as an installed one has them, read off the source folders."""
    found: set[str] = set()
    roots = {"onnxsmith": source / "src/onnxsmith"}
    roots.update({f"onnxsmith/{name}": source / name for name in FOLDERS})
    for prefix, folder in roots.items():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in NOT_SHIPPED:
                found.add(f"{prefix}/{path.relative_to(folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = tmp_path_factory.mktemp("packaging")
    source, dist = base / "source", base / "dist"
    for name in source_files():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    dist.mkdir()
    build(source, dist, "--sdist", "--wheel")
    return Built(source, only(dist, "*.tar.gz"), only(dist, "*.whl"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("installed") / "site"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            site,
            built.wheel,
        ],
        cwd=site.parent,
    )
    return site


def test_links_are_the_four_folders_and_relative() -> None:
    package = ROOT / "src/onnxsmith"
    links = {path.name: os.readlink(path) for path in package.iterdir() if path.is_symlink()}
    assert links == {name: f"../../{name}" for name in FOLDERS}
    assert all((package / name).resolve() == ROOT / name for name in FOLDERS)


def test_links_are_links_in_git() -> None:
    source_files()  # skips where there is no git
    staged = run(["git", "ls-files", "--stage", "src/onnxsmith"], cwd=ROOT)
    modes = {line.split("\t")[1]: line.split()[0] for line in staged.splitlines()}
    for name in FOLDERS:
        assert modes.get(f"src/onnxsmith/{name}", "120000") == "120000", "committed as a copy, not as a link"


def test_wheel_has_exactly_the_package(built: Built) -> None:
    found = members(built.wheel)
    package = {name for name in found if name.startswith("onnxsmith/")}
    assert package == expected_members(built.source)
    (dist_info,) = {name.partition("/")[0] for name in found - package}
    assert re.fullmatch(r"onnxsmith-[\w.]+\.dist-info", dist_info)
    assert {name.partition("/")[2] for name in found - package} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


def test_wheel_has_what_it_must(built: Built) -> None:
    # Against an empty folder equalling an empty list.
    found = members(built.wheel)
    assert {"onnxsmith/py.typed", "onnxsmith/errors.py", "onnxsmith/_version.py"} <= found
    for folder in FOLDERS:
        assert any(re.fullmatch(rf"onnxsmith/{folder}/.+\.py", name) for name in found), folder


def test_wheel_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        texts = {name.partition("/")[2]: archive.read(name).decode() for name in archive.namelist()}
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src/onnxsmith/_version.py").read_text())
    assert version is not None
    metadata = texts["METADATA"]
    assert f"\nVersion: {version[1]}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert texts["top_level.txt"].split() == ["onnxsmith"]
    assert "onnxsmith = onnxsmith.pipeline.cli:main" in texts["entry_points.txt"]
    required = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert "onnx" in required
    assert not {"torch", "transformers", "onnxruntime"} & set(required), "must not be core dependencies"


def test_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        # The oldest Python of 3.11 has no filters.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "sdist", **safely)
    (source,) = (tmp_path / "sdist").iterdir()
    for name in ("pyproject.toml", "LICENSE", "README.md", "PKG-INFO", "src/onnxsmith/errors.py"):
        assert (source / name).is_file(), name
    for folder in FOLDERS:
        assert (source / "src/onnxsmith" / folder / "__init__.py").is_file(), folder
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    build(source, wheels, "--wheel")
    assert members(only(wheels, "*.whl")) == members(built.wheel)


def python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code from a neutral directory, with the installed copy in front of everything else."""
    neutral = site.parent / "neutral"
    neutral.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=neutral,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", ["onnxsmith.errors", *(f"onnxsmith.{name}" for name in FOLDERS)])
def test_installed_copy_imports(installed: Path, module: str) -> None:
    done = python(installed, f"import {module}; print({module}.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)


@pytest.mark.parametrize("folder", FOLDERS)
def test_installation_adds_no_generic_name(installed: Path, folder: str) -> None:
    done = python(installed, f"import {folder}")
    assert done.returncode != 0
    assert f"ModuleNotFoundError: No module named '{folder}'" in done.stderr


def test_what_errors_say_to_install_brings_the_module() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    called = {"sklearn": "scikit-learn", "optimum": "optimum-onnx", "mlflow": "mlflow-skinny"}
    for module, command in INSTALL.items():
        extra = re.search(r"onnxsmith\[(\w+)\]", command)
        if extra is not None:
            names = {re.match(r"[\w-]+", entry)[0] for entry in extras[extra[1]]}  # type: ignore[index]
            assert called.get(module, module.replace("_", "-")) in names, module
