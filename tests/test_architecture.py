"""The rules of the house that a parser can check.

The rules are functions from one parsed module to complaints; `complaints` applies all of them to a tree. The
tests run it on this checkout, where it must find nothing, and on planted violations, where it must find each.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "onnxsmith"
MIDDLE = ("exporters", "graph_passes", "runtime", "training")
FOLDERS = (*MIDDLE, "pipeline")
CORE = "core"
# onnxsmith/__init__.py: names of every layer, each imported when it is first used.
FACADE = "facade"

# layer -> the layers that it may import
ALLOWED = {
    CORE: {CORE},
    **{name: {CORE, name} for name in MIDDLE},
    "pipeline": {CORE, *FOLDERS},
    FACADE: {CORE},
}
# To be imported inside the function that needs them: they are slow to import or not installed everywhere.
HEAVY = {"gguf", "onnxruntime", "onnxscript", "optimum", "optuna", "ray", "torch", "transformers"}
MAX_LINES = 500
NAMELESS = re.compile(r"(.+_)?(util|helper|manager)s?|common|misc")

MUTABLE_DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MUTABLE_CALLS = {"dict", "list", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"}
READ_ONLY = {"Mapping", "Sequence", "Collection", "AbstractSet"}


@dataclass(frozen=True)
class Module:
    """One parsed file of the package."""

    path: Path
    name: str
    is_package: bool
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return layer_of(self.name)


def layer_of(name: str) -> str:
    if name == PACKAGE:
        return FACADE
    part = name.split(".")[1]
    return part if part in FOLDERS else CORE


def modules(root: Path) -> list[Module]:
    core = root / "src" / PACKAGE
    bases = dict.fromkeys(core.glob("*.py"), core)
    for folder in FOLDERS:
        bases.update(dict.fromkeys((root / folder).rglob("*.py"), root))
    found: list[Module] = []
    for path, base in sorted(bases.items()):
        parts = [PACKAGE, *path.relative_to(base).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(path.relative_to(root), name, is_package, text, ast.parse(text, str(path))))
    return found


def imports(module: Module, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """The absolute dotted names that the nodes import, with `from a import b` as `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.name.split(".")
                keep = len(parents) - node.level + module.is_package
                origin = ".".join([*parents[:keep], *([origin] if origin else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            # Otherwise import_module("...") and __import__("...") would be the way around every rule.
            function, name = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if called in {"import_module", "__import__"} and literal:
                yield node.lineno, str(name.value)


def at_import_time(body: Sequence[ast.AST], *, classes: bool = True) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, nothing for type checkers only."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from at_import_time(node.orelse, classes=classes)
            continue
        yield node
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_function and (classes or not isinstance(node, ast.ClassDef)):
            yield from at_import_time(list(ast.iter_child_nodes(node)), classes=classes)


def check_layers(module: Module, core_names: set[str]) -> Iterator[str]:
    # The facade names every layer to type checkers and imports none before it is asked for a name.
    nodes = at_import_time(module.tree.body) if module.layer == FACADE else ast.walk(module.tree)
    for line, target in imports(module, nodes):
        root, _, rest = target.partition(".")
        if root in FOLDERS:
            yield f"{line}: imports {target!r}; expected it under its installed name {PACKAGE}.{root}"
        elif root == PACKAGE:
            first = rest.partition(".")[0]
            layer = layer_of(target)
            if first not in core_names | set(FOLDERS):
                yield (
                    f"{line}: imports {target!r} from the public facade, which reaches every layer; "
                    "expected the module that defines it"
                )
            elif layer not in ALLOWED[module.layer]:
                allowed = ", ".join(sorted(ALLOWED[module.layer]))
                yield f"{line}: {module.layer} imports {target!r}; expected only {allowed}"


def check_heavy_imports(module: Module, _core_names: set[str]) -> Iterator[str]:
    for line, target in imports(module, at_import_time(module.tree.body)):
        if target.partition(".")[0] in HEAVY:
            yield (
                f"{line}: imports {target!r} when it is imported; expected that inside the function "
                "that needs it, or under `if TYPE_CHECKING:`"
            )


def check_global_state(module: Module, _core_names: set[str]) -> Iterator[str]:
    """A module-level dict, list or set has a type without methods that change it, so that mypy guards it.

    Class bodies are left out: fields of dataclasses and pydantic models have linters of their own.
    """
    for node in at_import_time(module.tree.body, classes=False):
        if isinstance(node, ast.Assign):
            targets, annotation = [t for t in node.targets if isinstance(t, ast.Name)], None
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            targets, annotation = [node.target], node.annotation
        else:
            continue
        if is_mutable(node.value) and not is_read_only(annotation):
            for target in targets:
                if target.id != "__all__":
                    yield (
                        f"{node.lineno}: {target.id} is a mutable global; expected the annotation Mapping, "
                        "Sequence or Collection, or a tuple, frozenset or MappingProxyType"
                    )


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        function = value.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return called in MUTABLE_CALLS
    return isinstance(value, MUTABLE_DISPLAYS)


def is_read_only(annotation: ast.expr | None) -> bool:
    outer = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    name = outer.attr if isinstance(outer, ast.Attribute) else getattr(outer, "id", "")
    if name == "Final" and isinstance(annotation, ast.Subscript):
        # Final only forbids another assignment; what it holds must be read-only too.
        return is_read_only(annotation.slice)
    return name in READ_ONLY


def check_names(module: Module, _core_names: set[str]) -> Iterator[str]:
    for part in module.name.split(".")[1:]:
        if NAMELESS.fullmatch(part.strip("_")):
            yield f"1: {part!r} does not say what it is about; expected a module named after its subject"


def check_length(module: Module, _core_names: set[str]) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines >= MAX_LINES:
        yield f"{lines}: {lines} lines; expected under {MAX_LINES}, one subject per module"


RULES: Sequence[Callable[[Module, set[str]], Iterator[str]]] = (
    check_layers,
    check_heavy_imports,
    check_global_state,
    check_names,
    check_length,
)


def complaints(root: Path) -> list[str]:
    found = modules(root)
    core_names = {m.name.split(".")[1] for m in found if m.layer == CORE}
    return [f"{m.path}:{text}" for m in found for rule in RULES for text in rule(m, core_names)]


def test_something_is_checked() -> None:
    layers = {module.layer for module in modules(ROOT)}
    assert layers == {CORE, FACADE, *FOLDERS}


def test_the_package_keeps_the_rules() -> None:
    found = complaints(ROOT)
    assert not found, "\n" + "\n".join(found)


CLEAN = {
    "src/onnxsmith/__init__.py": """
        from collections.abc import Mapping
        __all__ = ["export"]
        _HOMES: Mapping[str, str] = {"export": "onnxsmith.exporters.api"}
        def __getattr__(name):
            import importlib
            return getattr(importlib.import_module(_HOMES[name]), name)
        """,
    "src/onnxsmith/errors.py": "class OnnxsmithError(Exception): ...",
    "exporters/__init__.py": "",
    "exporters/api.py": """
        from __future__ import annotations
        from collections.abc import Mapping
        from typing import TYPE_CHECKING, Final
        from onnxsmith.errors import OnnxsmithError
        from onnxsmith import errors
        from onnxsmith.exporters.inner.deep import f
        from .inner import deep
        from types import MappingProxyType
        if TYPE_CHECKING:
            import torch
        KINDS: Final[Mapping[int, int]] = {1: 2}
        NAMES: Final = frozenset({"a"})
        COUNT: int = 3
        TABLE = MappingProxyType({1: 2})
        class A:
            fields = [1]
        def export():
            import torch
            from transformers import AutoModel
            cache = {}
        """,
    "exporters/inner/__init__.py": "",
    "exporters/inner/deep.py": "from ... import errors\nfrom ..api import export\ndef f(): ...",
    "graph_passes/common_subexpressions.py": "import onnx_ir",
    "runtime/session.py": "def open():\n    import onnxruntime",
    "pipeline/run.py": """
        from onnxsmith.exporters.api import export
        from onnxsmith import graph_passes, runtime
        from ..errors import OnnxsmithError
        """,
}

VIOLATIONS = {
    "core imports a folder": ("src/onnxsmith/package.py", "import onnxsmith.exporters.api", "core imports"),
    "core imports a folder, lazily": (
        "src/onnxsmith/package.py",
        "def f():\n    from onnxsmith import runtime",
        "core imports 'onnxsmith.runtime'",
    ),
    "the facade imports a folder for real": (
        "src/onnxsmith/__init__.py",
        "from onnxsmith.pipeline.run import x",
        "facade imports",
    ),
    "a middle folder imports another": (
        "exporters/bad.py",
        "from onnxsmith.graph_passes.fold import Fold",
        r"exporters imports 'onnxsmith.graph_passes.fold.Fold'",
    ),
    "a middle folder imports another, relatively": (
        "runtime/bad.py",
        "from ..exporters import api",
        "runtime imports 'onnxsmith.exporters.api'",
    ),
    "a middle folder imports the pipeline": (
        "graph_passes/bad.py",
        "import onnxsmith.pipeline.run",
        "graph_passes imports 'onnxsmith.pipeline.run'",
    ),
    "only for type checkers, too": (
        "graph_passes/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from onnxsmith.runtime.session import S",
        "graph_passes imports 'onnxsmith.runtime.session.S'",
    ),
    "by a string": (
        "graph_passes/bad.py",
        "import importlib\ndef f():\n    importlib.import_module('onnxsmith.runtime')",
        "graph_passes imports 'onnxsmith.runtime'",
    ),
    "through the facade": ("runtime/bad.py", "from onnxsmith import export", "public facade"),
    "the facade itself": ("runtime/bad.py", "import onnxsmith", "public facade"),
    "under its root name": ("pipeline/bad.py", "from exporters.api import export", "installed name"),
    "torch at the top": ("exporters/bad.py", "import torch.nn as nn", r"'torch\.nn' when it is imported"),
    "torch in a class body": (
        "exporters/bad.py",
        "class A:\n    from torch import nn",
        "when it is imported",
    ),
    "torch in a try": (
        "exporters/bad.py",
        "try:\n    import onnxruntime\nexcept ImportError:\n    onnxruntime = None",
        "when it is imported",
    ),
    "torch where the type checker is not": (
        "exporters/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch",
        "when it is imported",
    ),
    "torch by a string": (
        "exporters/bad.py",
        "import importlib\ntorch = importlib.import_module('torch')",
        "when it is imported",
    ),
    "a registry": ("graph_passes/bad.py", "PASSES = {}", "PASSES is a mutable global"),
    "a private registry": ("graph_passes/bad.py", "_seen: list[str] = list()", "_seen is a mutable global"),
    "a registry called final": (
        "graph_passes/bad.py",
        "from typing import Final\nPASSES: Final = {'a': 1}",
        "PASSES is a mutable global",
    ),
    "a registry in a branch": (
        "graph_passes/bad.py",
        "if True:\n    CACHE = set()",
        "CACHE is a mutable global",
    ),
    "a registry with a factory": (
        "runtime/bad.py",
        "import collections\nHITS = collections.defaultdict(int)",
        "HITS is a mutable global",
    ),
    "utils": ("runtime/utils.py", "", "'utils' does not say"),
    "private helpers": ("runtime/_helpers.py", "", "'_helpers' does not say"),
    "graph_utils": ("graph_passes/graph_utils.py", "", "'graph_utils' does not say"),
    "a folder named common": ("pipeline/common/__init__.py", "", "'common' does not say"),
    "too long": ("pipeline/long.py", "x = 1\n" * 500, "500 lines"),
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root


def test_a_clean_tree_has_no_complaints(tmp_path: Path) -> None:
    assert complaints(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(("path", "text", "expected"), VIOLATIONS.values(), ids=list(VIOLATIONS))
def test_a_violation_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    found = complaints(plant(tmp_path, {**CLEAN, path: text}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")
    assert re.search(expected, found[0]), found[0]
