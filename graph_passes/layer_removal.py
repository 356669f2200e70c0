"""Whole layers are left out: those that turn the hidden state least.

The score of a layer is its block influence, ``1 - mean over tokens of cos(x, y)``, with x what goes into it
and y what comes out (Men et al., ShortGPT, 2024, https://arxiv.org/abs/2403.03853).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxsmith.errors import BadInputError
from onnxsmith.graph_passes.context import Activations, context_of
from onnxsmith.graph_passes.contract import Changes, GraphPass, PreconditionError
from onnxsmith.graph_passes.layer_stack import Layer, find_layer_stack
from onnxsmith.graph_passes.package_config import CONFIG

__all__ = ["PruneLayers"]

_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(.+)")
Floats = npt.NDArray[np.float64]


class PruneLayers(GraphPass):
    """Leaves out whole layers, with their weights and their part of the KV cache.

    The caches that stay are numbered again. Works on graphs whose norms are not fused with residual sums:
    before ``fuse_transformer``.
    """

    name: ClassVar[str] = "prune_layers"
    summary: ClassVar[str] = "leave out the layers that turn the hidden state least (before fusion)"

    def __init__(
        self,
        *,
        layers: float = 0.25,
        method: Literal["influence", "random"] = "influence",
        drop: tuple[int, ...] = (),
        seed: int = 0,
    ) -> None:
        """Sets how many go.

        Args:
            layers: Layers to leave out: a share below 1, or a number.
            method: influence takes those that turn the hidden state least, and needs calibration data;
                random is a control.
            drop: The layers to leave out, from 0, in place of a number.
            seed: Of random.

        Raises:
            BadInputError: A number that is neither a share nor whole.
        """
        if layers < 0 or (layers >= 1 and layers != int(layers)):
            raise BadInputError(
                f"pass {self.name}: layers", got=f"{layers:g}", expected="a share below 1, or a whole number"
            )
        self.layers = layers
        self.method = method
        self.drop = tuple(drop)
        self.seed = seed

    def apply(self, model: ir.Model) -> Changes:
        """Leaves layers out.

        Raises:
            PreconditionError: There are no layers that can go, too few, or data is missing.
        """
        common.ShapeInferencePass()(model)
        found = find_layer_stack(model)
        if isinstance(found, str):
            raise PreconditionError(
                f"pass {self.name}",
                got=f"no layers that can be left out: {found}",
                expected="layers that give what they could have been given",
                remedy="Run it on a graph that is clean and not fused",
            )
        going, scores = self._choose(model, found)
        if not going:
            return Changes()
        before = _weights(model)
        for index in sorted(going):
            layer = found[index]
            # The entry of the next one is the exit of this one, so several in a row end at the first entry.
            entry = layer.entry
            while (previous := next((f for f in found if f.exit is entry), None)) is not None:
                if found.index(previous) not in going:
                    break
                entry = previous.entry
            layer.exit.replace_all_uses_with(entry)
        removed = _renumber(model, found, going)
        common.RemoveUnusedNodesPass()(model)
        after = _weights(model)
        details: dict[str, Any] = {
            "layers_before": len(found),
            "layers_left": len(found) - len(going),
            "dropped": sorted(going),
            "caches_removed": removed,
            "parameters_before": before,
            "parameters_after": after,
            "parameters_left": after / before,
            CONFIG: {"layers": [len(found), len(found) - len(going)]},
        }
        if scores is not None:
            details["scores"] = scores.tolist()
        if self.method == "influence" and not self.drop:
            details["calibration"] = dict(context_of(model).calibration)
        return Changes(len(going), details)

    def _choose(self, model: ir.Model, layers: Sequence[Layer]) -> tuple[set[int], Floats | None]:
        count = len(layers)
        if self.drop:
            wrong = [index for index in self.drop if not 0 <= index < count]
            if wrong or len(set(self.drop)) == count:
                raise PreconditionError(
                    f"pass {self.name}: drop",
                    got=f"{', '.join(map(str, self.drop))}",
                    expected=f"some of the layers 0 to {count - 1}",
                )
            return set(self.drop), None
        going = int(self.layers) if self.layers >= 1 else round(self.layers * count)
        if going >= count:
            raise PreconditionError(
                f"pass {self.name}: layers", got=f"{going} of {count} layers", expected=f"at most {count - 1}"
            )
        if self.method == "random":
            scores = np.random.default_rng(self.seed).random(count)
        else:
            activations = context_of(model).activations
            if activations is None:
                raise PreconditionError(
                    f"pass {self.name}",
                    got="method influence without calibration data",
                    expected="data to run the model on",
                    remedy="Give --calibration-data or the recipe's key calibration, or name layers to drop",
                )
            scores = _influence(model, layers, activations)
        return set(np.argsort(scores, kind="stable")[:going].tolist()), scores


def _influence(model: ir.Model, layers: Sequence[Layer], activations: Activations) -> Floats:
    names = [layers[0].entry.name or "", *(layer.exit.name or "" for layer in layers)]
    sums, tokens = np.zeros(len(layers)), 0
    for batch in activations(model, names):
        states = [np.asarray(batch[name], np.float64).reshape(-1, batch[name].shape[-1]) for name in names]
        norms = [np.linalg.norm(state, axis=1) for state in states]
        for index in range(len(layers)):
            product = np.einsum("tk,tk->t", states[index], states[index + 1])
            cosine = product / np.maximum(norms[index] * norms[index + 1], 1e-30)
            sums[index] += float((1 - cosine).sum())
        tokens += len(states[0])
    return sums / max(tokens, 1)


def _renumber(model: ir.Model, layers: Sequence[Layer], going: set[int]) -> int:
    """Takes away the caches of layers that are gone; those that stay are numbered from 0."""
    graph = model.graph
    gone = {node for index in going for node in layers[index].nodes}
    numbers: set[int] = set()
    for value in list(graph.outputs):
        producer, match = value.producer(), _CACHE.fullmatch(value.name or "")
        if producer not in gone:
            continue
        if match is None:
            raise PreconditionError(
                "pass prune_layers",
                got=f"the output {value.name!r} comes from a layer that would go",
                expected="outputs from behind the layers, and caches",
                remedy="Cut it off with select_outputs",
            )
        numbers.add(int(match[2]))
        graph.outputs.remove(value)
    common.RemoveUnusedNodesPass()(model)
    kept = [v for v in graph.inputs if (m := _CACHE.fullmatch(v.name or "")) and int(m[2]) not in numbers]
    for value in list(graph.inputs):
        match = _CACHE.fullmatch(value.name or "")
        if match is None or int(match[2]) not in numbers:
            continue
        # Others may ask how long it is; that of another layer is as long.
        other = next((k for k in kept if (k.name or "").endswith(f".{match[3]}")), None)
        if value.uses() and other is not None:
            value.replace_all_uses_with(other)
        if value.uses():
            raise PreconditionError(
                "pass prune_layers",
                got=f"the cache {value.name!r} is read besides",
                expected="by its layer alone",
            )
        graph.inputs.remove(value)
    found = (_CACHE.fullmatch(v.name or "") for v in (*graph.inputs, *graph.outputs))
    order = {old: new for new, old in enumerate(sorted({int(m[2]) for m in found if m is not None}))}
    # From below, so that no name is taken twice.
    for value in sorted((*graph.inputs, *graph.outputs), key=lambda v: order.get(_number(v), -1)):
        match = _CACHE.fullmatch(value.name or "")
        if match is not None:
            value.name = f"{match[1]}.{order[int(match[2])]}.{match[3]}"
    return len(numbers)


def _number(value: ir.Value) -> int:
    match = _CACHE.fullmatch(value.name or "")
    return -1 if match is None else int(match[2])


def _weights(model: ir.Model) -> int:
    tensors = {id(v.const_value): v.const_value for v in model.graph.initializers.values()}
    return sum(t.size for t in tensors.values() if t is not None and t.dtype.is_floating_point())
