"""The registry of passes: ours, those of other packages, and the presets made of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxsmith import graph_passes
from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.graph_passes import PASSES, PRESETS, load_pass, make_passes, pass_names
from onnxsmith.graph_passes.contract import GraphPass
from onnxsmith.graph_passes.presets import PURPOSES, REASONS


@pytest.mark.parametrize("name", sorted(PASSES))
def test_our_passes(name: str) -> None:
    kind = load_pass(name)
    assert issubclass(kind, GraphPass)
    assert kind.name == name
    assert f"{kind.__module__}:{kind.__qualname__}" == PASSES[name]
    assert kind.summary.strip()
    assert len(kind.summary) <= 100
    assert kind.__doc__
    for parameter in inspect.signature(kind).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert f"{parameter.name}:" in (kind.__init__.__doc__ or ""), parameter.name


def test_every_pass_of_every_module_is_registered() -> None:
    found = set()
    for path in Path(graph_passes.__file__).resolve().parent.glob("*.py"):
        module = importlib.import_module(f"onnxsmith.graph_passes.{path.stem}".removesuffix(".__init__"))
        found |= {
            f"{kind.__module__}:{kind.__name__}"
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, GraphPass) and not inspect.isabstract(kind)
        }
    assert found == set(PASSES.values())


def test_the_mapping_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PASSES["x"] = "y"  # type: ignore[index]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_can_be_made(preset: str) -> None:
    made = make_passes(PRESETS[preset])
    assert [one.name for one in made] == [name for name, _ in PRESETS[preset]]


def test_presets_say_what_they_are_for_and_why_each_pass_is_there() -> None:
    assert list(PURPOSES) == list(PRESETS)
    assert {name for specs in PRESETS.values() for name, _ in specs} == set(REASONS)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown pass 'clenup'; expected one of .*Did you mean 'cleanup'"
    ):
        load_pass("clenup")
    with pytest.raises(UnknownNameError, match="unknown pass 'nothing'; expected one of cleanup, con"):
        load_pass("nothing")


Install = Callable[[str, str], None]

THEIRS = """
from onnxsmith.graph_passes.contract import Changes, GraphPass
class Theirs(GraphPass):
    name = "theirs"
    summary = "nothing"
    def __init__(self, *, level: int = 1) -> None:
        self.level = level
    def apply(self, model):
        return Changes()
class Container:
    inner = Theirs
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes an installed distribution with one module and the given entry points."""

    def make(points: str, source: str) -> None:
        info = tmp_path / "foreign_passes-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-passes\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[onnxsmith.passes]\n{points}\n")
        # A name of its own for each test, because modules stay imported.
        (tmp_path / f"foreign_{tmp_path.name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


@pytest.fixture
def module(tmp_path: Path) -> str:
    return f"foreign_{tmp_path.name}"


def test_a_foreign_pass_is_found(install: Install, module: str) -> None:
    install(f"theirs = {module}:Container.inner", THEIRS)
    assert pass_names() == sorted([*PASSES, "theirs"])
    (made,) = make_passes([("theirs", {"level": "2"})])
    assert made.arguments() == {"level": 2}


def test_a_foreign_pass_cannot_replace_ours(install: Install, module: str) -> None:
    install(f"cleanup = {module}:Theirs", THEIRS)
    assert load_pass("cleanup").__module__ == "onnxsmith.graph_passes.cleanup"
    assert pass_names() == sorted(PASSES)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (":Theirs", "raise OSError('no licence')", "its entry point .* fails: OSError: no licence"),
        (":Theirs", "import no_such_module", "fails: ModuleNotFoundError: No module named 'no_such_module'"),
        (":Theirs", "x = (", "fails: SyntaxError"),
        (":Nothing", THEIRS, "fails: AttributeError"),
        (":Container", THEIRS, "is <class .*Container'>; expected a GraphPass class"),
        ("", THEIRS, "is <module .*; expected a GraphPass class"),
        (":Theirs", THEIRS, "has the name 'theirs'; expected a GraphPass class with the name 'other'"),
    ],
)
def test_a_broken_foreign_pass_names_its_package(
    install: Install, module: str, target: str, source: str, message: str
) -> None:
    install(f"other = {module}{target}", source)
    assert "other" in pass_names()
    with pytest.raises(BadInputError, match=f"(?s)pass other: .*{message}.*the package 'foreign-passes'"):
        load_pass("other")
    assert load_pass("cleanup").name == "cleanup"
