"""The process that rounds weights ahead: reads what to do from its input, and says which weight is done.

``RoundedAhead`` starts it. It needs numpy only, and reads weights from safetensors files by their places.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.blocks import quantize_blocks

__all__ = ["main", "read_matrix"]

# Lower than whoever traces a model meanwhile: that takes longer.
_NICENESS = 10


def read_matrix(file: str, dtype: str, shape: tuple[int, int], offset: int) -> npt.NDArray[np.float32]:
    """A matrix of a file in float32.

    Args:
        file: Its path.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        shape: (N, K).
        offset: Where its first byte is.
    """
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    data = np.memmap(file, stored, "r", offset, shape)
    if dtype == "bfloat16":
        # The upper half of a float32.
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(data, np.float32)


def _rounded(work: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    end = 0
    for name, file, dtype, shape, offset, settings in work["matrices"]:
        try:
            matrix = read_matrix(file, dtype, tuple(shape), offset)
            blocks = quantize_blocks(matrix, **settings, name=name)
        except BadInputError:
            # Whoever needs it will say so.
            continue
        places = {}
        for part in ("codes", "scales", "zero_points", "minimums"):
            array = getattr(blocks, part)
            if array is None:
                continue
            content = array.tobytes()
            places[part] = [end, list(array.shape)]
            while content:
                written = os.pwrite(work["file"], content, end)
                content, end = content[written:], end + written
        yield {"name": name, "places": places}


def main() -> None:
    """Works until all is done, or whoever started it is gone."""
    os.nice(_NICENESS)
    work = json.loads(sys.stdin.readline())
    for answer in _rounded(work):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
