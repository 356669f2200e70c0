"""Where the system lets programs keep a user's data and caches, how much of it, and who says otherwise."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from onnxsmith.errors import BadInputError

__all__ = [
    "HOME_VARIABLE",
    "SIZE_VARIABLE",
    "bytes_of",
    "cache_limit",
    "given_home",
    "system_caches",
    "system_data",
]

HOME_VARIABLE = "ONNXSMITH_HOME"
SIZE_VARIABLE = "ONNXSMITH_CACHE_SIZE"
_DEFAULT_LIMIT = "20GB"
_UNITS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def given_home() -> Path | None:
    """``$ONNXSMITH_HOME``, below which everything is kept where it is set."""
    given = os.environ.get(HOME_VARIABLE)
    return Path(given).expanduser().resolve() if given else None


def bytes_of(text: str, *, where: str) -> int:
    """A size such as ``20GB``, ``500 MB`` or ``0``, in units of powers of ten.

    Args:
        text: What was given.
        where: For the message.

    Raises:
        BadInputError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?\s*", text)
    if match is None:
        raise BadInputError(where, got=repr(text), expected="a size such as 20GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def cache_limit() -> int:
    """What the cache may take, in bytes: ``$ONNXSMITH_CACHE_SIZE``, 20 GB where it is not set.

    Raises:
        BadInputError: It is no size.
    """
    return bytes_of(os.environ.get(SIZE_VARIABLE) or _DEFAULT_LIMIT, where=SIZE_VARIABLE)


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
