"""Where the system lets programs keep a user's data and caches, and the variables that say otherwise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["HOME_VARIABLE", "SIZE_VARIABLE", "given_home", "system_caches", "system_data"]

HOME_VARIABLE = "ONNXSMITH_HOME"
SIZE_VARIABLE = "ONNXSMITH_CACHE_SIZE"


def given_home() -> Path | None:
    """``$ONNXSMITH_HOME``, below which everything is kept where it is set."""
    given = os.environ.get(HOME_VARIABLE)
    return Path(given).expanduser().resolve() if given else None


def system_caches() -> Path:
    """Of all programs of this user: what can be made again."""
    return _base(("Library", "Caches"), "XDG_CACHE_HOME", (".cache",))


def system_data() -> Path:
    """Of all programs of this user: what they installed."""
    return _base(("Library", "Application Support"), "XDG_DATA_HOME", (".local", "share"))


def _base(mac: tuple[str, ...], variable: str, linux: tuple[str, ...]) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home().joinpath(*mac)
    return Path(os.environ.get(variable) or Path.home().joinpath(*linux))
