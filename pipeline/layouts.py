"""What the runtimes that people use expect to find beside a graph: one directory serves all of them.

The graphs stand once, in ``onnx/``, under the names that optimum, transformers.js and sentence-transformers
look for; onnxruntime-genai is told where they are. A layout adds files; it never copies weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from onnxsmith.context_length import context_length
from onnxsmith.environment import describe_environment
from onnxsmith.package import TEXT_GENERATION, Component, ModelPackage, cache_is_shareable, cache_pairs
from onnxsmith.pipeline.serving_scripts import dockerfile, inference_script

__all__ = ["DTYPE_SUFFIXES", "LAYOUTS", "Laid", "Layout", "genai_config", "graph_name", "rename_axes"]

# What bounds the accuracy -> the suffix of the file and the `dtype` by which transformers.js asks for it
# (https://huggingface.co/docs/transformers.js/guides/dtypes).
DTYPE_SUFFIXES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "float32": ("", "fp32"),
        "float16": ("_fp16", "fp16"),
        "int8": ("_quantized", "q8"),
        "int4": ("_q4", "q4"),
    }
)


# What onnxruntime-genai allocates for, unless its caller asks for another length.
_GENAI_MAX_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Laid:
    """A package on its way into a directory.

    Attributes:
        package: The main variant.
        graphs: Component to the file of its graph, relative to the directory.
        dtypes: What transformers.js calls the variants that are there, the main one first.
        external: Names of the graphs whose weights stand in a file beside them.
    """

    package: ModelPackage
    graphs: Mapping[str, str]
    dtypes: Sequence[str]
    external: Sequence[str]

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``; empty where there is none."""
        return _json_of(self.package, "config.json")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one client needs.

    Attributes:
        summary: For lists.
        refusal: Why a package cannot be laid out so; an empty string where it can.
        files: The files to write, by path in the directory.
    """

    summary: str
    refusal: Callable[[ModelPackage], str]
    files: Callable[[Laid], Mapping[str, bytes]]


def graph_name(component: str, precision: str, *, single: bool) -> str:
    """The file of a graph.

    Args:
        component: The component's name, such as ``model``.
        precision: What bounds its accuracy.
        single: Whether it is the only variant, which every client finds under the plain name.
    """
    suffix = "" if single else DTYPE_SUFFIXES.get(precision, (f"_{precision}", ""))[0]
    return f"onnx/{component}{suffix}.onnx"


def _never(_: ModelPackage) -> str:
    return ""


def _needs_config(package: ModelPackage) -> str:
    return "" if "config.json" in package.files else "the model has no config.json, as transformers writes"


def _needs_tokenizer(package: ModelPackage) -> str:
    return _needs_config(package) or (
        "" if "tokenizer.json" in package.files else "the model has no tokenizer.json"
    )


def _needs_decoder(package: ModelPackage) -> str:
    missing = _needs_tokenizer(package)
    if missing:
        return missing
    if package.task != TEXT_GENERATION or len(package.components) != 1:
        return f"the task is {package.task or 'unknown'}; expected {TEXT_GENERATION} in one graph"
    component = package.main
    if not cache_pairs(component.inputs, component.outputs):
        return "the graph has no KV cache"
    names = [pair.past.name for pair in cache_pairs(component.inputs, component.outputs)]
    if any(not name.endswith((".key", ".value")) for name in names):
        return "the KV cache has other parts than a key and a value for each layer"
    return ""


def _needs_pooling(package: ModelPackage) -> str:
    if "pooling.json" not in package.files:
        return "the source has no modules.json with a Pooling, as sentence-transformers writes"
    return _needs_tokenizer(package)


def _ort_files(laid: Laid) -> Mapping[str, bytes]:
    versions = describe_environment()["versions"]
    script, packages = inference_script(laid.package, laid.graphs)
    pins = [f"{name}=={versions[name]}" for name in packages if name in versions]
    return {
        "infer.py": script.encode(),
        "requirements.txt": ("\n".join(pins) + "\n").encode(),
        "Dockerfile": dockerfile(laid.package).encode(),
    }


def _genai_files(laid: Laid) -> Mapping[str, bytes]:
    return {"genai_config.json": _json_bytes(genai_config(laid.package, next(iter(laid.graphs.values()))))}


def genai_config(package: ModelPackage, graph: str) -> dict[str, Any]:
    """What onnxruntime-genai must know of a decoder.

    The format is described at https://onnxruntime.ai/docs/genai/reference/config.html.

    Args:
        package: A decoder in one graph.
        graph: The file of the graph, relative to the configuration.
    """
    component = package.main
    pairs = cache_pairs(component.inputs, component.outputs)
    config = _json_of(package, "config.json")
    config = config.get("text_config") or config
    generation = _json_of(package, "generation_config.json")
    _, kv_heads, _, head_size = pairs[0].past.shape or (None, None, None, None)
    heads = _first(config, "num_attention_heads", "n_head", "num_heads") or kv_heads
    logits = next((spec for spec in component.outputs if spec.name == "logits"), component.outputs[0])
    vocabulary = (logits.shape or (None,))[-1]

    def token(name: str) -> Any:
        return generation.get(name, config.get(name))

    eos = token("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = token("pad_token_id")
    context = context_length(config) or 2048
    inputs = {spec.name for spec in component.inputs}
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": head_size,
        "hidden_size": _first(config, "hidden_size", "n_embd", "d_model"),
        "num_attention_heads": heads,
        "num_hidden_layers": len({pair.past.name.split(".")[1] for pair in pairs}),
        "num_key_value_heads": kv_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": logits.name,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model: dict[str, Any] = {
        "type": "decoder",
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": pad if pad is not None else first_eos,
        "context_length": context,
        "vocab_size": vocabulary if isinstance(vocabulary, int) else config.get("vocab_size"),
        "decoder": {key: value for key, value in decoder.items() if value is not None},
    }
    return {
        "model": {key: value for key, value in model.items() if value is not None},
        "search": {
            "do_sample": False,
            # With a shared buffer this much is allocated at once.
            "max_length": min(context, _GENAI_MAX_LENGTH),
            "past_present_share_buffer": cache_is_shareable(component.model),
        },
    }


def _transformers_js_files(laid: Laid) -> Mapping[str, bytes]:
    told: dict[str, Any] = {"dtype": laid.dtypes[0]}
    if laid.external:
        told["use_external_data_format"] = {name.rpartition("/")[2]: 1 for name in laid.external}
    return {"config.json": _json_bytes(laid.config | {"transformers.js_config": told})}


def _sentence_transformers_files(laid: Laid) -> Mapping[str, bytes]:
    pooling = _json_of(laid.package, "pooling.json")
    normalize = pooling.pop("normalize", False)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] * normalize)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    length = _json_of(laid.package, "tokenizer_config.json").get("model_max_length")
    limit = context_length(laid.config) or 512
    told = min(length, limit) if isinstance(length, int) else limit
    return {
        "modules.json": _json_bytes(modules),
        "1_Pooling/config.json": _json_bytes(pooling),
        "sentence_bert_config.json": _json_bytes({"max_seq_length": told, "do_lower_case": False}),
    }


def _no_files(_: Laid) -> Mapping[str, bytes]:
    return {}


# The order is that in which files are written: transformers.js adds to config.json.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "ort": Layout("ONNX Runtime alone: infer.py, requirements.txt, Dockerfile", _never, _ort_files),
        "optimum": Layout("optimum's ORTModelFor*", _needs_config, _no_files),
        "genai": Layout("onnxruntime-genai: genai_config.json", _needs_decoder, _genai_files),
        "transformers-js": Layout(
            "transformers.js in Node and browsers", _needs_tokenizer, _transformers_js_files
        ),
        "sentence-transformers": Layout(
            'sentence-transformers with backend="onnx"', _needs_pooling, _sentence_transformers_files
        ),
    }
)


def rename_axes(component: Component, names: Mapping[str, str]) -> None:
    """Renames dynamic axes of inputs and outputs: transformers.js looks for ``batch_size``."""
    import onnx_ir as ir

    for value in (*component.model.graph.inputs, *component.model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    dim if isinstance(dim, int) else names.get(dim.value or "", dim.value)
                    for dim in value.shape
                ]
            )


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _json_of(package: ModelPackage, name: str) -> dict[str, Any]:
    try:
        found = json.loads(package.files.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
