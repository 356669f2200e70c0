"""Recipes: what is read, and for each thing that can be wrong with one the line, the key and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onnxsmith import Recipe, load_recipe
from onnxsmith.errors import RecipeError, UnknownNameError
from onnxsmith.pipeline.arguments import pass_spec
from onnxsmith.pipeline.recipe import Budgets

SMALL = """\
schema_version: 1
name: toy
source: my_model:make
variants:
  - name: fp32
    preset: clean
  - name: int8
    passes:
      - cleanup
      - quantize_weights: {bits: 8}
evaluation:
  perplexity:
    data: text.txt
budgets:
  size_mb: 10
"""


def written(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_median_has_two_names() -> None:
    assert Budgets(p50_ms=3).limits() == Budgets(latency_ms=3).limits() == {"latency_ms": 3}


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL))
    assert recipe.name == "toy"
    assert recipe.provider == "cpu"
    assert recipe.choose == "size_mb"
    assert recipe.budgets.size_mb == 10
    assert recipe.evaluation.perplexity is not None
    assert recipe.evaluation.perplexity.window == 512
    assert recipe.variants[1].specs() == [("cleanup", {}), ("quantize_weights", {"bits": 8})]


def test_json_is_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL))
    as_json = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), indent="\t")
    assert load_recipe(written(tmp_path, as_json, "recipe.json")) == recipe


def test_n_of_m_needs_no_quotes(tmp_path: Path) -> None:
    """In YAML 1.1 `2:4` is 124, to the base of sixty."""
    text = SMALL.replace(
        "      - quantize_weights: {bits: 8}", "      - prune_weights: {pattern: 2:4, ratio: 5.0e-1}"
    )
    specs = load_recipe(written(tmp_path, text)).variants[1].specs()
    assert specs == [("cleanup", {}), ("prune_weights", {"pattern": "2:4", "ratio": 0.5})]
    path = written(tmp_path, text)
    changed = load_recipe(path, overrides=["variants.1.passes.1.prune_weights.pattern=4:8"])
    assert changed.variants[1].specs()[1][1]["pattern"] == "4:8"
    assert pass_spec("prune_weights:pattern=2:4,ratio=0.25") == (
        "prune_weights", {"pattern": "2:4", "ratio": 0.25},
    )  # fmt: skip
    assert pass_spec("p:a=60,b=0x10,c=!!int 7,d=[1:2, 3]")[1] == {"a": 60, "b": 16, "c": 7, "d": ["1:2", 3]}


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "budgets:\n  size_mb: 10",
            "budgets:\n  size_bm: 10",
            r"line 15: budgets\.size_bm: unknown key 'size_bm'; "
            r"expected one of .*size_mb.*\. Did you mean 'size_mb'\?",
        ),
        ("name: toy", "nmae: toy", r"recipe\.yaml, line 2: nmae: unknown key 'nmae'.*Did you mean 'name'\?"),
        (
            "    preset: clean",
            "    prest: clean",
            r"line 6: variants\.0\.prest: unknown key 'prest'.*'preset'",
        ),
        ("schema_version: 1\n", "", r"line 1: schema_version: it is missing; expected a value"),
        ("schema_version: 1", "schema_version: 2", r"line 1: schema_version: 2; expected 1"),
        ("size_mb: 10", "size_mb: much", r"line 15: budgets\.size_mb: \"much\"; expected a number"),
        ("size_mb: 10", "size_mb: -1", r"line 15: budgets\.size_mb: -1; expected .*greater than 0"),
        ("size_mb: 10", "size_mb: .nan", r"line 15: budgets\.size_mb: NaN; expected a finite number"),
        ("size_mb: 10", "size_mb: true", r"line 15: budgets\.size_mb: true; expected a number"),
        ("name: toy", "name: ../toy", r"line 2: name: \"\.\./toy\"; expected letters, digits"),
        (
            "name: toy",
            "name: 2026-11-24",
            r"line 2: name: the date 2026-11-24, without quotes; expected a string",
        ),
        ("    preset: clean", "    passes: 7", r"line 6: variants\.0\.passes: 7; expected a list"),
        ("      - cleanup", "      - 7", r"line 9: variants\.1\.passes\.0: 7; expected the name of a pass"),
        (
            "      - cleanup",
            "      - {a: {}, b: {}}",
            r"line 9: variants\.1\.passes\.0: an entry with 2 names",
        ),
        (
            "    preset: clean\n",
            "    preset: clean\n    passes: [cleanup]\n",
            r"line 5: variants\.0: both preset and passes; expected one of them",
        ),
        ("    preset: clean\n", "", r"line 5: variants\.0: neither preset nor passes; expected one of them"),
        (
            "name: int8",
            "name: fp32",
            r"line 7: variants\.1\.name: a second variant named 'fp32'; expected unique",
        ),
        (
            "size_mb: 10",
            "kl_to_reference: 1\nevaluation: {perplexity: null}",
            r"line 16: evaluation: the key stands in line 11 already",
        ),
        (
            "  size_mb: 10",
            "  latency_ms: 5\nchoose: perplexities",
            r"line 16: choose: \"perplexities\"; expected ",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    path = written(tmp_path, SMALL.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "budgets: {perplexity_increase_pct: 2}",
            r"budgets\.perplexity_increase_pct: no evaluation\.perplexity",
        ),
        (
            "budgets: {p50_ms: 2, latency_ms: 2}",
            r"budgets\.p50_ms: latency_ms too; expected one of them",
        ),
        (
            "budgets: {p50_ms: 2}\nevaluation: {benchmark: null}",
            r"budgets\.p50_ms: no evaluation\.bench",
        ),
        (
            "budgets: {latency_ms: 2}\nevaluation: {benchmark: null}",
            r"budgets\.latency_ms: no evaluation\.bench",
        ),
        ("choose: perplexity", r"choose: no evaluation\.perplexity; expected one, to measure this by"),
    ],
)
def test_nothing_is_held_against_what_is_not_measured(tmp_path: Path, change: str, message: str) -> None:
    text = SMALL[: SMALL.index("evaluation:")] + change + "\n"
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"an empty file; expected a mapping"),
        (b"just a sentence", r"a str; expected a mapping"),
        (b"- a\n- b\n", r"a list; expected a mapping"),
        (b"a: [1, 2", r"line 1.*expected YAML or JSON"),
        (b"a: 1\na: 2\n", r"line 2: a: the key stands in line 1 already"),
        (b"\xff\xfe\x00", r"cannot be read: it is not text in UTF-8"),
        (b"a: &a [*a]\n", r"line 1: an alias for what it stands in"),
        (b"a: !!python/object/apply:os.system [true]\n", r"line 1.*could not determine a constructor"),
        (b"a: " + b"[" * 100_000, r"expected YAML or JSON"),
        (b"#" * 300_000, r"more than 256 KiB; expected a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_few_lines_do_not_become_billions_of_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(
        RecipeError, match=r"aliases that stand for very many values; expected at most 100000"
    ):
        load_recipe(written(tmp_path, "\n".join(lines)))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read: No such file or directory"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)


def test_overrides_reach_every_key(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, SMALL),
        overrides=[
            "budgets.size_mb=2.5",
            "variants.int8.passes=[cleanup]",
            "variants.0.preset=cpu-fp32",
            "evaluation.benchmark.runs=3",
            "evaluation.perplexity=null",
            "prompt=The capital of France is",
        ],
    )
    assert recipe.budgets.size_mb == 2.5
    assert recipe.variants[1].passes == ("cleanup",)
    assert recipe.variants[0].preset == "cpu-fp32"
    assert recipe.evaluation.benchmark is not None and recipe.evaluation.benchmark.runs == 3
    assert recipe.evaluation.perplexity is None
    assert recipe.prompt == "The capital of France is"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants=[]", r"--set variants=\[\]: variants: no variant; expected at least one, or a key tune"),
        ("budgets", r"--set budgets: no key=value; expected for example budgets\.size_mb=100"),
        ("=3", "no key=value"),
        ("budgets.size_mb=[1", r"--set budgets\.size_mb=\[1: the value '\[1'; expected a YAML value"),
        ("nokey.x=1", r"--set nokey\.x=1: nokey: unknown key 'nokey'"),
        ("training.seed=3", r"--set training\.seed=3: training\.\w+: "),
        ("budgets.size_bm=3", r"--set budgets\.size_bm=3: budgets\.size_bm: unknown key.*'size_mb'"),
        ("variants.int9.preset=clean", r"unknown entry 'int9'; expected one of fp32, int8, 0, 1\. .*'int8'"),
        ("name.first=x", r"'first' is below the plain value \"toy\"; expected a mapping or a list"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, SMALL), overrides=[override])


def test_an_unknown_preset_gets_a_suggestion(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALL))
    variant = recipe.variants[0].model_copy(update={"preset": "cpu-int5"})
    with pytest.raises(
        UnknownNameError, match=r"variant fp32: unknown preset 'cpu-int5'.*Did you mean 'cpu-int"
    ):
        variant.specs()


def test_several_errors_are_counted(tmp_path: Path) -> None:
    text = SMALL.replace("name: toy", "nmae: toy").replace("size_mb: 10", "size_mb: x")
    with pytest.raises(RecipeError, match=re.escape("(2 more errors)")):
        load_recipe(written(tmp_path, text))


def test_toml_is_the_same(tmp_path: Path) -> None:
    toml = """
schema_version = 1
name = "toy"
source = "my_model:make"
variants = [
  {name = "fp32", preset = "clean"},
  {name = "int8", passes = ["cleanup", {quantize_weights = {bits = 8}}]},
]
budgets = {size_mb = 10}
[evaluation.perplexity]
data = "text.txt"
"""
    path = written(tmp_path, toml, "recipe.toml")
    assert load_recipe(path) == load_recipe(written(tmp_path, SMALL))
    written(tmp_path, toml.replace("size_mb", "size_bm"), "recipe.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml, line 9: budgets\.size_bm: unknown key .*'size_mb'"):
        load_recipe(path)
    written(tmp_path, "schema_version = \n", "recipe.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml, line 1, column \d+: Invalid value; expected TOML"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('name = "int8"\n', 'nmae = "int8"\n', r"13: variants\.1\.nmae: unknown key"),
        ("samples = 3", "samples = 'x'", r"22: evaluation\.comparison\.samples: \"x\""),
        ('data = "text.txt"\n', "", r"18: evaluation\.perplexity\.data: it is missing"),
        ('source = "m:make"\n', "", r"1: source: it is missing"),
        ("  'cleanup',", "  'claenup',", r"1[45]: variants\.1\.passes\.0: unknown pass 'claenup'"),
        ("size_mb = 10", "size_mb = 10\nsize_bm = 1", r"26: budgets\.size_bm: unknown key"),
    ],
)
def test_an_error_in_toml_has_its_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    toml = """schema_version = 1
name = "toy"  # the [name]
source = "m:make"
prompt = \'\'\'
[budgets]
size_bm = 1
\'\'\'

[[variants]]
name = "fp32"
preset = "clean"
[[variants]]
name = "int8"
passes = [
  'cleanup',
  {quantize_weights = {bits = 8}},
]
[evaluation.perplexity]
data = "text.txt"

[evaluation]
comparison.samples = 3

[budgets]
size_mb = 10
"""
    assert old in toml
    path = written(tmp_path, toml, "recipe.toml")
    load_recipe(path)
    written(tmp_path, toml.replace(old, new), "recipe.toml")
    with pytest.raises(RecipeError, match=rf"recipe\.toml, line {line}"):
        load_recipe(path)


def test_json_with_tabs_has_lines(tmp_path: Path) -> None:
    text = '{\n\t"schema_version": 1,\n\t"nmae":\t"x"\n}\n'
    with pytest.raises(RecipeError, match=r"recipe\.json, line 3: nmae: unknown key 'nmae'"):
        load_recipe(written(tmp_path, text, "recipe.json"))


def test_a_recipe_adds_to_the_one_that_it_extends(tmp_path: Path) -> None:
    written(tmp_path, SMALL, "base.yaml")
    (tmp_path / "below").mkdir()
    text = (
        "extends: ../base.yaml\nname: other\nbudgets: {latency_ms: 5}\nvariants: [{name: a, preset: clean}]\n"
    )
    recipe = load_recipe(written(tmp_path / "below", text))
    assert recipe.name == "other"
    assert (recipe.budgets.size_mb, recipe.budgets.latency_ms) == (10, 5)
    assert [variant.name for variant in recipe.variants] == ["a"]
    assert recipe.evaluation.perplexity is not None
    assert recipe.extends is None
    third = written(tmp_path, "extends: below/recipe.yaml\nbudgets: {size_mb: 3}\n", "third.yaml")
    recipe = load_recipe(third, overrides=["budgets.latency_ms=7"])
    assert (recipe.name, recipe.budgets.size_mb, recipe.budgets.latency_ms) == ("other", 3, 7)


def test_what_is_wrong_is_named_in_the_file_that_says_it(tmp_path: Path) -> None:
    written(tmp_path, SMALL.replace("size_mb: 10", "size_bm: 10"), "base.yaml")
    path = written(tmp_path, "extends: base.yaml\nbudgets: {latency_ms: 5}\n")
    with pytest.raises(RecipeError, match=r"base\.yaml, line 15: budgets\.size_bm: unknown key"):
        load_recipe(path)
    written(tmp_path, SMALL, "base.yaml")
    path = written(tmp_path, "extends: base.yaml\nbudgets:\n  latency_sm: 5\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml, line 3: budgets\.latency_sm: unknown key"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recipe.yaml", r"recipe\.yaml, line 1: extends: recipe\.yaml, which extends this file"),
        ("other.yaml", r"other\.yaml, line 1: extends: recipe\.yaml, which extends this file"),
        ("gone.yaml", r"gone\.yaml: cannot be read: No such file"),
        ("[1]", r"line 1: extends: \[1\]; expected a path"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, name: str, message: str) -> None:
    written(tmp_path, "extends: recipe.yaml\n", "other.yaml")
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, f"extends: {name}\n"))


MATRIX = """\
  - name: q
    matrix:
      bits: [4, 8]
      method: [rtn, hqq]
    passes:
      - cleanup
      - quantize_weights: {bits: "${matrix:bits}", method: "${matrix:method}"}
"""


def test_a_matrix_is_one_variant_for_each_combination(tmp_path: Path) -> None:
    text = SMALL.replace("evaluation:", MATRIX + "evaluation:")
    recipe = load_recipe(written(tmp_path, text))
    assert [v.name for v in recipe.variants] == ["fp32", "int8", "q-4-rtn", "q-4-hqq", "q-8-rtn", "q-8-hqq"]
    # A placeholder that stands alone becomes the value, with its type.
    assert recipe.variants[3].specs() == [("cleanup", {}), ("quantize_weights", {"bits": 4, "method": "hqq"})]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    presets = "  - {name: p, matrix: {kind: [int8, int4]}, preset: 'cpu-${matrix:kind}'}\n"
    recipe = load_recipe(written(tmp_path, SMALL.replace("evaluation:", presets + "evaluation:")))
    assert [(v.name, v.preset) for v in recipe.variants[2:]] == [
        ("p-int8", "cpu-int8"),
        ("p-int4", "cpu-int4"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("${matrix:bits}", "${matrix:bit}", r"line 15: variants\.2\.passes: \$\{matrix:bit\}; .*'bits'"),
        ("${matrix:method}", "rtn", r"line 14: variants\.2\.matrix\.method: no \$\{matrix:method\}"),
        ("bits: [4, 8]", "bits: []", r"line 13: variants\.2\.matrix\.bits: \[\]; expected .*at least 1"),
        ("bits: [4, 8]", f"bits: {list(range(60))}", r"line 12: variants\.2\.matrix: 120 combinations"),
        ("name: q", "name: fp32", None),
        ("bits: [4, 8]", "bits: [4, 4]", r"line 11: variants\.2\.name: a second variant named 'q-4-rtn'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_matrix_is_said(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    text = SMALL.replace("evaluation:", MATRIX.replace(old, new) + "evaluation:")
    if message is None:
        assert load_recipe(written(tmp_path, text)).variants[2].name == "fp32-4-rtn"
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


def test_environment_variables_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SMALL.replace("my_model:make", "${env:MODELS}/toy").replace(
        "size_mb: 10", "size_mb: ${env:LIMIT:-20}"
    )
    text += "prompt: costs $5 ${PRICE} $${env:HOME}\n"
    monkeypatch.setenv("MODELS", "/data")
    monkeypatch.delenv("LIMIT", raising=False)
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.source == "/data/toy"
    assert recipe.budgets.size_mb == 20
    assert recipe.prompt == "costs $5 ${PRICE} ${env:HOME}"
    monkeypatch.setenv("LIMIT", "7.5")
    assert load_recipe(written(tmp_path, text)).budgets.size_mb == 7.5
    assert load_recipe(written(tmp_path, text), overrides=["name=${env:LIMIT:-x}"]).name == "7.5"
    monkeypatch.delenv("MODELS")
    with pytest.raises(
        RecipeError,
        match=r"line 3: source: the environment variable MODELS is not set; expected a value\. "
        r"Set it, or give a default: \$\{env:MODELS:-\.\.\.\}",
    ):
        load_recipe(written(tmp_path, text))
    with pytest.raises(RecipeError, match=r"--set source=.*: the environment variable MODELS is not set"):
        load_recipe(written(tmp_path, SMALL), overrides=["source=${env:MODELS}"])
    with pytest.raises(RecipeError, match=r"line 3: source: \$\{env:1\}; expected \$\{env:NAME\} or"):
        load_recipe(written(tmp_path, SMALL.replace("my_model:make", "${env:1}")))


def test_an_unset_variable_of_an_extended_recipe_is_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODELS", raising=False)
    written(tmp_path, SMALL.replace("my_model:make", "${env:MODELS}"), "base.yaml")
    child = written(tmp_path, "extends: base.yaml\nname: other\n", "child.yaml")
    with pytest.raises(RecipeError, match=r"base\.yaml, line 3: source: the environment variable MODELS"):
        load_recipe(child)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("preset: cpu-fp23", r"line 5: variants\.0\.preset: unknown preset 'cpu-fp23'.*'cpu-fp32'\?"),
        ("passes:\n      - cleanup\n      - quantise_weights",
         r"line 7: variants\.0\.passes\.1: unknown pass 'quantise_weights'.*'quantize_weights'\?"),
        ("passes:\n      - quantize_weights:\n          bits: 4\n          block_sise: 32",
         r"line 8: variants\.0\.passes\.0\.quantize_weights\.block_sise: unknown.*'block_size'\?"),
        ("passes:\n      - cleanup\n      - quantize_weights:\n          bits: four",
         r"line 8: variants\.0\.passes\.1\.quantize_weights\.bits: 'four'; expected 2, 4 or 8"),
        ("passes: [{quantize_weights: {bits: \"${matrix:b}\"}}]\n    matrix: {b: [4, 5]}",
         r"line 5: variants\.0\.passes\.0\.quantize_weights\.bits: 5; expected 2, 4 or 8"),
    ],
)  # fmt: skip
def test_passes_that_do_not_exist_are_found_with_their_lines(
    tmp_path: Path, entry: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"schema_version: 1\nname: x\nsource: a:b\nvariants:\n  - {entry}\n    name: v\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_an_override_is_to_blame_for_its_pass(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    with pytest.raises(RecipeError, match=r"--set variants\.fp32\.preset=cpu: variants\.0\.preset: unknown"):
        load_recipe(path, overrides=["variants.fp32.preset=cpu"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("task: text-generatoin", r"line 7: task: unknown task.*'text-generation'\?"),
        ("provider: cuda9", r"line 7: provider: unknown execution provider.*'cuda'\?"),
        ("provider: 'cpu9:arena=1'", r"line 7: provider: unknown execution provider"),
        ("evaluation:\n  task:\n    data: x.csv\n    metrics: [f1, acuracy]",
         r"line 10: evaluation\.task\.metrics\.1: unknown metric 'acuracy'.*'accuracy'\?"),
        ("evaluation: {task: {data: x.csv}}\nbudgets:\n  metric_drop_pct: {acuracy: 1}",
         r"line 9: budgets\.metric_drop_pct\.acuracy: unknown metric"),
    ],
)  # fmt: skip
def test_names_are_looked_up_before_any_work(tmp_path: Path, more: str, message: str) -> None:
    text = "schema_version: 1\nname: x\nsource: a:b\nvariants:\n  - name: v\n    preset: clean\n"
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, f"{text}{more}\n"))


def test_a_provider_that_is_not_here_may_stand_in_a_recipe(tmp_path: Path) -> None:
    for name in ("cuda", "tensorrt:trt_fp16_enable=1", "mine@/nowhere/lib.so"):
        assert load_recipe(written(tmp_path, SMALL + f"provider: '{name}'\n")).provider == name
