"""Inputs to compare with: several shapes, padding, and a cache that is not empty."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.context_length import POSITIONS, context_of_files
from onnxsmith.errors import FeedError
from onnxsmith.package import ModelPackage, TensorSpec
from onnxsmith.program import AxisSizes
from onnxsmith.runtime.session import Array, Session

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Case",
    "cases_for",
    "decoder_feeds",
    "load_cases",
    "made_up_values",
    "numpy_dtype",
    "value_limits",
]

# (batch, past length, new tokens, tokens of left padding in the last row). Length 1 and batch 1 are where
# shapes get frozen by accident; padding and a cache are where attention is wrong without an error; the
# long one passes the usual block and tile sizes of kernels.
_DECODER_SHAPES = (
    (1, 0, 1, 0),
    (1, 0, 16, 0),
    (2, 0, 7, 0),
    (2, 0, 9, 4),
    (1, 16, 1, 0),
    (2, 9, 1, 4),
    (1, 12, 5, 0),
    (1, 0, 160, 0),
)
# Sizes of the first and of every other dynamic axis.
_PLAIN_SHAPES = ((1, 8), (2, 7), (3, 1), (1, 64), (2, 33))


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: What is special about it, such as ``decode batch=2 past=9``.
        feeds: Input name to array.
        tokens: (batch, total length), true where there is a token and false for padding; None where
            every position counts.
    """

    name: str
    feeds: dict[str, Array]
    tokens: npt.NDArray[np.bool_] | None = None

    def mask_for(self, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, npt.NDArray[np.bool_]] | None:
        """Which positions of an output count.

        Returns:
            The axis of the positions and a mask (batch, positions); None where all count.
        """
        if self.tokens is None or self.tokens.all():
            return None
        batch, total = self.tokens.shape
        axes = spec.shape or ()
        for axis in range(1, len(shape)):
            named = axes[axis] if axis < len(axes) else None
            if shape[0] != batch or not isinstance(named, str):
                continue
            if shape[axis] == total and named != "sequence":
                return axis, self.tokens
            if named == "sequence" or shape[axis] < total:
                return axis, self.tokens[:, total - shape[axis] :]
        return None


def cases_for(
    reference: Session,
    *,
    limits: Mapping[str, int],
    samples: int | None = None,
    seed: int = 0,
    sizes: tuple[int, int] | None = None,
    axis_limits: Mapping[str, AxisSizes] | None = None,
    fixed: Mapping[str, tuple[int | None, ...]] | None = None,
    left_padding: bool = True,
) -> Iterator[Case]:
    """Makes inputs of several shapes for a model.

    For a decoder, the cache of a decoding case is one that the reference itself filled.

    Args:
        reference: The model that is right; its signature says which inputs there are.
        limits: For integer inputs, one above the highest valid value; that of ``position_ids`` bounds how
            long inputs are.
        samples: How many cases; all kinds where None.
        seed: Of the random numbers.
        sizes: (batch, other dynamic axes), for one case of that size.
        axis_limits: For dynamic axes by name, the sizes that run.
        fixed: By input, the sizes of axes that candidates have fixed; None for others.
        left_padding: Whether rows of a decoder may be padded on the left. Prompts are padded on the right
            instead where not, and nothing is padded after a cache.
    """
    random = np.random.default_rng(seed)
    if reference.cache:
        decoder_shapes = ((sizes[0], 0, sizes[1], 0),) if sizes else _DECODER_SHAPES
        for shape in _within(decoder_shapes[:samples], limits.get(POSITIONS)):
            yield _decoder_case(reference, limits, random, *shape, left=left_padding)
        return
    bounds = {**_length_limits(reference.inputs, limits), **(axis_limits or {})}
    known: set[tuple[int, ...]] = set()
    for number, (first, rest) in enumerate((sizes,) if sizes else _PLAIN_SHAPES[:samples]):
        found: dict[str, int] = {}
        feeds, tokens = made_up_values(
            reference.inputs,
            found,
            limits=limits,
            random=random,
            first=first,
            rest=rest,
            axis_limits=bounds,
            fixed=fixed or {},
            pad=number == 4,
        )
        made = tuple(found.values())
        if made in known and tokens is None:
            # The same sizes again, because most are fixed or bounded.
            continue
        known.add(made)
        described = " ".join(f"{name}={size}" for name, size in found.items()) or "fixed shapes"
        yield Case(described + (" right-padding" if tokens is not None else ""), feeds, tokens)


def _within(
    shapes: Sequence[tuple[int, int, int, int]], positions: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Decoder shapes that a model of so many positions can take, each once."""
    known: set[tuple[int, int, int, int]] = set()
    for batch, past, new, padding in shapes:
        fitting = (batch, past, new, padding)
        if positions is not None:
            tokens = min(new, positions - 1 if past else positions)
            before = min(past, positions - tokens)
            fitting = (batch, before, tokens, min(padding, before + tokens - 1))
        if fitting not in known:
            known.add(fitting)
            yield fitting


def _length_limits(inputs: tuple[TensorSpec, ...], limits: Mapping[str, int]) -> dict[str, AxisSizes]:
    """The axis of tokens, and how long it may be, where that is known."""
    ids = next((spec for spec in inputs if spec.name == "input_ids"), None)
    axis = ids.shape[1] if ids is not None and ids.shape and len(ids.shape) == 2 else None
    return {axis: AxisSizes(1, limits[POSITIONS])} if isinstance(axis, str) and POSITIONS in limits else {}


def decoder_feeds(
    inputs: tuple[TensorSpec, ...],
    token_ids: npt.NDArray[np.int64],
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    past: Mapping[str, Array] | None = None,
    past_length: int = 0,
) -> dict[str, Array]:
    """The inputs of a decoder for given tokens.

    Args:
        inputs: The decoder's signature.
        token_ids: New tokens, (batch, sequence).
        mask: (batch, past + sequence), false for padding; all true where None.
        past: Cache inputs by name; an empty cache where None.
        past_length: Positions in the cache, where the caller binds the cache itself.

    Raises:
        FeedError: An input that a decoder is not known to have.
    """
    batch, sequence = token_ids.shape
    length = past_length
    if past:
        length = next(iter(past.values())).shape[2]
    tokens = np.ones((batch, length + sequence), np.bool_) if mask is None else mask
    feeds: dict[str, Array] = {}
    for spec in inputs:
        if spec.name == "input_ids":
            feeds[spec.name] = token_ids
        elif spec.name == "attention_mask":
            feeds[spec.name] = tokens.astype(spec.dtype)
        elif spec.name == "position_ids":
            positions = np.maximum(np.cumsum(tokens, axis=1) - 1, 0)
            feeds[spec.name] = positions[:, length:].astype(spec.dtype)
        elif spec.name.startswith("past_key_values."):
            if past:
                feeds[spec.name] = past[spec.name]
            else:
                feeds[spec.name] = _empty_cache(spec, batch)
        elif spec.name == "use_cache_branch":
            feeds[spec.name] = np.array([length > 0])
        else:
            raise FeedError(
                f"input {spec.name!r}",
                got="an input that decoders are not known to have",
                expected="input_ids, attention_mask, position_ids, past_key_values.*",
                remedy="Give the inputs with --inputs FILE.npz",
            )
    return feeds


def _empty_cache(spec: TensorSpec, batch: int) -> Array:
    axes = spec.shape or ()
    sizes = [size if isinstance(size, int) else 0 for size in axes]
    if len(axes) == 4 and not (sizes[1] and sizes[3]):
        raise FeedError(
            f"input {spec.name!r}", got=str(spec),
            expected="(batch, heads, length, size of a head) with fixed heads and sizes",
            remedy="Fix them with the pass set_axes, or give the inputs with --inputs FILE.npz",
        )  # fmt: skip
    return np.zeros([batch, *sizes[1:]], numpy_dtype(spec.dtype))


def _decoder_case(
    reference: Session,
    limits: Mapping[str, int],
    random: np.random.Generator,
    batch: int,
    past_length: int,
    new: int,
    padding: int,
    *,
    left: bool,
) -> Case:
    limit = limits.get("input_ids", 2)
    ids = random.integers(0, limit, (batch, past_length + new), dtype=np.int64)
    mask = np.ones(ids.shape, np.bool_)
    if not left and past_length:
        padding = 0
    if padding:
        mask[-1, slice(padding) if left else slice(-padding, None)] = False
    past = None
    if past_length:
        feeds = decoder_feeds(reference.inputs, ids[:, :past_length], mask=mask[:, :past_length])
        filled = reference.run(feeds, [pair.present.name for pair in reference.cache])
        past = {pair.past.name: filled[pair.present.name] for pair in reference.cache}
    name = f"{'decode' if past_length else 'prefill'} batch={batch} length={new}"
    name += f" past={past_length}" if past_length else ""
    name += f" {'left' if left else 'right'}-padding={padding}" if padding else ""
    return Case(name, decoder_feeds(reference.inputs, ids[:, past_length:], mask=mask, past=past), mask)


def made_up_values(
    inputs: tuple[TensorSpec, ...],
    sizes: dict[str, int],
    *,
    limits: Mapping[str, int],
    random: np.random.Generator,
    first: int,
    rest: int,
    axis_limits: Mapping[str, AxisSizes],
    fixed: Mapping[str, tuple[int | None, ...]],
    pad: bool,
) -> tuple[dict[str, Array], npt.NDArray[np.bool_] | None]:
    """Makes values for inputs.

    Args:
        inputs: What is needed.
        sizes: Sizes of dynamic axes by name; those that are not there yet are added.
        limits: For integer inputs, one above the highest valid value.
        random: Where values come from.
        first: Size of the batch.
        rest: Size of other dynamic axes.
        axis_limits: The sizes of axes that run.
        fixed: By input, sizes of axes that are given; None for others.
        pad: Whether the last row ends in padding, where there is a mask.

    Returns:
        Values by name, and which tokens count; None where all do.
    """
    kinds: dict[str, bool] = {}
    for spec in inputs:
        given = fixed.get(spec.name, ())
        for axis, size in enumerate(spec.shape or ()):
            if not isinstance(size, str) or size in sizes:
                continue
            is_batch = axis == 0 or size == "batch" or size.endswith("_batch")
            wanted = first if is_batch else rest
            # Another size for each axis of a kind, so that none can be taken for another.
            before = [name for name, kind in kinds.items() if kind == is_batch]
            wanted += len(before) if wanted > 1 or is_batch else 0
            kinds[size] = is_batch
            wanted = axis_limits.get(size, AxisSizes()).nearest(wanted)
            known = given[axis] if axis < len(given) else None
            sizes[size] = wanted if known is None else known
    feeds: dict[str, Array] = {}
    tokens = None
    for spec in inputs:
        shape = tuple(
            size if isinstance(size, int) else sizes.get(size or "", first if axis == 0 else rest)
            for axis, size in enumerate(spec.shape or ())
        )
        feeds[spec.name] = _values(spec, shape, limits.get(spec.name), random)
        if spec.name == "attention_mask" and pad and len(shape) == 2 and shape[1] > 4:
            tokens = np.ones(shape, np.bool_)
            tokens[-1, -shape[1] // 3 :] = False
            feeds[spec.name] = tokens.astype(spec.dtype)
    return feeds, tokens


def _values(
    spec: TensorSpec, shape: tuple[int, ...], limit: int | None, random: np.random.Generator
) -> Array:
    dtype = numpy_dtype(spec.dtype)
    if spec.name == "attention_mask":
        return np.ones(shape, dtype)
    if spec.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(np.bool_)
    if np.issubdtype(dtype, np.integer):
        return random.integers(0, limit or 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a name, those of ``ml_dtypes`` included."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype


def value_limits(package: ModelPackage) -> dict[str, int]:
    """For each integer input of the package, one above the highest value that its tables can be indexed with.

    Found from the Gather nodes that an input leads to, so it holds for graphs of any origin; else from
    ``vocab_size`` in config.json. ``position_ids`` is there for every model whose configuration says how
    many positions it has, whether it has the input or finds positions itself.
    """
    limits: dict[str, int] = {}
    for component in package.components.values():
        for value in component.model.graph.inputs:
            if value.dtype is not None and value.dtype.is_integer() and value.name:
                found = _table_rows(value)
                if found:
                    limits[value.name] = min(found)
    if "input_ids" not in limits and "config.json" in package.files:
        vocabulary = json.loads(package.files["config.json"]).get("vocab_size")
        if isinstance(vocabulary, int):
            limits["input_ids"] = vocabulary
    context = context_of_files(package.files)
    if context is not None and "input_ids" in limits:
        limits[POSITIONS] = min(context, limits.get(POSITIONS, context))
    return limits


def _table_rows(value: ir.Value) -> list[int]:
    rows: list[int] = []
    for node, index in value.uses():
        if node.op_type in ("Gather", "GatherBlockQuantized") and index == 1:
            table = node.inputs[0]
            if table is not None and table.const_value is not None:
                rows.append(table.const_value.shape.numpy()[0])
        elif node.op_type == "GatherPacked" and index == 0:
            rows.append(node.attributes["N"].as_int())
        elif (
            node.op_type in ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze") and index == 0
        ):
            rows += _table_rows(node.outputs[0])
    return rows


def load_cases(path: Path, inputs: tuple[TensorSpec, ...]) -> list[Case]:
    """Reads one case from an ``.npz`` file with one array for each input.

    Raises:
        FeedError: Not such a file, or arrays that cannot be read without pickle.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")
        # Opened here, because numpy leaves its own file open where the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            feeds = {name: data[name] for name in data.files}
    # A single array, from an .npy file, is no context manager: a TypeError.
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise FeedError(
            str(path), got=f"cannot be read: {error}", expected="an .npz file with one array for each input"
        ) from error
    if not feeds:
        raise FeedError(str(path), got="no arrays", expected="; ".join(str(spec) for spec in inputs))
    empty = [name for name, array in feeds.items() if array.ndim and array.shape[0] == 0]
    if empty:
        # An empty cache has rows all the same.
        raise FeedError(
            f"{path}: {empty[0]}", got=f"shape {feeds[empty[0]].shape}", expected="at least one row"
        )
    return [Case(path.name, feeds)]
