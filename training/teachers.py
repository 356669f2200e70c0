"""Teachers: what a student learns from, in PyTorch or in any other runtime."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import FeedError

if TYPE_CHECKING:
    import torch

    from onnxsmith.training.examples import Examples

__all__ = ["Answers", "RuntimeTeacher", "Teacher", "TorchTeacher", "forward", "lessons"]

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says of a batch.

    Attributes:
        logits: (batch, classes), or (batch, tokens, classes); None of a model that only embeds.
        hidden: Hidden states (batch, tokens, width): after the embedding, then after each layer.
        attentions: Attention (batch, heads, tokens, tokens) of each layer.
    """

    logits: torch.Tensor | None
    hidden: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()


class Teacher(Protocol):
    """What can be asked about a batch."""

    name: str

    def ask(self, batch: Mapping[str, torch.Tensor], *, hidden: bool, attentions: bool) -> Answers:
        """Answers without gradients.

        Args:
            batch: As of ``Examples.batch``.
            hidden: Whether hidden states are wanted.
            attentions: Whether attentions are wanted.

        Raises:
            FeedError: It does not give what is wanted.
        """
        ...


def forward(
    model: Any, batch: Mapping[str, torch.Tensor], *, hidden: bool = False, attentions: bool = False
) -> Answers:
    """Runs a model of transformers."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if hidden:
        inputs["output_hidden_states"] = True
    if attentions:
        inputs["output_attentions"] = True
    result = model(**inputs)
    logits = getattr(result, "logits", None)
    states = tuple(getattr(result, "hidden_states", None) or ())
    if logits is None and not hidden:
        # The model only embeds: its last hidden state is what it says.
        states = (result[0],)
    return Answers(logits, states, tuple(getattr(result, "attentions", None) or ()))


class TorchTeacher:
    """A PyTorch model that teaches. It is left as it is, in eval mode."""

    def __init__(self, model: torch.nn.Module, *, name: str = "torch") -> None:
        """Puts it into eval mode."""
        self.model, self.name = model.eval(), name

    def ask(self, batch: Mapping[str, torch.Tensor], *, hidden: bool, attentions: bool) -> Answers:
        """Runs it on the device of the batch."""
        import torch

        device = next(iter(batch.values())).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        with torch.no_grad():
            return forward(self.model, batch, hidden=hidden, attentions=attentions)


class RuntimeTeacher:
    """A model of another runtime that teaches, such as an ONNX artifact: it gives its outputs only.

    Args:
        run: From inputs to outputs by name; the batch and the tokens are its first two axes.
        inputs: Names of the inputs that it takes.
        outputs: Names of its outputs: ``logits``, or ``last_hidden_state`` of a model that embeds.
        name: For messages and reports.

    Raises:
        FeedError: It takes or gives something else.
    """

    def __init__(
        self,
        run: Callable[[dict[str, npt.NDArray[Any]]], Arrays],
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str = "runtime",
    ) -> None:
        unknown = [n for n in inputs if n not in ("input_ids", "attention_mask", "token_type_ids")]
        if unknown:
            raise FeedError(
                f"teacher {name}", got=f"the input {unknown[0]!r}",
                expected="a model that takes input_ids, attention_mask and token_type_ids",
                remedy="Give those alone, and let run fill in the rest",
            )  # fmt: skip
        found = [n for n in ("logits", "last_hidden_state") if n in outputs]
        if not found:
            raise FeedError(
                f"teacher {name}", got=f"the outputs {', '.join(outputs)}",
                expected="logits or last_hidden_state",
            )  # fmt: skip
        self._run, self._inputs, self._output, self.name = run, tuple(inputs), found[0], name

    def ask(self, batch: Mapping[str, torch.Tensor], *, hidden: bool, attentions: bool) -> Answers:
        """Runs it on the CPU."""
        import torch

        if attentions or (hidden and self._output == "logits"):
            raise FeedError(
                f"teacher {self.name}", got="an ONNX model, which gives its outputs only",
                expected="a PyTorch model, for hidden states and attention",
                remedy="Set hidden, cosine and attention to 0, or name a PyTorch source",
            )  # fmt: skip
        ids = batch["input_ids"]
        known = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
        known.setdefault("token_type_ids", np.zeros(tuple(ids.shape), np.int64))
        outputs = self._run({name: np.ascontiguousarray(known[name]) for name in self._inputs})
        found = torch.from_numpy(np.array(outputs[self._output], np.float32)).to(ids.device)
        return Answers(found) if self._output == "logits" else Answers(None, (found,))


def lessons(teacher: Teacher, examples: Examples, *, batch: int = 64, device: str = "cpu") -> torch.Tensor:
    """The logits of all examples, asked once, because a teacher does not change its mind.

    They are asked in an order that follows from the examples alone: padding changes how sums are rounded, and
    training that goes on after an interruption must see the same bits.

    Returns:
        (examples, classes), float32, on the CPU.

    Raises:
        FeedError: The teacher gives none for whole texts.
    """
    import torch

    order = sorted(range(len(examples)), key=lambda n: len(examples.rows[n].ids))
    found: list[torch.Tensor] = []
    for begin in range(0, len(order), batch):
        given = examples.batch(order[begin : begin + batch], device=device)
        logits = teacher.ask(given, hidden=False, attentions=False).logits
        if logits is None or logits.dim() != 2:
            raise FeedError(
                f"teacher {teacher.name}",
                got="no logits" if logits is None else f"logits of shape {list(logits.shape)}",
                expected="one row of logits for each text",
            )
        found.append(logits.float().cpu())
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(found)[places]
