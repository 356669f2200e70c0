"""What passes need besides a graph: the file that weights came from, and activations on calibration data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from onnxsmith.context_length import context_of_files
from onnxsmith.environment import give_back_memory
from onnxsmith.errors import BadInputError, FeedError
from onnxsmith.package import Component, ModelPackage, TensorSpec, cache_pairs
from onnxsmith.pipeline.step_keys import file_identity
from onnxsmith.pipeline.texts import load_text, text_sha256
from onnxsmith.source import ModelSource, SourceKind, resolve_path

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxsmith.graph_passes.context import PassContext
    from onnxsmith.pipeline.recipe import CalibrationSpec

__all__ = ["CalibrationData", "context_for"]

Feeds = dict[str, npt.NDArray[Any]]
Sample = TypeVar("Sample")

_TIMED_RUNS = 20


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """What activations are measured on.

    Attributes:
        data: A text (see ``load_text``), or an ``.npz`` file with one array for each input, a sample along
            the first axis of each.
        samples: Samples used, from the beginning.
        tokens: Longest sample of a text; the model's positions where it has fewer. A decoder's samples are
            pieces of this length of the whole text, any other model's are its lines.
        base: The directory that a relative path starts from.
        fold: (number, count), to leave one sample of so many out, beginning with that number.
    """

    data: str
    samples: int = 128
    tokens: int = 512
    base: Path | None = None
    fold: tuple[int, int] | None = None

    @classmethod
    def of(cls, spec: CalibrationSpec | None, *, base: Path | None) -> CalibrationData | None:
        """What a recipe asks for.

        Raises:
            BadInputError: There is no such data.
        """
        if spec is None:
            return None
        made = cls(spec.data, spec.samples, spec.tokens, base)
        if spec.data.endswith(".npz"):
            _arrays(resolve_path(spec.data, base=base))
        else:
            load_text(spec.data, base=base)
        return made

    def feeds(self, package: ModelPackage) -> Callable[[Sequence[TensorSpec]], Iterator[Feeds]]:
        """What makes the inputs of the package's model, one sample at a time.

        Raises:
            BadInputError: There is no such data.
            TokenizerError: A text, and a package without a tokenizer.
        """
        if self.data.endswith(".npz"):
            arrays = _arrays(resolve_path(self.data, base=self.base))
            return lambda inputs: self._kept(_slices(arrays, inputs, self.samples, self.data))
        samples = list(self._kept(self._token_ids(package)))
        return lambda inputs: (_text_feeds(inputs, ids) for ids in samples)

    def described(self) -> dict[str, Any]:
        """For the manifest: which data, and how much of it."""
        found: dict[str, Any] = {"data": self.data, "samples": self.samples, "tokens": self.tokens}
        if self.data.endswith(".npz"):
            found["sha256"] = file_identity(resolve_path(self.data, base=self.base))
        else:
            found["sha256"] = text_sha256(load_text(self.data, base=self.base))
        if self.fold is not None:
            found["fold"] = list(self.fold)
        return found

    def _kept(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for number, sample in enumerate(samples):
            if self.fold is None or number % self.fold[1] != self.fold[0]:
                yield sample

    def _token_ids(self, package: ModelPackage) -> list[npt.NDArray[np.int64]]:
        from onnxsmith.pipeline.tokenization import PackageTokenizer

        tokenizer = PackageTokenizer(package)
        text = load_text(self.data, base=self.base)
        tokens = min(self.tokens, context_of_files(package.files) or self.tokens)
        if any(cache_pairs(c.inputs, c.outputs) for c in package.components.values()):
            # A token is at least one byte, so this much text is enough.
            ids = np.array(tokenizer.encode(text[: self.samples * tokens * 16]), np.int64)
            pieces = [ids[i : i + tokens] for i in range(0, len(ids), tokens)][: self.samples]
            return [piece for piece in pieces if len(piece) > 1]
        lines = (line.strip() for line in text.splitlines())
        found: list[npt.NDArray[np.int64]] = []
        for line in (line for line in lines if line):
            found.append(np.array(tokenizer.encode(line)[:tokens], np.int64))
            if len(found) == self.samples:
                break
        return found


def context_for(
    source: ModelSource | None, package: ModelPackage | None = None, data: CalibrationData | None = None
) -> PassContext:
    """The context of passes.

    Args:
        source: What the model was exported from, where known.
        package: The model that the data is for; its tokenizer is used.
        data: Calibration data.

    Raises:
        BadInputError: There is no such data.
        TokenizerError: A text, and a package without a tokenizer.
    """
    from onnxsmith.graph_passes.context import PassContext

    gguf = source.path if source is not None and source.kind is SourceKind.GGUF else None
    if data is None or package is None:
        return PassContext(gguf=gguf)
    feeds = data.feeds(package)

    def activations(model: ir.Model, names: Sequence[str]) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        return _run(model, names, feeds)

    def probe(
        model: ir.Model, samples: int
    ) -> AbstractContextManager[Callable[[Feeds], list[npt.NDArray[Any]]]]:
        return _probe(model, samples, feeds)

    def timings(model: ir.Model) -> Mapping[str, float]:
        return _node_times(model, feeds)

    return PassContext(gguf, activations, probe, timings, data.described())


def _node_times(
    model: ir.Model, feeds: Callable[[Sequence[TensorSpec]], Iterator[Feeds]]
) -> dict[str, float]:
    """Milliseconds of each node in one call: a decoder's with one token, another model's with a sample."""
    from onnxsmith.runtime import OrtSession
    from onnxsmith.runtime.samples import decoder_feeds

    package = ModelPackage({"calibration": Component(model)})
    with OrtSession(package, name="calibration") as session:
        batch = next(feeds(session.inputs), None)
        if batch is None:
            raise BadInputError("calibration", got="data without a sample", expected="at least one")
        if session.cache:
            batch = decoder_feeds(session.inputs, batch["input_ids"][:, :1])
        profile = session.profile(batch, runs=_TIMED_RUNS)
    return {node.name: node.time_us / max(node.calls, 1) / 1e3 for node in profile.nodes}


@contextlib.contextmanager
def _probe(
    model: ir.Model, samples: int, feeds: Callable[[Sequence[TensorSpec]], Iterator[Feeds]]
) -> Iterator[Callable[[Feeds], list[npt.NDArray[Any]]]]:
    import onnx_ir.passes.common as common

    from onnxsmith.runtime import OrtSession

    model.graph.outputs[:] = list(model.graph.outputs)[:1]
    common.RemoveUnusedNodesPass()(model)
    package = ModelPackage({"calibration": Component(model)})
    output = package.main.outputs[0].name
    with OrtSession(package, name="calibration") as session:
        known = tuple(spec for spec in session.inputs if not spec.name.startswith("onnxsmith_"))
        batches = list(itertools.islice(feeds(known), samples))
        if not batches:
            raise BadInputError("calibration", got="data without a sample", expected="at least one")
        yield lambda more: [session.run(batch | more, [output])[output] for batch in batches]


def _run(
    model: ir.Model, names: Sequence[str], feeds: Callable[[Sequence[TensorSpec]], Iterator[Feeds]]
) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
    """Runs a copy of a model whose outputs are the named values; what they do not need is cut off."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    from onnxsmith.runtime import OrtSession

    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    given = {value.name for value in graph.inputs}
    inner = [name for name in names if name not in given]
    outputs = [values[name] for name in inner]
    for value in outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = outputs
    common.RemoveUnusedNodesPass()(copy)
    count = 0
    if inner:
        package = ModelPackage({"calibration": Component(copy)})
        with OrtSession(package, name="calibration") as session:
            for batch in feeds(session.inputs):
                found = session.run(batch, inner)
                yield {name: found[name] if name in found else batch[name] for name in names}
                count += 1
    else:
        # ONNX Runtime refuses a graph without a node, and there is nothing to compute.
        for batch in feeds(ModelPackage({"calibration": Component(model)}).main.inputs):
            yield {name: batch[name] for name in names}
            count += 1
    give_back_memory()
    if not count:
        raise BadInputError("calibration", got="data without a sample", expected="at least one")


def _text_feeds(inputs: Sequence[TensorSpec], ids: npt.NDArray[np.int64]) -> Feeds:
    from onnxsmith.runtime.samples import decoder_feeds

    if any(spec.name.startswith("past_key_values.") for spec in inputs):
        return decoder_feeds(tuple(inputs), ids[None])
    made: Feeds = {}
    for spec in inputs:
        if spec.name == "input_ids":
            made[spec.name] = ids[None]
        elif spec.name == "attention_mask":
            made[spec.name] = np.ones((1, len(ids)), spec.dtype)
        elif spec.name == "token_type_ids":
            made[spec.name] = np.zeros((1, len(ids)), spec.dtype)
        elif spec.name == "position_ids":
            made[spec.name] = np.arange(len(ids))[None].astype(spec.dtype)
        else:
            raise FeedError(
                f"calibration: input {spec.name!r}",
                got="a text as data, and an input that is not made of text",
                expected="input_ids, attention_mask, token_type_ids, position_ids",
                remedy="Give an .npz file with one array for each input",
            )
    return made


def _arrays(path: Path) -> Feeds:
    try:
        # Opened here, because numpy leaves its own file open where the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInputError(
            f"calibration data {path}",
            got=f"cannot be read: {error}",
            expected="an .npz file with one array for each input, a sample along the first axis",
        ) from error
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise BadInputError(
            f"calibration data {path}",
            got=f"samples along the first axis: {lengths or 'no array'}",
            expected="the same number, at least one, in every array",
        )
    return arrays


def _slices(arrays: Feeds, inputs: Sequence[TensorSpec], samples: int, where: str) -> Iterator[Feeds]:
    names = [spec.name for spec in inputs]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise FeedError(
            f"calibration data {where}", got=f"no array {missing[0]!r}", expected=", ".join(names)
        )
    for index in range(min(samples, len(arrays[names[0]]))):
        yield {name: arrays[name][index : index + 1] for name in names}
