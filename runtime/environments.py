"""Environments of their own for execution providers whose packages exclude each other.

Each pip package gets a virtual environment in a directory of the user. It is made beside its place and
renamed into it once its provider has answered, so a broken one is never found.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxsmith.errors import DestinationError, ProviderUnavailableError
from onnxsmith.user_directories import HOME_VARIABLE, given_home, system_data

__all__ = [
    "Environment",
    "find_environment",
    "home_directory",
    "make_environment",
    "remove_environment",
]


_RECORD = "environment.json"


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment with one package of ONNX Runtime.

    Attributes:
        package: The pip package that it was made for.
        directory: Where it is.
        versions: Package to version, when it was made.
        python: The version of its Python.
    """

    package: str
    directory: Path
    versions: Mapping[str, str]
    python: str

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return _interpreter(self.directory)


def home_directory() -> Path:
    """Where environments are kept.

    ``$ONNXSMITH_HOME``, else the directory where the system keeps a user's data of programs.
    """
    return given_home() or system_data() / "onnxsmith"


def find_environment(package: str) -> Environment | None:
    """The environment of a package; None where there is none, or one that cannot run any more."""
    directory = home_directory() / "environments" / package
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        environment = Environment(package, directory, dict(record["versions"]), str(record["python"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A Python that was removed or upgraded leaves a link to nothing.
    return environment if environment.interpreter.exists() else None


def make_environment(
    package: str,
    requirements: Sequence[str],
    *,
    without_dependencies: Sequence[str] = (),
    check: Callable[[Environment], None],
    on_step: Callable[[str], None] = lambda _: None,
) -> Environment:
    """Makes the environment of a package, in place of one that is there.

    pip takes packages from wherever it is configured to (``pip config``, ``PIP_INDEX_URL``,
    ``PIP_FIND_LINKS``, ...), so a mirror or a directory of wheels will do.

    Args:
        package: What it is made for.
        requirements: What pip installs, with dependencies.
        without_dependencies: What pip installs after that, alone.
        check: Raises where the environment does not do what it is made for.
        on_step: Called with each thing that begins.

    Raises:
        ProviderUnavailableError: pip cannot install it; the message says why.
        DestinationError: The directory cannot be written.
        OnnxsmithError: What ``check`` raises.
    """
    place = home_directory() / "environments" / package
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{package}-", dir=place.parent))
    except OSError as error:
        raise DestinationError(
            str(place.parent),
            got=f"cannot be written: {error.strerror}",
            expected="a directory of one's own",
            remedy=f"Set {HOME_VARIABLE} to another one",
        ) from error
    try:
        on_step("create the environment")
        pip = _create(staging)
        on_step(f"install {' '.join((*requirements, *without_dependencies))}")
        _install(pip, requirements, package)
        if without_dependencies:
            _install(pip, ("--no-deps", *without_dependencies), package)
        versions = _versions(pip)
        (staging / _RECORD).write_text(
            json.dumps(
                {
                    "package": package,
                    "versions": versions,
                    "python": platform.python_version(),
                    "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
                indent=2,
            ),
            encoding="utf-8",
        )
        on_step("start it")
        check(Environment(package, staging, versions, platform.python_version()))
        on_step("done")
        if place.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{package}-old-", dir=place.parent))
            place.rename(old / "environment")
            staging.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Environment(package, place, versions, platform.python_version())


def remove_environment(package: str) -> bool:
    """Removes the environment of a package.

    Returns:
        Whether there was one.
    """
    place = home_directory() / "environments" / package
    if not place.exists():
        return False
    doomed = Path(tempfile.mkdtemp(prefix=f".{package}-old-", dir=place.parent))
    place.rename(doomed / "environment")
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _interpreter(directory: Path) -> Path:
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _create(directory: Path) -> list[str]:
    """Makes a virtual environment and gives the command of a pip that installs into it."""
    ours = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, check=False, text=True
    )
    # Our pip can install there, which saves half of the time; an old or a missing one cannot.
    has_pip = ours.returncode == 0 and int(ours.stdout.split()[1].partition(".")[0]) >= 23
    command = [sys.executable, "-m", "venv", "--clear", str(directory)]
    made = subprocess.run(
        [*command, "--without-pip"] if has_pip else command, capture_output=True, check=False, text=True
    )
    if made.returncode != 0:
        raise ProviderUnavailableError(
            "a virtual environment",
            got=f"`python -m venv` fails: {_last_line(made.stdout + made.stderr)}",
            remedy="On Debian and Ubuntu it needs the package python3-venv",
        )
    python = str(_interpreter(directory))
    if has_pip:
        return [sys.executable, "-m", "pip", "--python", python]
    return [python, "-m", "pip"]


def _install(pip: Sequence[str], requirements: Sequence[str], package: str) -> None:
    done = subprocess.run(
        [*pip, "install", "--quiet", "--disable-pip-version-check", *requirements],
        capture_output=True, check=False, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise ProviderUnavailableError(
            f"installation of {package}",
            got=f"pip fails: {' '.join(lines[-2:]) or _last_line(done.stderr)}",
            expected="a package for this Python and this machine",
            remedy="pip's own configuration says where packages come from; nothing was changed",
        )


def _versions(pip: Sequence[str]) -> dict[str, str]:
    done = subprocess.run(
        [*pip, "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    return {entry["name"]: entry["version"] for entry in json.loads(done.stdout)}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
