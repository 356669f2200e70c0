"""Weights that are rounded in a process of their own, while PyTorch is imported and traces the model.

Python traces on one processor, and what a weight becomes in blocks does not depend on the graph. So a process
rounds the matrices of a checkpoint from the beginning, as ``quantize_weights`` will be asked to; whoever
writes the graph takes what is there. It is the same to the bit: blocks do not depend on each other. What was
not foreseen (another format, a weight that a pass changed) or is not ready yet is rounded as always.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith import errors
from onnxsmith.graph_passes.blocks import QuantizedBlocks
from onnxsmith.graph_passes.contract import GraphPass
from onnxsmith.stored_rows import StoredMatrix, StoredRows

__all__ = ["RoundedAhead", "rounding_ahead"]

_START = """
import sys
sys.path.insert(0, sys.argv[1])
from onnxsmith.graph_passes.rounding_worker import main
main()
"""
_WIDTHS: Mapping[str, npt.DTypeLike] = {
    "codes": np.uint8, "scales": np.float32, "zero_points": np.uint8, "minimums": np.float32,
}  # fmt: skip


@contextlib.contextmanager
def rounding_ahead(
    matrices: Sequence[StoredMatrix], passes: Sequence[GraphPass], *, directory: Path | None = None
) -> Iterator[RoundedAhead | None]:
    """While open, a process rounds matrices as the first pass that quantizes weights will.

    Args:
        matrices: Where they are.
        passes: What will run.
        directory: Where there is room for rounded weights; that of temporary files where None, which may be
            in memory.

    Yields:
        What is ready; None where there is nothing to do ahead, or no room or process for it.
    """
    found = next(filter(None, map(_settings, passes)), None)
    if found is None or not hasattr(os, "pwrite"):
        yield None
        return
    settings, embedding_size = found
    # Layers first. A matrix that is one of its kind is the embedding.
    alike = Counter(one.shape for one in matrices)
    wanted = []
    for one in sorted(matrices, key=lambda one: -alike[one.shape]):
        own = embedding_size if alike[one.shape] == 1 and embedding_size else settings["block_size"]
        if one.shape[1] % own == 0:
            wanted.append((one, {**settings, "block_size": own}))
    if not wanted:
        yield None
        return
    try:
        ahead = RoundedAhead(wanted, directory)
    except OSError:
        yield None
        return
    try:
        yield ahead
    finally:
        ahead.close()


def _settings(one: GraphPass) -> tuple[dict[str, Any], int] | None:
    """What ``quantize_blocks`` is given for a float32 weight, and the block size of embeddings.

    None where more is needed than the weight.
    """
    given = one.arguments() if one.name == "quantize_weights" else {}
    if given.get("method") != "rtn" or given["balance"]:
        return None
    settings = {
        **{name: given[name] for name in ("bits", "block_size", "symmetric", "minimums", "search_steps")},
        "scale_type": "float16" if given["half_scales"] else "float32",
    }
    return settings, given["embedding_block_size"]


class RoundedAhead:
    """The process, and what it has done."""

    def __init__(
        self, matrices: Sequence[tuple[StoredMatrix, Mapping[str, Any]]], directory: Path | None = None
    ) -> None:
        """Starts it.

        Args:
            matrices: What to round, in this order, with the settings of ``quantize_blocks``.
            directory: Of the file that rounded weights are kept in, which has no name there.

        Raises:
            OSError: The system has no room for the file, or no process.
        """
        self._settings = {(one.file, one.name): dict(settings) for one, settings in matrices}
        self._keys = {one.name: (one.file, one.name) for one, _ in matrices}
        self._done: dict[tuple[Path, str], Mapping[str, Any]] = {}
        self._file, path = tempfile.mkstemp(prefix="onnxsmith-rounded-", dir=directory)
        # Without a name it is gone as soon as neither process has it open.
        os.unlink(path)
        work = {
            "file": self._file,
            "matrices": [
                [one.name, str(one.file), one.dtype, list(one.shape), one.offset, settings]
                for one, settings in matrices
            ],
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(Path(errors.__file__).parents[1])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                pass_fds=[self._file],
                # Ctrl-C is for us, who end it.
                start_new_session=True,
            )  # fmt: skip
        except OSError:
            os.close(self._file)
            raise
        self._listener = threading.Thread(target=self._listen, args=(json.dumps(work),), daemon=True)
        self._listener.start()

    def blocks(self, parts: Sequence[StoredRows], settings: Mapping[str, Any]) -> QuantizedBlocks | None:
        """A matrix in blocks.

        Args:
            parts: Which stored rows it has.
            settings: Of ``quantize_blocks``.

        Returns:
            None where it was not foreseen, or is not ready. In that case the process ends: whoever asks has
            nothing better to do than to round the rest, with all processors.
        """
        keys = [(part.file, part.tensor) for part in parts]
        if not keys or any(self._settings.get(key) != dict(settings) for key in keys):
            return None
        if any(not np.array_equal(part.order, np.arange(len(part.order))) for part in parts):
            return None
        if any(key not in self._done for key in keys):
            self._process.terminate()
            return None
        made = [self._read(self._done[key]) for key in keys]
        joined = {name: np.concatenate([one[name] for one in made]) for name in made[0]}
        return QuantizedBlocks(
            codes=joined["codes"], scales=joined["scales"], zero_points=joined.get("zero_points"),
            bits=settings["bits"], block_size=settings["block_size"],
            columns=joined["scales"].shape[1] * settings["block_size"], minimums=joined.get("minimums"),
        )  # fmt: skip

    def close(self) -> None:
        """Ends the process, and forgets what it has done."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        os.close(self._file)

    def _listen(self, work: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError), self._process.stdin as stream:
            stream.write(work.encode() + b"\n")
        with self._process.stdout as lines:
            for line in lines:
                # Half a line is what a process leaves that ends while it writes.
                if line.endswith(b"\n"):
                    answer = json.loads(line)
                    self._done[self._keys[answer["name"]]] = answer["places"]

    def _read(self, places: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        found = {}
        for name, (offset, shape) in places.items():
            width = np.dtype(_WIDTHS[name])
            content, end = b"", offset + math.prod(shape) * width.itemsize
            while offset < end:
                taken = os.pread(self._file, end - offset, offset)
                if not taken:
                    raise errors.ResourceError("weights rounded ahead", got="their file is cut off")
                content, offset = content + taken, offset + len(taken)
            found[name] = np.frombuffer(content, width).reshape(shape)
        return found
