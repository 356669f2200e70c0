"""How the axes of a value before and after a Reshape belong together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["reshape_ids"]

Ids = npt.NDArray[np.int64]
_Dim = int | str


def reshape_ids(ids: Ids, before: ir.Value | None, after: ir.Value) -> Ids | None:
    """Channels of a reshaped value, or None where axes that are followed and others are mixed.

    Args:
        ids: Of the value before, one element along axes that are not followed.
        before: The value before.
        after: And after; the shapes of both must be known.
    """
    old, new = _dims(before), _dims(after)
    if old is None or new is None or len(old) != ids.ndim:
        return None
    shape: list[int] = []
    full: list[int] = []
    for first, second in _groups(old, new):
        if all(ids.shape[axis] == 1 for axis in first):
            full += [1] * len(first)
            shape += [1] * len(second)
            continue
        found = _followed([old[a] for a in first], [ids.shape[a] for a in first], [new[a] for a in second])
        if found is None:
            return None
        full += found[0]
        shape += found[1]
    return np.broadcast_to(ids, full).reshape(shape)


def _followed(old: list[_Dim], elements: list[int], new: list[_Dim]) -> tuple[list[int], list[int]] | None:
    """Elements along the axes of a run before and after.

    A named axis left of all others may hold followed ones repeated, such as batch times heads: it has as many
    elements as repeat.
    """
    if any(isinstance(dim, str) for dim in (*old[1:], *new[1:])):
        named = [i for i, dim in enumerate(old) if isinstance(dim, str)]
        if any(elements[i] > 1 for i in named) or named != list(range(len(named))) or len(new) != 1:
            return None
    before = [dim if isinstance(dim, int) else size for dim, size in zip(old, elements, strict=True)]
    total = int(np.prod(before))
    rest = int(np.prod([dim for dim in new if isinstance(dim, int)], dtype=np.int64))
    if total % rest:
        return None
    after = [dim if isinstance(dim, int) else 1 for dim in new]
    if isinstance(new[0], str):
        after[0] = total // rest
    return (before, after) if int(np.prod(after)) == total else None


def _dims(value: ir.Value | None) -> list[_Dim] | None:
    if value is None or value.shape is None:
        return None
    found: list[_Dim] = []
    for number, dim in enumerate(value.shape):
        # An axis without a name is like no other.
        name = dim if isinstance(dim, int) else dim.value or f"?{id(value)}.{number}"
        found.append(name)
    return found


def _groups(old: list[_Dim], new: list[_Dim]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both sides that hold the same elements.

    Found from right to left. Where sizes are not known, all that is left of there is one run.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i, j = len(old), len(new)
    while i or j:
        if _match(old[:i], new[:j]):
            i, j = i - 1, j - 1
            groups.append(([i], [j]))
            continue
        first, second = i, j
        left = right = 1
        while (i, j) == (first, second) or left != right:
            from_old = (left <= right and i > 0) or not j
            dim = old[i - 1] if from_old and i else new[j - 1] if j else None
            if not isinstance(dim, int):
                i = j = 0
                break
            if from_old:
                left, i = left * dim, i - 1
            else:
                right, j = right * dim, j - 1
        groups.append((list(range(i, first)), list(range(j, second))))
    return groups[::-1]


def _match(old: list[_Dim], new: list[_Dim]) -> bool:
    """Whether the last axis of one side is that of the other.

    Names may differ where a shape was inferred twice. As many named axes on both sides are the same ones,
    because a Reshape keeps the number of elements.
    """
    if not old or not new:
        return False
    if isinstance(old[-1], int) or isinstance(new[-1], int):
        return old[-1] == new[-1]
    return sum(isinstance(d, str) for d in old) == sum(isinstance(d, str) for d in new)
