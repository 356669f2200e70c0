"""LSTM, GRU and RNN while tracing: ONNX's own operators, in place of one copy of the step for each time.

torch's exporter unrolls a recurrent layer, which fixes the length of the sequence. While a module is traced,
its recurrent layers emit ``LSTM``, ``GRU`` and ``RNN`` instead (https://onnx.ai/onnx/operators/onnx__LSTM.html).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxsmith.errors import ExportError

__all__ = ["recurrent_operators"]

# Where ONNX has the gates that torch has as input, forget, cell, output (LSTM) and reset, update, new (GRU).
_GATES: Mapping[str, Sequence[int]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
# Since this version the operators are as they are used here.
_VERSION = 18


@contextlib.contextmanager
def recurrent_operators(module: Any) -> Iterator[None]:
    """Lets the recurrent layers of a module emit operators while the context is open.

    Raises:
        ExportError: A layer projects its state, which the operators cannot.
    """
    import torch

    layers: list[tuple[str, Any]] = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.LSTM | torch.nn.GRU | torch.nn.RNN) and "forward" not in vars(layer)
    ]
    try:
        for name, layer in layers:
            layer.forward = _Forward(name, layer)
        yield
    finally:
        for _, layer in layers:
            vars(layer).pop("forward", None)


class _Forward:
    """Replaces the ``forward`` of one layer."""

    def __init__(self, name: str, layer: Any) -> None:
        while name == "inner" or name.startswith("inner."):
            name = name.removeprefix("inner").removeprefix(".")
        self.where = f"{name or 'model'} ({layer.mode})"
        self.layer = layer
        self.kind = layer.mode.partition("_")[0]

    def __call__(self, input: Any, hx: Any = None) -> Any:
        import torch

        layer, given = self.layer, input
        if not isinstance(given, torch.Tensor):
            raise ExportError(
                self.where,
                got="a packed sequence",
                expected="a padded tensor, which an ONNX graph can take",
                remedy="Give it the padded tensor, and take what follows from the last valid step yourself",
            )
        if getattr(layer, "proj_size", 0):
            raise ExportError(
                self.where,
                got="a projected state (proj_size)",
                expected="none, as the LSTM operator has none",
            )
        batched = given.ndim == 3
        if not batched:
            given = given.unsqueeze(0 if layer.batch_first else 1)
        sequence = given.transpose(0, 1) if layer.batch_first else given
        states = hx if isinstance(hx, tuple) else (hx,)
        if hx is not None and not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        directions = 2 if layer.bidirectional else 1
        last: list[list[Any]] = []
        for number in range(layer.num_layers):
            rows = slice(number * directions, (number + 1) * directions)
            first = None if hx is None else [state[rows] for state in states]
            sequence, *ends = self._one(number, sequence, first)
            last.append(ends)
        result = sequence.transpose(0, 1) if layer.batch_first else sequence
        ends = [torch.cat(part) for part in zip(*last, strict=True)]
        if not batched:
            result = result.squeeze(0 if layer.batch_first else 1)
            ends = [end.squeeze(1) for end in ends]
        return result, tuple(ends) if self.kind == "LSTM" else ends[0]

    def _one(self, number: int, given: Any, first: Sequence[Any] | None) -> list[Any]:
        """One layer: (sequence, batch, features) to the same and to its last states."""
        import torch

        layer = self.layer
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        length, batch, _ = given.shape
        hidden, directions = layer.hidden_size, len(suffixes)
        inputs: list[Any] = [
            given,
            torch.stack([self._weight(f"weight_ih_l{number}{s}") for s in suffixes]),
            torch.stack([self._weight(f"weight_hh_l{number}{s}") for s in suffixes]),
        ]
        if layer.bias:
            both = [
                torch.cat([self._weight(f"bias_{part}_l{number}{s}") for part in ("ih", "hh")])
                for s in suffixes
            ]
            inputs.append(torch.stack(both))
        else:
            inputs.append(None)
        # Rows of any length: the operator reads them all.
        inputs.append(None)
        if first is None:
            zeros = torch.zeros((directions, batch, hidden), dtype=given.dtype)
            inputs += [zeros] * (2 if self.kind == "LSTM" else 1)
        else:
            inputs += first
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if layer.bidirectional else "forward",
        }
        if self.kind == "GRU":
            attributes["linear_before_reset"] = 1
        if self.kind == "RNN":
            attributes["activations"] = ["Relu" if layer.nonlinearity == "relu" else "Tanh"] * directions
        state = [directions, batch, hidden]
        states = 2 if self.kind == "LSTM" else 1
        result, *ends = torch.onnx.ops.symbolic_multi_out(
            self.kind,
            inputs,
            attrs=attributes,
            dtypes=[given.dtype] * (1 + states),
            shapes=[[length, directions, batch, hidden], *[state] * states],
            version=_VERSION,
        )
        # Directions stand beside each other in torch.
        return [result.transpose(1, 2).reshape(length, batch, directions * hidden), *ends]

    def _weight(self, name: str) -> Any:
        """A weight or bias with its gates in the order of ONNX."""
        import torch

        tensor = getattr(self.layer, name)
        gates = _GATES[self.kind]
        if len(gates) == 1:
            return tensor
        parts = tensor.chunk(len(gates))
        return torch.cat([parts[gate] for gate in gates])
