"""Tensors from one process to another, through memory that both map.

The sender writes arrays into a file of ``/dev/shm`` (or another temporary directory, where that is too
small) and sends a description; the receiver maps the same file and reads the arrays where they lie. The
file is used again for the next message, and replaced by a larger one when it is too small.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import ResourceError

__all__ = ["TensorReader", "TensorWriter", "channel_directories"]

Array = npt.NDArray[Any]

_ALIGNMENT = 64
_SHARED_MEMORY = Path("/dev/shm")


def channel_directories() -> tuple[Path, ...]:
    """Where the memory may lie, best first: real shared memory, then a file system."""
    shared = (_SHARED_MEMORY,) if os.access(_SHARED_MEMORY, os.W_OK) else ()
    return (*shared, Path(tempfile.gettempdir()))


class TensorWriter:
    """The sending end.

    Args:
        directories: Where the file may lie; the first that has the space.
        name: Begins the file's name.
    """

    def __init__(self, directories: tuple[Path, ...], name: str) -> None:
        self._directories = directories
        self._name = name
        self._map: mmap.mmap | None = None
        self._path: Path | None = None
        self._number = 0

    def write(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Writes arrays, over those of the message before.

        Returns:
            What ``TensorReader.read`` needs, as plain data.

        Raises:
            ResourceError: No directory has the space.
        """
        places: dict[str, Any] = {}
        end = 0
        for name, array in arrays.items():
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
            places[name] = {"offset": end, "dtype": array.dtype.name, "shape": list(array.shape)}
            end += array.nbytes
        if self._map is None or len(self._map) < end:
            self._grow(max(end, mmap.PAGESIZE))
        assert self._map is not None
        for name, array in arrays.items():
            target: Array = np.ndarray(
                array.shape, array.dtype, buffer=self._map, offset=places[name]["offset"]
            )
            target[...] = array
            del target
        return {"file": str(self._path), "tensors": places}

    def close(self) -> None:
        """Frees the memory. Closing twice is allowed."""
        if self._map is not None:
            # A view that somebody kept holds the memory until it goes.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _grow(self, size: int) -> None:
        self.close()
        self._number += 1
        failure: OSError | None = None
        for directory in self._directories:
            path = directory / f"{self._name}-{self._number}"
            try:
                with path.open("xb+") as file:
                    # Room is taken now: a full tmpfs would kill the process when it is written to.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
                    self._map = mmap.mmap(file.fileno(), size)
            except OSError as error:
                path.unlink(missing_ok=True)
                failure = error
                continue
            self._path = path
            return
        raise ResourceError(
            "tensors for another process",
            got=f"{size / 1e6:.0f} MB do not fit in {' or '.join(str(d) for d in self._directories)}",
            remedy=f"Free some space there ({failure})",
        )


class TensorReader:
    """The receiving end."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._path = ""

    def read(self, message: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays that lie in the shared memory, valid until the sender writes again."""
        if message["file"] != self._path:
            self.close()
            with Path(message["file"]).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._path = message["file"]
        assert self._map is not None
        return {
            name: np.ndarray(place["shape"], _dtype(place["dtype"]), buffer=self._map, offset=place["offset"])
            for name, place in message["tensors"].items()
        }

    def close(self) -> None:
        """Lets go of the memory."""
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
            self._path = ""


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype
