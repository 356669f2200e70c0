"""Tensors of a run on disk, with a sketch of each in memory: comparing thousands takes the memory of one."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onnxsmith.runtime.samples import Case
from onnxsmith.runtime.session import Array

__all__ = ["StoredTensor", "TensorStore", "hide_padding", "is_masked", "swap_middle"]

_SKETCH_SIZE = 512
_SIGNS = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of one case.

    Attributes:
        path: Where it is.
        shape: Of the array.
        dtype: Its element type in the model; on disk bfloat16 is float32.
        sketch: (512,), float64: a random projection. The distance of two sketches is that of the tensors,
            within a few percent (Charikar, Chen, Farach-Colton: Finding frequent items in data streams).
            Elements that a mask has made as low as they can be count as zero: beside them all scores of
            attention would look alike.
        swapped: The same of the tensor with its two middle axes swapped; None unless it has four.
        norm: Euclidean norm of the same elements.
        bad: Elements that are NaN or infinite.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    sketch: npt.NDArray[np.float64]
    swapped: npt.NDArray[np.float64] | None
    norm: float
    bad: int

    def load(self) -> Array:
        """The array, mapped from disk."""
        array: Array = np.load(self.path, mmap_mode="r")
        return array


class TensorStore:
    """A directory of tensors that is gone when the context ends."""

    def __init__(self) -> None:
        """Makes the directory."""
        self._directory = Path(tempfile.mkdtemp(prefix="onnxsmith-tensors-"))
        self._tensors: dict[str, dict[int, StoredTensor]] = {}
        self._count = 0
        self.bytes_written = 0

    def put(self, name: str, case: int, array: Array, hidden: Case | None = None) -> None:
        """Keeps a tensor.

        Args:
            name: The value.
            case: The number of the case.
            array: Not floating-point arrays are ignored.
            hidden: The case, whose padded positions do not count in the sketch.
        """
        dtype = str(array.dtype)
        if array.dtype.kind == "V" or dtype == "bfloat16":
            array = array.astype(np.float32)
        if not np.issubdtype(array.dtype, np.floating):
            return
        self._count += 1
        path = self._directory / f"{self._count}.npy"
        np.save(path, array)
        self.bytes_written += array.nbytes
        if hidden is not None:
            array = hide_padding(array, hidden)
        finite = np.isfinite(array)
        bad = int(array.size - np.count_nonzero(finite))
        clean = np.where(finite & ~is_masked(array), array, 0)
        swapped = _sketch(swap_middle(clean)) if clean.ndim == 4 else None
        norm = float(np.linalg.norm(np.asarray(clean, np.float64)))
        stored = StoredTensor(path, array.shape, dtype, _sketch(clean), swapped, norm, bad)
        self._tensors.setdefault(name, {})[case] = stored

    def get(self, name: str, case: int) -> StoredTensor:
        """A tensor that was put."""
        return self._tensors[name][case]

    def drop(self, name: str) -> None:
        """Forgets a tensor in all cases."""
        for stored in self._tensors.pop(name, {}).values():
            stored.path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The tensors in the order in which they came."""
        return list(self._tensors)

    def cases(self, name: str) -> dict[int, StoredTensor]:
        """A tensor in all cases."""
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._tensors = {}


def is_masked(array: Array) -> npt.NDArray[np.bool_]:
    """Where an element is all but the lowest that its type allows, as a mask and a score beside it are."""
    if not np.issubdtype(array.dtype, np.floating):
        return np.zeros(array.shape, bool)
    masked: npt.NDArray[np.bool_] = array <= 0.99 * float(np.finfo(array.dtype).min)
    return masked


def swap_middle(array: Array) -> Array:
    """(batch, heads, sequence, size) to (batch, sequence, heads, size), and back."""
    return array.transpose(0, 2, 1, 3)


def hide_padding(array: Array, case: Case) -> Array:
    """Zeros where a case has padding, in every axis after the first that is as long as its positions.

    What is computed there means nothing, and kernels differ in it.
    """
    if case.tokens is None or case.tokens.all() or array.ndim < 2:
        return array
    batch, total = case.tokens.shape
    ids = case.feeds.get("input_ids")
    new = ids.shape[1] if ids is not None else total
    if array.shape[0] != batch:
        # Some graphs put batch and positions into one axis.
        if array.shape[0] == batch * new:
            keep = case.tokens[:, total - new :].reshape(-1, *(1,) * (array.ndim - 1))
            return np.where(keep, array, 0).astype(array.dtype)
        return array
    by_size = {total: case.tokens, new: case.tokens[:, total - new :]}
    axes = [axis for axis in range(1, array.ndim) if array.shape[axis] in by_size]
    if array.ndim == 4 and axes[:1] == [1] and axes != [1]:
        # The number of heads happens to be that of the positions.
        axes = axes[1:]
    for axis in axes:
        tokens = by_size[array.shape[axis]]
        if not tokens.all():
            shape = [1] * array.ndim
            shape[0], shape[axis] = batch, array.shape[axis]
            array = np.where(tokens.reshape(shape), array, 0).astype(array.dtype)
    return array


@functools.cache
def _signs() -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0]), _SIGNS).reshape(-1, _SKETCH_SIZE)


def _sketch(array: Array) -> npt.NDArray[np.float64]:
    flat = np.asarray(array, np.float64).reshape(-1)
    result: npt.NDArray[Any] = np.zeros(_SKETCH_SIZE)
    for begin in range(0, flat.size, _SIGNS):
        part = flat[begin : begin + _SIGNS]
        padded = np.zeros(-(-part.size // _SKETCH_SIZE) * _SKETCH_SIZE)
        padded[: part.size] = part
        rows = padded.reshape(-1, _SKETCH_SIZE)
        # A sign for each element; another turn for each block, so that equal blocks do not add up.
        signs = np.roll(_signs(), begin // _SIGNS * 7919, axis=1) if begin else _signs()
        result += (rows * signs[: len(rows)]).sum(axis=0)
    return result
