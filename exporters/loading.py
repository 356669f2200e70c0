"""From a source to a PyTorch model in memory, with the files that belong to it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import SourceError, UnknownNameError, require
from onnxsmith.exporters.adapters import ADAPTERS, beside
from onnxsmith.exporters.factory import first_line, load_factory
from onnxsmith.exporters.gguf_header import header_known
from onnxsmith.exporters.other_sources import base_of_adapter, load_exported_program, merge_adapter
from onnxsmith.exporters.stored_weights import (
    StoredWeights,
    gguf_weights,
    quick_gguf,
    safetensors_weights,
    skeleton,
    surplus_layers,
)
from onnxsmith.exporters.transformers_import import import_transformers
from onnxsmith.exporters.weight_checks import refuse_missing, refuse_other_sizes
from onnxsmith.hashing import file_sha256
from onnxsmith.package import TEXT_GENERATION
from onnxsmith.source import ModelSource, SourceKind

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "TASKS", "LoadedModel", "config_json", "load_torch"]

# Task -> (the transformers classes that load it, the architecture suffix that implies it). Most architectures
# stand in the tables of these classes; suffixes are for those that do not. The first task that fits is taken.
TASKS: Mapping[str, tuple[str | tuple[str, ...], str]] = {
    TEXT_GENERATION: ("AutoModelForCausalLM", "ForCausalLM"),
    "text2text-generation": ("AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
    "automatic-speech-recognition": (("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"), "ForCTC"),
    "text-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification"),
    "question-answering": ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
    "fill-mask": ("AutoModelForMaskedLM", "ForMaskedLM"),
    "image-classification": ("AutoModelForImageClassification", "ForImageClassification"),
    "zero-shot-image-classification": (
        "AutoModelForZeroShotImageClassification",
        "ForZeroShotImageClassification",
    ),
    "audio-classification": ("AutoModelForAudioClassification", "ForAudioClassification"),
    "text-to-audio": (("AutoModelForTextToWaveform", "AutoModelForTextToSpectrogram"), "ForTextToSpeech"),
    "feature-extraction": ("AutoModel", "Model"),
    "sentence-similarity": ("AutoModel", "SentenceTransformer"),
}

DTYPES = ("float32", "float16", "bfloat16")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


# Copied as they are.
_OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass
class LoadedModel:
    """A PyTorch model with all that the export needs to know of it.

    Attributes:
        module: The model, in eval mode, on the CPU.
        source: Where it came from.
        task: The task; None for a plain module.
        files: Tokenizer and configuration files by name.
        provenance: For the manifest: files with hashes, architecture, number of parameters.
        inputs: Example inputs by parameter of ``forward``, nested as it takes them, for a plain module.
        weights: Where the weights are, if ``module`` is without them: a decoder that was loaded ``lazy``.
        adapter: What becomes of an adapter's weights: ``merge``, or ``inputs``.
    """

    module: torch.nn.Module
    source: ModelSource
    task: str | None
    files: dict[str, bytes]
    provenance: dict[str, Any]
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: StoredWeights | None = None
    adapter: str = "merge"


def load_torch(
    source: ModelSource,
    *,
    task: str | None = None,
    dtype: str = "float32",
    lazy: bool = False,
    adapter: str = "merge",
) -> LoadedModel:
    """Loads a PyTorch model.

    Local sources never touch the network, nothing runs code from a model directory
    (``trust_remote_code`` is off), and pickled weights are only read with ``weights_only``.

    Args:
        source: Where it is.
        task: A name from ``TASKS``; found from the configuration where None.
        dtype: The element type to load the weights in, from ``DTYPES``. A factory decides for itself.
        lazy: Whether the weights of a decoder may stay in their files until the model is run; see
            ``LoadedModel.weights``.
        adapter: Whether the weights of a PEFT adapter are added to the model's (``merge``) or stay beside
            them, as ``inputs`` of the graph with the adapter's own as defaults.

    Raises:
        SourceError: It cannot be read, or it has no such task.
        ModelFileError: A GGUF file that is damaged.
        TokenizerError: A GGUF file whose tokenizer cannot be rebuilt exactly.
        UnknownNameError: No such task or element type.
    """
    torch = require("torch", purpose=f"loading {source.text}")
    if task is not None and task not in TASKS:
        raise UnknownNameError("export", name=task, known=TASKS, kind="task")
    if dtype not in DTYPES:
        raise UnknownNameError("export", name=dtype, known=DTYPES, kind="dtype")
    if adapter not in ADAPTERS:
        raise UnknownNameError("export", name=adapter, known=ADAPTERS, kind="adapter")
    if adapter != "merge" and source.kind is not SourceKind.ADAPTER:
        raise SourceError(
            source.text,
            got=f"a {source.kind} source, and --adapter {adapter}",
            expected="the directory of a PEFT adapter",
        )
    only = {
        SourceKind.FACTORY: None,
        SourceKind.EXPORTED_PROGRAM: None,
        SourceKind.GGUF: TEXT_GENERATION,
    }
    if task is not None and only.get(source.kind, task) != task:
        raise SourceError(
            source.text,
            got=f"task {task}",
            expected=f"{only[source.kind] or 'no task'} for a {source.kind} source",
        )
    loaded: LoadedModel
    if source.kind is SourceKind.FACTORY:
        module, inputs = load_factory(source)
        provenance = {"kind": str(source.kind), "text": source.text}
        loaded = LoadedModel(module, source, None, {}, provenance, inputs)
    elif source.kind is SourceKind.EXPORTED_PROGRAM:
        assert source.path is not None
        module, inputs = load_exported_program(source)
        archive = [_file_entry(source.path)]
        described: dict[str, Any] = {"kind": str(source.kind), "text": source.text, "files": archive}
        loaded = LoadedModel(module, source, None, {}, described, inputs)
    elif source.kind is SourceKind.ADAPTER:
        loaded = _load_adapter(source, task=task, dtype=getattr(torch, dtype), adapter=adapter)
    elif source.kind is SourceKind.GGUF:
        loaded = _load_gguf(source, dtype=getattr(torch, dtype), lazy=lazy)
    elif source.kind in (SourceKind.HUGGING_FACE_DIRECTORY, SourceKind.HUGGING_FACE_HUB):
        loaded = _load_hugging_face(source, task=task, dtype=getattr(torch, dtype), lazy=lazy)
    else:
        raise SourceError(source.text, got="an ONNX model", expected="a source of a PyTorch model")
    loaded.module.eval().requires_grad_(False)
    loaded.provenance |= {
        "architecture": type(loaded.module).__name__,
        "parameters": sum(p.numel() for p in loaded.module.parameters()),
    }
    return loaded


def _load_adapter(source: ModelSource, *, task: str | None, dtype: torch.dtype, adapter: str) -> LoadedModel:
    """An adapter in its model; the tokenizer is the adapter's where it has one."""
    assert source.path is not None
    base = base_of_adapter(source)
    loaded = _load_hugging_face(base, task=task, dtype=dtype, lazy=False)
    with _quiet():
        module = (merge_adapter if adapter == "merge" else beside)(source, loaded.module)
    files = sorted(source.path.glob("adapter_*"))
    provenance = {
        "kind": str(source.kind),
        "text": source.text,
        "files": [_file_entry(path) for path in files],
        "base": loaded.provenance,
    }
    own = _tokenizer_files(source, str(source.path), {"trust_remote_code": False, "local_files_only": True})
    return LoadedModel(module, source, loaded.task, loaded.files | own, provenance, adapter=adapter)


def _load_hugging_face(
    source: ModelSource, *, task: str | None, dtype: torch.dtype, lazy: bool
) -> LoadedModel:
    where = str(source.path) if source.path else source.target
    options: dict[str, Any] = {"trust_remote_code": False}
    stored = sorted([*source.path.glob("*.safetensors"), *source.path.glob("*.bin")]) if source.path else []
    entries = _file_entries_begun(stored)
    transformers = import_transformers(purpose=f"loading {source.text}")
    if source.path:
        options["local_files_only"] = True
    elif source.revision:
        options["revision"] = source.revision
    with _quiet(), _readable(source):
        config = transformers.AutoConfig.from_pretrained(where, **options)
    task = task or _task_of(source, config)
    auto = _auto_class(task, config)
    weights = None
    with _quiet(), _readable(source):
        module = _skeleton(auto, config, dtype) if lazy and source.path and task == TEXT_GENERATION else None
        if module is not None:
            assert source.path is not None
            weights = safetensors_weights(source.path, module)
    if weights is None:
        with _quiet(), _readable(source), quick_gguf():
            # With sizes that differ it would raise an error that names no weight; they are refused below.
            module, info = auto.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        refuse_other_sizes(source, module, info)
        refuse_missing(source, info, expected=f"a checkpoint for {task}")
        surplus = surplus_layers(info["unexpected_keys"], module)
        if surplus:
            raise SourceError(
                source.text,
                got=f"weights of more layers than config.json has ({', '.join(surplus[:3])})",
                expected="a configuration that the weights were made with",
            )
    assert module is not None
    files = _tokenizer_files(source, where, options) | {"config.json": config_json(module)}
    provenance: dict[str, Any] = {"kind": str(source.kind), "text": source.text}
    if source.path:
        provenance["files"] = entries()
    else:
        provenance["revision"] = getattr(config, "_commit_hash", None) or source.revision
    return LoadedModel(module, source, task, files, provenance, weights=weights)


def _skeleton(auto: Any, config: Any, dtype: torch.dtype) -> Any | None:
    """A decoder without weights; None where transformers quantises or converts it while loading."""
    if getattr(config, "quantization_config", None) is not None:
        return None
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    # transformers 4 makes up weights when it builds a module; 5 computes buffers there as well.
    without_weights = getattr(modeling, "no_init_weights", contextlib.nullcontext)
    with without_weights():
        module = skeleton(lambda: auto.from_config(config, dtype=dtype))
    if module is not None:
        module.tie_weights()
        module.config.dtype = dtype
    return module


def _task_of(source: ModelSource, config: Any) -> str:
    architectures = list(getattr(config, "architectures", None) or [])
    for architecture in architectures:
        for task in TASKS:
            if any(architecture in names for _, names in _loaders(task, config)):
                return task
        # Older than the suffix ForCausalLM.
        if architecture.endswith("LMHeadModel"):
            return TEXT_GENERATION
        for task, (_, suffix) in TASKS.items():
            if architecture.endswith(suffix):
                return task
    raise SourceError(
        source.text,
        got=f"architecture {', '.join(architectures) or 'unnamed in config.json'}",
        expected=f"one that ends in {', '.join(suffix for _, suffix in TASKS.values())}",
        remedy=f"Name the task with --task: {', '.join(TASKS)}",
    )


def _loaders(task: str, config: Any) -> list[tuple[Any, tuple[str, ...]]]:
    """The classes that load a task, each with the architectures that it makes of this configuration."""
    transformers = import_transformers(purpose="loading a model")
    names = TASKS[task][0]
    found = []
    for name in (names,) if isinstance(names, str) else names:
        auto = getattr(transformers, name)
        table = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {})
        made = table.get(getattr(config, "model_type", ""), ())
        found.append((auto, (made,) if isinstance(made, str) else tuple(made)))
    return found


def _auto_class(task: str, config: Any) -> Any:
    loaders = _loaders(task, config)
    wanted = set(getattr(config, "architectures", None) or ())
    for auto, made in loaders:
        if wanted & set(made):
            return auto
    return next((auto for auto, made in loaders if made), loaders[0][0])


def _tokenizer_files(source: ModelSource, where: str, options: Mapping[str, Any]) -> dict[str, bytes]:
    transformers = import_transformers(purpose=f"loading {source.text}")
    files: dict[str, bytes] = {}
    if not source.path or any((source.path / name).exists() for name in _TOKENIZER_FILES):
        with _quiet(), _readable(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        files = saved_files(tokenizer)
    if source.path:
        others = [source.path / name for name in _OTHER_FILES]
        files |= {path.name: path.read_bytes() for path in others if path.is_file()}
    return files | _pooling_files(source)


def _pooling_files(source: ModelSource) -> dict[str, bytes]:
    """What sentence-transformers says about pooling, in one file: its own stand in directories by number."""
    root = source.path
    if root is None or not (root / "modules.json").is_file():
        return {}
    with _readable(source):
        pooling: dict[str, Any] = {}
        for part in json.loads((root / "modules.json").read_bytes()):
            kind = str(part.get("type", "")).rpartition(".")[2]
            if kind == "Pooling":
                place = root / str(part["path"]) / "config.json"
                if root.resolve() in place.resolve().parents:
                    pooling |= json.loads(place.read_bytes())
            elif kind == "Normalize":
                pooling["normalize"] = True
    return {"pooling.json": _json_bytes(pooling)} if pooling else {}


def saved_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that ``tokenizer.save_pretrained`` writes, by name."""
    with tempfile.TemporaryDirectory(prefix="onnxsmith-tokenizer-") as directory:
        with _quiet():
            tokenizer.save_pretrained(directory)
        # The configuration of a local tokenizer repeats the path that it was loaded from.
        found = {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir()) if p.is_file()}
    if "tokenizer_config.json" in found:
        config = json.loads(found["tokenizer_config.json"])
        config.pop("name_or_path", None)
        found["tokenizer_config.json"] = _json_bytes(config)
    return {name: found[name] for name in sorted(found)}


def _load_gguf(source: ModelSource, *, dtype: torch.dtype, lazy: bool) -> LoadedModel:
    from onnxsmith.exporters.gguf_tokenizer import build_tokenizer, special_token_ids
    from onnxsmith.gguf_file import GgufFile

    transformers = import_transformers(purpose=f"loading {source.text}")
    require("accelerate", purpose=f"loading {source.text}")
    assert source.path is not None
    # The header is read and bounded, and the tokenizer rebuilt and checked, before any weight is: both
    # are quick, and a wrong tokenizer makes every later minute worthless.
    gguf = GgufFile.open(source.path)
    tokenizer = build_tokenizer(gguf)
    options = {
        "gguf_file": source.path.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    weights = None
    where, auto = str(source.path.parent), transformers.AutoModelForCausalLM
    with _quiet(), _readable(source):
        module = None
        if lazy:
            with header_known(gguf):
                config = transformers.AutoConfig.from_pretrained(where, **options)
            module = _skeleton(auto, config, dtype)
        if module is not None:
            weights = gguf_weights(gguf, module)
    if weights is None:
        with _quiet(), _readable(source), quick_gguf():
            module, info = auto.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
        refuse_missing(source, info, expected="all weights of the architecture")
    assert module is not None
    # transformers takes these from its own tokenizer conversion, which is wrong for some files.
    ids = special_token_ids(gguf)
    for config in (module.config, module.generation_config):
        config.bos_token_id, config.eos_token_id = ids["bos"], ids["eos"]
        config.pad_token_id = ids["pad"] if ids["pad"] is not None else ids["eos"]
    files = saved_files(tokenizer) | {
        "config.json": config_json(module),
        "generation_config.json": _json_bytes(module.generation_config.to_diff_dict()),
    }
    provenance = {
        "kind": str(source.kind),
        "text": source.text,
        "files": [_file_entry(source.path)],
        "quantization": gguf.tensor_types(),
        "license": gguf.metadata.get("general.license"),
    }
    return LoadedModel(module, source, TEXT_GENERATION, files, provenance, weights=weights)


def config_json(module: Any) -> bytes:
    """The configuration of a model of transformers, without what only this machine knows."""
    config = json.loads(module.config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_attn_implementation_autoset"):
        config.pop(key, None)
    config.setdefault("architectures", [type(module).__name__])
    return _json_bytes(config)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _file_entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _file_entries_begun(paths: Sequence[Path]) -> Callable[[], list[dict[str, Any]]]:
    """Hashes files in a thread, while transformers is imported; what it returns waits for the thread."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    entries = [pool.submit(_file_entry, path) for path in paths]
    pool.shutdown(wait=False)
    return lambda: [entry.result() for entry in entries]


@contextlib.contextmanager
def _readable(source: ModelSource) -> Iterator[None]:
    """Turns what a damaged or foreign model directory raises into one error.

    Readers of third parties raise anything from KeyError to struct.error on damaged files, so the net is
    wide; what is not about the source (memory, an interrupt) passes through.
    """
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if source.kind is SourceKind.HUGGING_FACE_HUB:
            raise SourceError(
                source.text,
                got=f"neither a local path nor a hub model that can be reached ({first_line(error)})",
                expected="an existing directory, or a hub id and a network",
                remedy="Check the spelling; with HF_HUB_OFFLINE=1 only cached models are found",
            ) from error
        raise SourceError(source.text, got=f"cannot be read: {first_line(error)}") from error
    except Exception as error:
        remedy = None
        if "trust_remote_code" in str(error):
            remedy = (
                "onnxsmith never runs code from a model directory. If you trust it, import its class in a "
                "factory of your own and name that as package.module:factory"
            )
        raise SourceError(
            source.text, got=f"cannot be read: {type(error).__name__}: {first_line(error)}", remedy=remedy
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and advice of transformers off the terminal; errors still come as exceptions."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    # Read when tqdm is imported, so too late for this process, but processes that it starts inherit it.
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    had_bars = transformers_logging.is_progress_bar_enabled()
    # The GGUF reader does not ask whether progress bars are wanted.
    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    gguf_bar = gguf_reader.tqdm
    gguf_reader.tqdm = lambda items, **_: items
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf_reader.tqdm = gguf_bar
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars
