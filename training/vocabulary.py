"""Rows of a PyTorch model's embedding that data never use are left out; token ids stay what they are."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError
from onnxsmith.training.units import shared_weights
from onnxsmith.vocabulary_rows import compact_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["prune_vocabulary"]


def prune_vocabulary(module: nn.Module, used: Iterable[int]) -> dict[str, int]:
    """Keeps the rows of the token embedding that are used, behind a table from ids to rows, in place.

    An id whose row went gets the mean of all that went, which is a row that can be trained like the others.

    Args:
        module: A model of transformers.
        used: Ids whose rows stay.

    Returns:
        ``rows_before`` and ``rows_left``.

    Raises:
        BadInputError: It has no plain embedding, or its rows are the output head's too.
    """
    import torch
    from torch import nn

    where = f"vocabulary of {type(module).__name__}"
    find = getattr(module, "get_input_embeddings", None)
    found = find() if find is not None else None
    name = next((name for name, part in module.named_modules() if part is found and name), None)
    if type(found) is not nn.Embedding or name is None:
        if isinstance(found, _compact_embedding()):
            raise BadInputError(where, got="an embedding that was pruned already", expected="a whole one")
        raise BadInputError(
            where, got=f"an embedding of type {type(found).__name__}", expected="a plain nn.Embedding"
        )
    shared = shared_weights(module).get(name)
    if shared is not None:
        raise BadInputError(
            where, got=f"an embedding whose weight is that of {shared} too",
            expected="one that is no output head, whose logits need every row",
        )  # fmt: skip
    table = found.weight.detach()
    # A bfloat16 has no type in numpy, and survives float32.
    array = table.float().cpu().numpy()
    made = compact_rows(array, used)
    if made is None:
        return {"rows_before": len(array), "rows_left": len(array)}
    rows, places = made
    weight = torch.from_numpy(rows).to(table)
    padding = None if found.padding_idx is None else int(places[found.padding_idx])
    owner, _, last = name.rpartition(".")
    made_embedding = _compact_embedding()(weight, torch.from_numpy(places).to(table.device), padding)
    made_embedding.weight.requires_grad_(found.weight.requires_grad)
    setattr(module.get_submodule(owner), last, made_embedding.train(found.training))
    return {"rows_before": len(array), "rows_left": len(rows)}


@functools.cache
def _compact_embedding() -> Any:
    """The module, made once torch is needed."""
    from torch import nn

    class CompactEmbedding(nn.Embedding):
        """An embedding that looks up which row an id has."""

        row_of_id: torch.Tensor

        def __init__(self, weight: torch.Tensor, row_of_id: torch.Tensor, padding_idx: int | None) -> None:
            rows, width = weight.shape
            super().__init__(rows, width, padding_idx=padding_idx, _weight=weight.clone())
            self.register_buffer("row_of_id", row_of_id)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            rows = self.row_of_id.index_select(0, input.reshape(-1)).reshape(input.shape)
            return super().forward(rows)

    return CompactEmbedding
