"""The interface that every backend implements: open a model, run it, close it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import FeedError, UnknownNameError
from onnxsmith.package import CachePair, TensorSpec, cache_pairs
from onnxsmith.runtime.row_lengths import fits_lengths, run_without_padding

__all__ = ["Array", "Feeds", "Session"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Session(abc.ABC):
    """A model that is open on one backend. Use it as a context manager.

    Attributes:
        inputs: The inputs that ``run`` needs.
        outputs: The outputs that ``run`` returns.
        provider: Where it runs: ``torch`` or an execution provider of ONNX Runtime.
        name: For messages and reports.
        cache_scales: For inputs and outputs of a KV cache in 8 bits, what a code is multiplied with.
        most_alike: Calls of up to so many positions are computed alike, longer ones in another way; None
            where all are computed alike.
        rows_interact: Whether what a row gives depends on the other rows of its batch.
        positions: How many it has, for prompt and continuation together; None where nothing says.
        reads_lengths: Whether attention takes lengths of rows and not a mask, so that it would misread
            padding on the left; see ``package.reads_lengths``. ``run`` then runs such rows without it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provider: str
    name: str
    cache_scales: Mapping[str, Array] = {}
    most_alike: int | None = None
    rows_interact: bool = False
    positions: int | None = None
    reads_lengths: bool = False

    @property
    def cache(self) -> tuple[CachePair, ...]:
        """The KV cache: which input takes the tensor that which output gives. Empty without a cache."""
        return cache_pairs(self.inputs, self.outputs)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the model once.

        Args:
            feeds: One array for each input.
            outputs: Names of the wanted outputs; all of them where None.

        Returns:
            Output name to array.

        Raises:
            FeedError: An input is missing, unknown, or of another type, rank or size.
            UnknownNameError: No such output.
        """
        checked = self._check(feeds)
        names = [spec.name for spec in self.outputs]
        for name in outputs or ():
            if name not in names:
                raise UnknownNameError(self.name, name=name, known=names, kind="output")
        wanted = list(outputs) if outputs is not None else names
        if self.reads_lengths and {"input_ids", "attention_mask"} <= checked.keys():
            mask = checked["attention_mask"].astype(bool)
            if not fits_lengths(mask, checked["input_ids"].shape[1]):
                return run_without_padding(self._run, checked, wanted, cache=self.cache, name=self.name)
        return self._run(checked, wanted)

    def decoder(self, *, capacity: int = 0) -> Any:
        """A decoder that keeps its cache where the model runs; None where ``open_decoder`` has a better.

        Args:
            capacity: Positions that the cache will need, where that is known.
        """
        return None

    def placement(self) -> Any:
        """Which provider got which nodes, as a ``Placement``; None where there is but one that could."""
        return None

    def check(self, feeds: Feeds) -> None:
        """Refuses what ``run`` would refuse, without running.

        Raises:
            FeedError: An input is missing, or of another type or shape.
            UnknownNameError: An input that there is not.
        """
        self._check(feeds)

    def kernels(self) -> dict[str, str]:
        """Nodes that ran, with their operators; nothing for a backend that does not record them."""
        return {}

    @abc.abstractmethod
    def _run(self, feeds: dict[str, Array], outputs: list[str]) -> dict[str, Array]:
        """Runs feeds that are known to fit."""

    def close(self) -> None:  # noqa: B027 - a backend may have nothing to free
        """Frees the model. Closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, feeds: Feeds) -> dict[str, Array]:
        specs = {spec.name: spec for spec in self.inputs}
        for name in feeds:
            if name not in specs:
                raise UnknownNameError(self.name, name=name, known=specs, kind="input")
        missing = [name for name in specs if name not in feeds]
        if missing:
            raise FeedError(
                self.name,
                got=f"no value for {', '.join(missing[:4])}",
                expected="; ".join(str(specs[name]) for name in missing[:4]),
            )
        sizes: dict[str, tuple[int, str]] = {}
        return {name: _fit(np.asarray(feeds[name]), spec, sizes, self.name) for name, spec in specs.items()}


def _fit(array: Array, spec: TensorSpec, sizes: dict[str, tuple[int, str]], where: str) -> Array:
    place = f"{where}: input {spec.name!r}"
    if spec.dtype != "unknown" and str(array.dtype) != spec.dtype:
        # The only conversion that cannot lose anything is between widths of integers that hold the values.
        if np.issubdtype(array.dtype, np.integer) and spec.dtype in ("int32", "int64"):
            info = np.iinfo(spec.dtype)
            if array.size == 0 or (info.min <= int(array.min()) and int(array.max()) <= info.max):
                return _fit(array.astype(spec.dtype), spec, sizes, where)
        raise FeedError(place, got=f"element type {array.dtype}", expected=spec.dtype)
    if spec.shape is None:
        return array
    if array.ndim != len(spec.shape):
        raise FeedError(place, got=f"shape {array.shape}", expected=str(spec))
    for axis, (size, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            raise FeedError(place, got=f"{size} on axis {axis} of shape {array.shape}", expected=str(spec))
        if isinstance(wanted, str):
            known, first = sizes.setdefault(wanted, (size, spec.name))
            if known != size:
                raise FeedError(
                    place,
                    got=f"{size} on axis {axis} ({wanted})",
                    expected=f"{known}, as in input {first!r}",
                )
    return array
