"""Token by token: a decoder with its KV cache between calls."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import FeedError
from onnxsmith.package import TensorSpec
from onnxsmith.runtime.ort_session import OrtSession
from onnxsmith.runtime.row_lengths import fits_lengths
from onnxsmith.runtime.samples import decoder_feeds
from onnxsmith.runtime.session import Array, Session

__all__ = ["Decoder", "Mask", "Tokens", "open_decoder"]

Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Where the cache may stay in one buffer on the host. A provider with memory of its own would copy the whole
# buffer to the device and back with every token.
_SHARING_PROVIDERS = frozenset({"CPUExecutionProvider"})
# A buffer that is full grows by this factor, so that all copies together cost as much as one or two.
_GROWTH = 2
_KEPT = "num_logits_to_keep"
_SMALLEST_CAPACITY = 64


class Decoder(abc.ABC):
    """A decoder with its cache: give it tokens, get logits.

    Attributes:
        session: The model.
        length: Positions in the cache, padding included.
    """

    def __init__(self, session: Session) -> None:
        """Starts with an empty cache.

        Raises:
            FeedError: The model has no KV cache or no logits.
        """
        names = [spec.name for spec in session.outputs]
        if not session.cache or "logits" not in names:
            raise FeedError(
                session.name,
                got=f"a model with the outputs {', '.join(names[:4])}",
                expected="a decoder with logits, past_key_values.* and present.*",
            )
        self.session = session
        # Asked for once: the session works them out of its signature, which takes longer than a small layer.
        self._cache = session.cache
        past = {pair.past.name for pair in self._cache}
        self._small = tuple(spec for spec in session.inputs if spec.name not in past)
        self.length = 0
        # None while there is no padding.
        self._mask: Mask | None = None
        self._rows = 0
        self._last_only = False

    def reset(self) -> None:
        """Empties the cache."""
        self.length = 0
        self._mask = None

    def step(self, token_ids: Tokens, mask: Mask | None = None, *, last_only: bool = False) -> Array:
        """Takes tokens and gives their logits.

        Args:
            token_ids: (batch, sequence).
            mask: (batch, sequence), false for padding; all true where None. Padding stays hidden in later
                steps.
            last_only: The caller needs the last position's logits only. Graphs with the optional input
                ``num_logits_to_keep`` then compute no others; all other graphs give all of them.

        Returns:
            (batch, sequence, vocabulary), or with ``last_only`` perhaps (batch, 1, vocabulary).

        Raises:
            FeedError: Another number of rows than the cache has, or padding that lengths cannot say.
        """
        rows, sequence = token_ids.shape
        if self.length and rows != self._rows:
            raise FeedError(
                self.session.name, got=f"{rows} rows", expected=f"{self._rows}, as in the cache",
                remedy="Empty the cache with reset()",
            )  # fmt: skip
        whole = None
        if self._mask is not None or (mask is not None and not mask.all()):
            new = np.ones(token_ids.shape, np.bool_) if mask is None else mask
            known = np.ones((rows, self.length), np.bool_) if self._mask is None else self._mask
            whole = np.concatenate([known, new], axis=1)
            if self.session.reads_lengths:
                self._require_lengths(new)
        self._last_only = last_only
        logits = self._step(token_ids, whole)
        self._mask = whole
        self._rows = rows
        self.length += sequence
        return logits

    def _require_lengths(self, new: Mask) -> None:
        """What a call adds goes behind the tokens of a row, so that only a prompt may end in padding."""
        if not (bool(new.all()) if self.length else fits_lengths(new, new.shape[1])):
            raise FeedError(
                self.session.name,
                got="padding on the left" if not self.length else "padding among tokens that continue a text",
                expected="prompts that are padded on the right, because attention takes lengths of rows",
            )

    def rewind(self, length: int) -> None:
        """Forgets all but the first positions, as if the others had never come.

        Args:
            length: Positions that stay, padding included.

        Raises:
            FeedError: There are not so many, or the model keeps only the last ones.
        """
        if not 0 <= length <= self.length:
            raise FeedError(
                self.session.name, got=f"{length} positions to stay", expected=f"at most {self.length}"
            )
        if length == self.length:
            return
        if length == 0:
            self.reset()
            return
        self._rewind(length)
        self.length = length
        self._mask = None if self._mask is None else self._mask[:, :length]

    @abc.abstractmethod
    def _step(self, token_ids: Tokens, mask: Mask | None) -> Array:
        """One call; the mask covers the cache too, and is None where there is no padding."""

    @abc.abstractmethod
    def _rewind(self, length: int) -> None:
        """Cuts the cache."""


class _ArrayDecoder(Decoder):
    """The cache as numpy arrays, for any backend."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._past: dict[str, Array] | None = None

    def reset(self) -> None:
        super().reset()
        self._past = None

    def _step(self, token_ids: Tokens, mask: Mask | None) -> Array:
        # A cache may keep fewer positions than there are.
        whole = (
            np.ones((len(token_ids), self.length + token_ids.shape[1]), np.bool_) if mask is None else mask
        )
        feeds = decoder_feeds(self.session.inputs, token_ids, mask=whole, past=self._past)
        outputs = self.session.run(feeds)
        self._past = {pair.past.name: outputs[pair.present.name] for pair in self._cache}
        return outputs["logits"]

    def _rewind(self, length: int) -> None:
        past = self._past or {}
        self._past = {name: _cut(array, self.length, length, self.session) for name, array in past.items()}


class _OrtDecoder(Decoder):
    """The cache as ONNX Runtime's own values: what one call returns is given to the next without a copy.

    The operators still write a new cache with every token, because graphs that concatenate need two.
    """

    def __init__(self, session: OrtSession) -> None:
        super().__init__(session)
        self._ort = session
        self._names = ["logits", *(pair.present.name for pair in self._cache)]
        self._cuts = _can_cut(session)
        self._past: dict[str, Any] = {}

    def reset(self) -> None:
        super().reset()
        self._past = {}

    def _step(self, token_ids: Tokens, mask: Mask | None) -> Array:
        feeds = _small_feeds(self._small if self._past else self.session.inputs, token_ids, mask, self.length)
        values = {name: self._ort.ort_value(array) for name, array in feeds.items()}
        if self._last_only and self._cuts:
            values[_KEPT] = self._ort.ort_value(np.array(1, np.int64))
        results = self._ort.run_values(values | self._past, self._names)
        self._past = {pair.past.name: value for pair, value in zip(self._cache, results[1:], strict=True)}
        logits: Array = results[0].numpy()
        return logits

    def _rewind(self, length: int) -> None:
        for name, value in self._past.items():
            array = _cut(value.numpy(), self.length, length, self.session)
            self._past[name] = self._ort.ort_value(array)


class _SharedDecoder(Decoder):
    """The cache in one buffer that a call reads and extends in place: nothing of it is copied per token.

    GroupQueryAttention writes the new keys and values behind those that are there where past and present
    are one buffer. It takes the number of valid positions from its inputs ``seqlens_k`` and
    ``total_sequence_length``, not from the size of the buffer, and so the buffer may be longer.
    """

    def __init__(self, session: OrtSession, capacity: int) -> None:
        super().__init__(session)
        self._ort = session
        self._wanted = capacity
        self._cuts = _can_cut(session)
        logits = next(spec for spec in session.outputs if spec.name == "logits")
        assert logits.shape is not None
        self._vocabulary, self._dtype = int(logits.shape[-1] or 0), np.dtype(logits.dtype)
        self._kept = [session.ort_value(np.array(kept, np.int64)) for kept in (0, 1)] if self._cuts else []
        self._capacity = 0
        self._buffers: dict[str, Array] = {}
        self._binding: Any = None
        self._one: _OneToken | None = None

    def reset(self) -> None:
        """Empties the cache and keeps the buffers, unless another number of rows comes."""
        super().reset()

    def _step(self, token_ids: Tokens, mask: Mask | None) -> Array:
        batch, sequence = token_ids.shape
        self._reserve(batch, self.length + sequence)
        binding = self._binding
        rows = sequence
        feeds: dict[str, Array] = {}
        if self._one is not None and mask is None and sequence == 1:
            self._one.feed(binding, token_ids, self.length)
        else:
            # These must live until the run is over: ONNX Runtime reads and writes their memory.
            feeds = _small_feeds(self._small, token_ids, mask, self.length)
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            if self._one is not None:
                self._one.bound = False
        if self._cuts:
            rows = 1 if self._last_only else sequence
            # An input with a default is none of those that numpy arrays can be bound to.
            binding.bind_ortvalue_input(_KEPT, self._kept[self._last_only])
        logits = np.empty((batch, rows, self._vocabulary), self._dtype)
        _bind(binding.bind_output, "logits", logits)
        self._ort.run_bound(binding)
        return logits

    def _rewind(self, length: int) -> None:
        """Nothing: what lies behind the valid positions is written over."""

    def _reserve(self, batch: int, length: int) -> None:
        rows = next(iter(self._buffers.values())).shape[0] if self._buffers else 0
        if length <= self._capacity and batch == rows:
            return
        capacity = max(self._wanted, length, _SMALLEST_CAPACITY)
        if batch == rows:
            capacity = max(capacity, self._capacity * _GROWTH)
        binding = self._ort.ort_session.io_binding()
        buffers = {}
        for pair in self._cache:
            _, heads, _, size = pair.past.shape or (0, 0, 0, 0)
            buffer = np.zeros((batch, int(heads or 0), capacity, int(size or 0)), np.dtype(pair.past.dtype))
            if self.length:
                buffer[:, :, : self.length] = self._buffers[pair.past.name][:, :, : self.length]
            _bind(binding.bind_input, pair.past.name, buffer)
            _bind(binding.bind_output, pair.present.name, buffer)
            buffers[pair.past.name] = buffer
        self._buffers, self._binding, self._capacity = buffers, binding, capacity
        known = all(spec.name in _OneToken.INPUTS for spec in self._small)
        self._one = _OneToken(self._small, batch, capacity) if known else None


class _OneToken:
    """What a call with one token for each row and no padding reads, in arrays that stay where they are.

    To make and to bind new ones takes longer than a layer of a small model.
    """

    INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})

    def __init__(self, inputs: tuple[TensorSpec, ...], batch: int, capacity: int) -> None:
        types = {spec.name: np.dtype(spec.dtype) for spec in inputs}
        self._mask_type = types.pop("attention_mask", None)
        self._values = {name: np.zeros((batch, 1), dtype) for name, dtype in types.items()}
        self._ones = np.ones((batch, capacity if self._mask_type else 0), self._mask_type)
        self._address = self._ones.ctypes.data
        self.bound = False

    def feed(self, binding: Any, token_ids: Tokens, length: int) -> None:
        """Gives a run its inputs behind so many positions."""
        for name, array in self._values.items():
            array[...] = token_ids if name == "input_ids" else length
            if not self.bound:
                _bind(binding.bind_input, name, array)
        self.bound = True
        if self._mask_type is not None:
            shape = [len(self._ones), length + 1]
            binding.bind_input("attention_mask", "cpu", 0, self._mask_type.type, shape, self._address)


def _cut(array: Array, positions: int, length: int, session: Session) -> Array:
    if array.ndim != 4 or array.shape[2] != positions:
        raise FeedError(
            session.name,
            got=f"a cache of shape {array.shape} after {positions} positions",
            expected="one entry for each position, to go back",
        )
    return array[:, :, :length]


def _can_cut(session: OrtSession) -> bool:
    """Whether the graph has the optional input; inputs with a default are not among a session's inputs."""
    return any(one.name == _KEPT for one in session.ort_session.get_overridable_initializers())


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _small_feeds(
    inputs: tuple[TensorSpec, ...], token_ids: Tokens, mask: Mask | None, length: int
) -> dict[str, Array]:
    """Some inputs, behind so many positions; an empty cache where they have one."""
    feeds = decoder_feeds(inputs, token_ids, mask=mask, past_length=length)
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}


def _shares(session: Session) -> bool:
    """Whether a session can keep its cache in one buffer: the graph allows it, and types are numpy's own."""
    if not isinstance(session, OrtSession) or session.provider not in _SHARING_PROVIDERS:
        return False
    specs = [*(pair.past for pair in session.cache), *(s for s in session.outputs if s.name == "logits")]
    sized = all(
        spec.shape is not None and len(spec.shape) >= 3 and isinstance(spec.shape[-1], int) for spec in specs
    )
    return sized and all(s.dtype in ("float32", "float16", "int8") for s in specs) and session.shares_cache


def open_decoder(session: Session, *, capacity: int = 0) -> Decoder:
    """The fastest decoder for a session.

    Args:
        session: An open model.
        capacity: Positions that the cache will need, where that is known: then it never grows.

    Raises:
        FeedError: The model has no KV cache or no logits.
    """
    if not isinstance(session, OrtSession):
        own: Decoder | None = session.decoder(capacity=capacity)
        return own or _ArrayDecoder(session)
    return _SharedDecoder(session, capacity) if _shares(session) else _OrtDecoder(session)
