"""Programs of a few lines that run an artifact with ONNX Runtime and nothing else of weight."""

from __future__ import annotations

import json
from collections.abc import Mapping

from onnxsmith.context_length import context_of_files
from onnxsmith.errors import BadInputError
from onnxsmith.own_operators import uses_own_operators
from onnxsmith.package import TEXT_GENERATION, ModelPackage, cache_pairs
from onnxsmith.runtime.kernel_library import SCRIPT_LINES
from onnxsmith.runtime.kernels.build import LIBRARY_NAME

__all__ = ["dockerfile", "inference_script"]

_DECODER = '''\
"""Continues a text, always with the most likely token: python infer.py "The capital of France is" 32"""
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
{kernels}session = ort.InferenceSession(str(here / "{graph}"){options}, providers=["CPUExecutionProvider"])
inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
feeds = {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.{dtype}) for i in inputs if "past" in i.name}}
new = tokenizer.encode(sys.argv[1]).ids
ids, total = [], 0
while len(ids) < int(sys.argv[2] if len(sys.argv) > 2 else 64):
    positions, total = np.arange(total, total + len(new))[None], total + len(new)
    given = {{"input_ids": np.array([new]), "attention_mask": np.ones((1, total)), "position_ids": positions}}
    given = {{i.name: given[i.name].astype(np.int64) for i in inputs if i.name in given}}
    results = dict(zip(outputs, session.run(None, feeds | given)))
    feeds = {{n.replace("present", "past_key_values"): results[n] for n in outputs if "present" in n}}
    new = [int(results["logits"][0, -1].argmax())]
    if new[0] in {stop}:
        break
    ids += new
print(sys.argv[1] + tokenizer.decode(ids))
'''

_TEXT = '''\
"""Runs texts through the model: python infer.py "a text" "another" """
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.enable_padding(pad_id={pad})
tokenizer.enable_truncation({length})
{kernels}session = ort.InferenceSession(str(here / "{graph}"){options}, providers=["CPUExecutionProvider"])
encoded = tokenizer.encode_batch(sys.argv[1:])
columns = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
names = [i.name for i in session.get_inputs()]
feeds = {{name: np.array([getattr(e, columns[name]) for e in encoded], np.int64) for name in names}}
for output, array in zip(session.get_outputs(), session.run(None, feeds)):
    print(output.name, array.shape, array)
'''

_ARRAYS = '''\
"""Runs arrays through the model: python infer.py inputs.npz outputs.npz"""
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).resolve().parent
{kernels}session = ort.InferenceSession(str(here / "{graph}"){options}, providers=["CPUExecutionProvider"])
given = np.load(sys.argv[1])
feeds = {{i.name: given[i.name] for i in session.get_inputs()}}
names = [output.name for output in session.get_outputs()]
np.savez(sys.argv[2], **dict(zip(names, session.run(names, feeds))))
'''

_SEVERAL = '''\
"""Shows the graphs of the model with their inputs and outputs: python infer.py"""
from pathlib import Path

import onnxruntime as ort

here = Path(__file__).resolve().parent
{kernels}for graph in {graphs}:
    session = ort.InferenceSession(str(here / graph){options}, providers=["CPUExecutionProvider"])
    print(graph)
    for kind, values in (("in", session.get_inputs()), ("out", session.get_outputs())):
        for value in values:
            print(f"  {{kind:4}}{{value.name}}: {{value.type}} {{value.shape}}")
'''

_DOCKERFILE = """\
{build}FROM python:3.11-slim
WORKDIR /model
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
{copy}ENTRYPOINT ["python", "infer.py"]
"""

# The slim image has no compiler.
_BUILD = """\
FROM python:3.11 AS kernels
COPY kernels /kernels
RUN python /kernels/build.py

"""
_COPY = f"COPY --from=kernels /kernels/{LIBRARY_NAME} kernels/\n"

_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})


def inference_script(package: ModelPackage, graphs: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A program that runs a package, and the packages that it imports.

    Where a graph has onnxsmith's own operators, the program compiles them when it is first run.

    Args:
        package: What to run.
        graphs: Component to its file, relative to the program.
    """
    own = _has_own_operators(package)
    given = {
        "kernels": f"options = ort.SessionOptions()\n{SCRIPT_LINES}" if own else "",
        "options": ", options" if own else "",
    }
    if len(graphs) != 1:
        return _SEVERAL.format(graphs=tuple(graphs.values()), **given), ("onnxruntime", "numpy")
    [graph] = graphs.values()
    component = package.main
    cache = cache_pairs(component.inputs, component.outputs)
    names = {spec.name for spec in component.inputs}
    if package.task == TEXT_GENERATION and cache and "tokenizer.json" in package.files:
        from onnxsmith.pipeline.tokenization import PackageTokenizer

        stop = sorted(PackageTokenizer(package).stop_ids)
        if cache[0].past.dtype not in ("float32", "float16"):
            raise BadInputError(
                "package: layout ort",
                got=f"a KV cache in {cache[0].past.dtype}",
                expected="float32 or float16, which numpy has",
            )
        script = _DECODER.format(graph=graph, dtype=cache[0].past.dtype, stop=stop, **given)
        return script, ("onnxruntime", "numpy", "tokenizers")
    if names <= _TEXT_INPUTS and "tokenizer.json" in package.files:
        pad, length = _number(package, "pad_token_id", 0), _length(package)
        script = _TEXT.format(graph=graph, pad=pad, length=length, **given)
        return script, ("onnxruntime", "numpy", "tokenizers")
    return _ARRAYS.format(graph=graph, **given), ("onnxruntime", "numpy")


def dockerfile(package: ModelPackage) -> str:
    """An image that serves the program beside it; onnxsmith's own operators are compiled with it."""
    own = _has_own_operators(package)
    return _DOCKERFILE.format(build=_BUILD if own else "", copy=_COPY if own else "")


def _has_own_operators(package: ModelPackage) -> bool:
    return any(uses_own_operators(component.model) for component in package.components.values())


def _number(package: ModelPackage, key: str, otherwise: int, *, file: str = "config.json") -> int:
    try:
        value = json.loads(package.files.get(file, b"{}")).get(key)
    except (ValueError, AttributeError):
        return otherwise
    return value if isinstance(value, int) else otherwise


def _length(package: ModelPackage) -> int:
    """The longest text: some models have a few positions that no token may take."""
    told = _number(package, "model_max_length", 512, file="tokenizer_config.json")
    return min(told, context_of_files(package.files) or told)
