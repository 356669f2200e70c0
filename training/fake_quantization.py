r"""Quantization-aware training: a model learns with weights and activations that are rounded to 8 bits.

With a step :math:`s`, a zero point :math:`z` and the integers from :math:`Q_N` to :math:`Q_P`,

.. math:: \hat x = s \, (\mathrm{clip}(\mathrm{round}(x / s) + z, Q_N, Q_P) - z)

which is ``QuantizeLinear`` and ``DequantizeLinear`` of ONNX. Rounding has no gradient and gets that of the
identity (straight-through, Bengio et al. 2013); clipping has its own. So the step gets the gradient

.. math:: \partial \hat x / \partial s = \mathrm{round}(x/s) - x/s \;\text{ inside},
          \quad Q_N - z \text{ or } Q_P - z \;\text{ where it is clipped}

and is learned: Esser et al. 2020, "Learned Step Size Quantization", equation 3, with gradients scaled by
:math:`1/\sqrt{N Q_P}` (section 2.2). What is learned is :math:`\log s`, because steps differ by orders of
magnitude and Adam moves all parameters by about the learning rate (Jain et al. 2020, "Trained Quantization
Thresholds", section 3.2).

Weights have one step for each output channel and no zero point, activations one step and a zero point for a
whole tensor, uint8: what ONNX Runtime multiplies as integers.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError
from onnxsmith.training.sparsity import is_sparse, mark_sparse

if TYPE_CHECKING:
    import torch

__all__ = ["fake_quantized", "fix_quantization", "prepare_quantization"]

_WEIGHT_MAX = 127
_ACTIVATION_MAX = 255
# Values of an activation that its first step is found on.
_SAMPLES = 20_000
# How much of the range that was seen the first step may cover.
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def fake_quantized(
    x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor | float, low: int, high: int
) -> torch.Tensor:
    """Rounds to integers from ``low`` to ``high`` and back, with gradients for ``x`` and for ``step``.

    Args:
        x: Any shape, float32.
        step: Broadcasts to it; above 0.
        zero: The integer that 0 becomes.
        low: Q_N.
        high: Q_P.
    """
    import torch

    # To the step only: x keeps its whole gradient.
    scale = 1 / math.sqrt(max(x.numel() / max(step.numel(), 1), 1) * high)
    scaled = step * scale + (step - step * scale).detach()
    ratio = x / scaled + zero
    inside = torch.clamp(ratio, low, high)
    rounded = inside + (torch.round(inside) - inside).detach()
    return (rounded - zero) * scaled


def prepare_quantization(
    model: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], *, skip: Sequence[str] = ()
) -> list[str]:
    """Makes the linear layers of a model round their weights and inputs.

    Layers that read one tensor share its step.

    Args:
        model: Changed in place; its other parameters are the same objects.
        batches: Real inputs, for the first steps: those with the least squared error on them.
        skip: Patterns of names of layers that keep their precision.

    Returns:
        The names of the layers.

    Raises:
        BadInputError: There is no linear layer, or no data.
    """
    import fnmatch

    import torch

    linear = {
        name: part
        for name, part in model.named_modules()
        if type(part) is torch.nn.Linear and not any(fnmatch.fnmatchcase(name, p) for p in skip)
    }
    if not linear or not batches:
        raise BadInputError(
            f"quantization-aware training of {type(model).__name__}",
            got="no linear layer" if not linear else "no data", expected="some to find the first steps on",
        )  # fmt: skip
    seen, together = _observe(model, linear, batches)
    quantizers: dict[str, Any] = {}
    for name, part in linear.items():
        if name not in seen:
            continue
        first = together[name]
        if first not in quantizers:
            quantizers[first] = _classes()["activation"](*_first_range(seen[first]))
        _put(model, name, _classes()["linear"](part, quantizers[first]))
    return [name for name in linear if name in seen]


def fix_quantization(model: torch.nn.Module) -> int:
    """Replaces what was learned by integers: what is exported has QuantizeLinear and DequantizeLinear.

    Returns:
        How many layers.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _classes()["linear"])]
    for name, part in found:
        _put(model, name, _classes()["fixed"](part))
    return len(found)


def _observe(
    model: torch.nn.Module,
    linear: Mapping[str, torch.nn.Module],
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Some values of each layer's input, and for each layer the first that reads the same tensor."""
    import torch

    from onnxsmith.training.teachers import forward

    seen: dict[str, list[torch.Tensor]] = {}
    together: dict[str, str] = {}
    current: dict[int, tuple[str, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    each = max(_SAMPLES // len(batches), 256)

    def watch(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            # The tensor is kept while its number is known, or another could get it.
            first, _kept = current.setdefault(id(given[0]), (name, given[0]))
            together.setdefault(name, first)
            flat = given[0].detach().float().reshape(-1)
            chosen = flat[torch.randint(0, len(flat), (min(each, len(flat)),), generator=generator)]
            ends = torch.stack([flat.min(), flat.max()])
            seen.setdefault(name, []).append(torch.cat([chosen, ends]))

        return hook

    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in linear.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                current.clear()
                forward(model, batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}, together


def _first_range(values: torch.Tensor) -> tuple[float, int]:
    """The step and zero point with the least squared error on values; 0 is exact."""
    best: tuple[float, float, int] | None = None
    for shrink in _SHRINKS:
        low, high = min(float(values.min()) * shrink, 0.0), max(float(values.max()) * shrink, 0.0)
        step = max((high - low) / _ACTIVATION_MAX, 1e-8)
        zero = min(max(round(-low / step), 0), _ACTIVATION_MAX)
        rounded = ((values / step).round() + zero).clamp(0, _ACTIVATION_MAX)
        error = float(((rounded - zero) * step - values).pow(2).mean())
        if best is None or error < best[0]:
            best = (error, step, zero)
    assert best is not None
    return best[1], best[2]


def _put(model: torch.nn.Module, name: str, part: torch.nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, part)


@functools.cache
def _classes() -> Mapping[str, Any]:
    """The modules, made once torch is needed."""
    import torch

    class FakeQuantizedInput(torch.nn.Module):
        """Rounds an activation to uint8."""

        def __init__(self, step: float, zero: int) -> None:
            super().__init__()
            self.log_step = torch.nn.Parameter(torch.tensor(math.log(step)))
            self.zero = zero

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quantized(x, self.log_step.exp(), self.zero, 0, _ACTIVATION_MAX)

    class FakeQuantizedLinear(torch.nn.Module):
        """A linear layer that rounds its input and its weight."""

        def __init__(self, linear: torch.nn.Linear, given: FakeQuantizedInput) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight, self.bias, self.given = linear.weight, linear.bias, given
            if is_sparse(linear):
                mark_sparse(self)
            largest = linear.weight.detach().float().abs().amax(1).clamp(min=1e-8)
            self.log_step = torch.nn.Parameter((largest / _WEIGHT_MAX).log())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Rounding is not for autocast: a bfloat16 has 8 bits itself.
            with torch.autocast(x.device.type, enabled=False):
                rounded = self.given(x.float())
                step = self.log_step.exp()[:, None]
                weight = fake_quantized(self.weight.float(), step, 0, -_WEIGHT_MAX, _WEIGHT_MAX)
            return torch.nn.functional.linear(rounded, weight, self.bias)

    class QuantizedLinear(torch.nn.Module):
        """The same with integer weights, (in, out) as ONNX multiplies them."""

        weight_integers: torch.Tensor
        weight_step: torch.Tensor
        weight_zero: torch.Tensor

        def __init__(self, learned: FakeQuantizedLinear) -> None:
            super().__init__()
            self.in_features, self.out_features = learned.in_features, learned.out_features
            step = learned.log_step.detach().exp()
            integers = (learned.weight.detach().float() / step[:, None]).round()
            integers = integers.clamp(-_WEIGHT_MAX, _WEIGHT_MAX).to(torch.int8)
            self.register_buffer("weight_integers", integers.T.contiguous())
            self.register_buffer("weight_step", step.contiguous())
            self.register_buffer("weight_zero", torch.zeros(len(step), dtype=torch.int8))
            self.bias = learned.bias
            self.step = float(learned.given.log_step.detach().exp())
            self.zero = learned.given.zero

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Operators that the exporter writes as QuantizeLinear and DequantizeLinear.
            operators = torch.ops.quantized_decomposed
            how = (self.step, self.zero, 0, _ACTIVATION_MAX, torch.uint8)
            rounded = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *how), *how)
            weight = operators.dequantize_per_channel(
                self.weight_integers, self.weight_step, self.weight_zero, 1, -128, 127, torch.int8
            )
            result: torch.Tensor = rounded @ weight
            return result if self.bias is None else result + self.bias

    # Registers the operators of that name.
    importlib.import_module("torch.ao.quantization.fx._decomposed")

    return {
        "activation": FakeQuantizedInput, "linear": FakeQuantizedLinear, "fixed": QuantizedLinear,
    }  # fmt: skip
