"""Examples as token ids, and the batches that they are seen in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsmith.errors import BadInputError

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORED", "KINDS", "Example", "Examples", "inputs_of"]

# What a task's labels are: the number of a class, a value, a class for each token, the next token, or none,
# because what is taught is an embedding.
KINDS = ("class", "value", "tokens", "next", "embedding")
# The label that cross entropy skips.
IGNORED = -100
# Batches whose examples are sorted by length together.
_BUCKET = 50


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        ids: Token ids.
        label: What is right: a class, a value, or a class for each token; None where nobody knows.
        type_ids: Segment of each token, for models that take it.
    """

    ids: Sequence[int]
    label: int | float | Sequence[int] | None = None
    type_ids: Sequence[int] | None = None


class Examples:
    """Examples of one kind, with what fills the shorter ones of a batch up.

    Args:
        rows: The examples.
        kind: What their labels are, from ``KINDS``.
        pad_id: Token that fills up.
        inputs: Names of the inputs that the model takes, of ``input_ids``, ``attention_mask`` and
            ``token_type_ids``.

    Raises:
        BadInputError: No rows, an unknown kind, or a row that fits it not.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        *,
        kind: str,
        pad_id: int = 0,
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
    ) -> None:
        if kind not in KINDS:
            raise BadInputError("training: kind", got=repr(kind), expected=f"one of {', '.join(KINDS)}")
        if not rows:
            raise BadInputError("training: examples", got="none", expected="at least one")
        least = 2 if kind == "next" else 1
        for number, row in enumerate(rows):
            if len(row.ids) < least:
                raise BadInputError(
                    f"training: example {number + 1}", got=f"{len(row.ids)} tokens",
                    expected=f"at least {least}",
                )  # fmt: skip
            if kind == "tokens" and row.label is not None and len(_each(row.label)) != len(row.ids):
                raise BadInputError(
                    f"training: example {number + 1}",
                    got=f"{len(row.ids)} tokens and {len(_each(row.label))} labels",
                    expected="a label for each token",
                )
        self.rows, self.kind, self.pad_id, self.inputs = tuple(rows), kind, pad_id, tuple(inputs)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labelled(self) -> int:
        """How many have a label; a text is its own."""
        if self.kind == "next":
            return len(self.rows)
        return sum(row.label is not None for row in self.rows)

    def take(self, numbers: Sequence[int]) -> Examples:
        """Some of them."""
        return Examples(
            [self.rows[n] for n in numbers], kind=self.kind, pad_id=self.pad_id, inputs=self.inputs
        )

    def digest(self) -> str:
        """The SHA-256 of all of it."""
        content = [self.kind, self.pad_id, self.inputs]
        found = hashlib.sha256(json.dumps(content).encode())
        for row in self.rows:
            parts = [_plain(row.ids), _plain(row.label), _plain(row.type_ids)]
            found.update(json.dumps(parts).encode())
        return found.hexdigest()

    def batch(self, numbers: Sequence[int], *, device: str = "cpu") -> dict[str, torch.Tensor]:
        """A batch, padded on the right to its longest example.

        Returns:
            The model's inputs, each (rows, tokens), and ``labels``: (rows,) for classes and values,
            (rows, tokens) for tokens and texts. Classes without a label are ``IGNORED``, values are NaN.
        """
        import torch

        rows = [self.rows[n] for n in numbers]
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        types = torch.zeros((len(rows), length), dtype=torch.int64)
        for place, row in enumerate(rows):
            count = len(row.ids)
            ids[place, :count] = torch.as_tensor(row.ids, dtype=torch.int64)
            mask[place, :count] = 1
            if row.type_ids is not None:
                types[place, :count] = torch.as_tensor(row.type_ids, dtype=torch.int64)
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        made = {name: known[name] for name in self.inputs}
        made["attention_mask"] = mask
        labels = self._labels(rows, ids, mask)
        if labels is not None:
            made["labels"] = labels
        return {name: tensor.to(device) for name, tensor in made.items()}

    def _labels(self, rows: Sequence[Example], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        import torch

        if self.kind == "class":
            return torch.tensor([IGNORED if r.label is None else r.label for r in rows], dtype=torch.int64)
        if self.kind == "value":
            return torch.tensor([math.nan if r.label is None else r.label for r in rows], dtype=torch.float32)
        if self.kind == "next":
            return ids.masked_fill(mask == 0, IGNORED)
        if self.kind == "tokens":
            labels = torch.full_like(ids, IGNORED)
            for place, row in enumerate(rows):
                if row.label is not None:
                    labels[place, : len(row.ids)] = torch.as_tensor(_each(row.label), dtype=torch.int64)
            return labels
        return None

    def order(self, batch: int, *, seed: int, epoch: int) -> list[list[int]]:
        """The batches of an epoch: shuffled, with examples of about the same length together.

        It follows from its arguments alone, so training that goes on after an interruption sees what it
        would have seen.
        """
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(self.rows))
        batches: list[list[int]] = []
        for begin in range(0, len(shuffled), batch * _BUCKET):
            bucket = sorted(
                (int(n) for n in shuffled[begin : begin + batch * _BUCKET]),
                key=lambda n: len(self.rows[n].ids),
            )
            batches += [bucket[i : i + batch] for i in range(0, len(bucket), batch)]
        return [batches[int(n)] for n in random.permutation(len(batches))]

    def split(self, share: float, *, seed: int) -> tuple[Examples, Examples]:
        """A larger and a smaller part, drawn by chance, with the same share of each class.

        Args:
            share: Of the labelled examples, in the smaller part. Examples without a label stay in the larger.
            seed: Of the draw.

        Raises:
            BadInputError: One of the parts would be empty.
        """
        if not 0 < share < 1:
            raise BadInputError("training: validation_share", got=str(share), expected="between 0 and 1")
        drawn = self._drawn(seed)
        # Every so manyth in the order of the classes.
        held = {n for i, n in enumerate(drawn) if math.floor((i + 1) * share) > math.floor(i * share)}
        if not held or len(held) == len(self):
            raise BadInputError(
                "training: held-out examples", got=f"{len(held)} of {len(self)} examples",
                expected="some in each part", remedy="Give more examples, or validation data of its own",
            )  # fmt: skip
        return self.take([n for n in range(len(self)) if n not in held]), self.take(sorted(held))

    def folds(self, count: int, *, seed: int) -> list[list[int]]:
        """The numbers of the labelled examples in parts of equal size with equal shares of each class.

        Raises:
            BadInputError: Fewer examples than parts.
        """
        drawn = self._drawn(seed)
        if count < 2 or len(drawn) < count:
            raise BadInputError(
                "training: folds", got=f"{len(drawn)} labelled examples in {count} parts",
                expected="at least two parts, and an example for each",
            )  # fmt: skip
        return [sorted(drawn[start::count]) for start in range(count)]

    def _drawn(self, seed: int) -> list[int]:
        """The numbers of the labelled examples in an order drawn by chance, class by class."""
        usable = [n for n, row in enumerate(self.rows) if row.label is not None or self.kind in _SELF_TAUGHT]
        shuffled = [usable[int(n)] for n in np.random.default_rng(seed).permutation(len(usable))]
        if self.kind == "class":
            # Stable: within a class the order stays drawn by chance.
            shuffled.sort(key=lambda n: self.rows[n].label)  # type: ignore[arg-type,return-value]
        return shuffled


_SELF_TAUGHT = frozenset({"next", "embedding"})


def _each(label: Any) -> Sequence[int]:
    if isinstance(label, int | float):
        raise BadInputError("training: label", got=str(label), expected="a label for each token")
    found: Sequence[int] = label
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return [int(v) for v in value]


def inputs_of(accepted: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the inputs that ``forward`` takes, those that examples have."""
    return tuple(n for n in ("input_ids", "attention_mask", "token_type_ids") if n in accepted)
