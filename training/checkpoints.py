"""The whole state of a training in one file, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, ResourceError

__all__ = ["read_checkpoint", "write_checkpoint"]

_FORMAT = 1


def write_checkpoint(path: Path, state: dict[str, Any], *, fingerprint: str) -> None:
    """Writes a state beside its place and renames it there, after the data are on the disk.

    A process that is killed at any moment leaves the old file or the new one.

    Args:
        path: Where.
        state: Tensors and plain values, nested.
        fingerprint: What the training is: settings, data, weights that it began with.

    Raises:
        ResourceError: It cannot be written.
    """
    import torch

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            torch.save({"format": _FORMAT, "fingerprint": fingerprint, "state": state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ResourceError(
            f"checkpoint {path}", got=f"cannot be written: {error.strerror or error}",
            remedy="Free some space, or name another directory",
        ) from error  # fmt: skip


def read_checkpoint(path: Path, *, fingerprint: str) -> dict[str, Any] | None:
    """The state of the same training; None where there is no checkpoint.

    Nothing in the file is run: only tensors and plain values are read.

    Raises:
        BadInputError: It is damaged, or of another training.
    """
    import torch

    # What killed processes left half written.
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        if not _alive(partial):
            partial.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        known, state = found["fingerprint"], found["state"]
    except Exception as error:  # whatever torch raises of a damaged file
        raise BadInputError(
            f"checkpoint {path}", got=f"cannot be read: {type(error).__name__}",
            expected="a checkpoint of onnxsmith", remedy="Remove it, and training begins anew",
        ) from error  # fmt: skip
    if found.get("format") != _FORMAT or known != fingerprint:
        raise BadInputError(
            f"checkpoint {path}", got="the state of another training",
            expected="the same settings, data, weights and versions",
            remedy="Remove it, and training begins anew",
        )  # fmt: skip
    result: dict[str, Any] = state
    return result


def _alive(partial: Path) -> bool:
    try:
        os.kill(int(partial.name.split(".")[-2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
