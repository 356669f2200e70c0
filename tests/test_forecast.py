"""What a run says it will need, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from onnxsmith import Recipe, run_recipe
from onnxsmith.errors import ResourceError
from onnxsmith.free_memory import available_memory
from onnxsmith.pipeline import forecast
from onnxsmith.pipeline.forecast import forecast_run, foresee, require_resources
from onnxsmith.pipeline.model_size import model_size
from onnxsmith.pipeline.run_steps import on_one_disk
from onnxsmith.pipeline.step_cache import StepCache
from onnxsmith.source import ModelSource

pytest.importorskip("torch")


def recipe_of(source: object) -> Recipe:
    plain: dict[str, Any] = {
        "schema_version": 1, "name": "tiny", "source": str(source),
        "variants": [{"name": "fp32", "preset": "cpu-fp32"}], "evaluation": {"benchmark": None},
    }  # fmt: skip
    return Recipe.model_validate(plain)


def test_the_headers_say_how_large_a_model_is(tiny_llama_dir: Path, tiny_loaded: Any) -> None:
    size = model_size(ModelSource.parse(str(tiny_llama_dir)))
    assert size is not None and size.decoder and size.vocabulary == 64
    assert size.parameters == sum(p.numel() for p in tiny_loaded.module.parameters())
    assert model_size(ModelSource.parse("module:factory")) is None


def test_what_cannot_fit_is_refused_unless_it_is_forced(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "available_memory", lambda: 100_000_000)
    recipe = recipe_of(tiny_llama_dir)
    with pytest.raises(ResourceError, match=r"100 MB of memory available; expected about 6\d\d MB"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = run_recipe(recipe, tmp_path / "out", ignore_forecast=True)
    assert report.passed and report.steps[0].note.startswith("about 6")
    assert report.forecast is not None and 600 < report.forecast["peak_mb"] < 700


def test_the_float_model_that_only_quantized_variants_are_timed_beside_counts(tiny_llama_dir: Path) -> None:
    def told(*presets: str, **evaluation: object) -> forecast.Forecast:
        plain = recipe_of(tiny_llama_dir).model_dump(mode="json", exclude_unset=True)
        plain["variants"] = [{"name": one, "preset": one} for one in presets]
        recipe = Recipe.model_validate(plain | {"evaluation": evaluation})
        return forecast_run(recipe, ModelSource.parse(recipe.source), cache=None)

    alone, both = told("cpu-int4"), told("cpu-int4", "cpu-fp32")
    assert (alone.workers, alone.disk) == (both.workers, both.disk)
    # Nothing is timed, and so nothing is made for it.
    untimed = told("cpu-int4", benchmark=None)
    assert untimed.workers == 0 and untimed.disk < 0.5 * alone.disk
    # While it is checked, a decoder of few bits needs less than one of floats.
    assert alone.phases["check"] < both.phases["check"]


def test_the_cache_has_the_export_the_variants_and_what_was_calibrated(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def told(*, cached: bool = True, **more: object) -> forecast.Forecast:
        plain = recipe_of(tiny_llama_dir).model_dump(mode="json", exclude_unset=True)
        plain["variants"] = [{"name": one, "preset": one} for one in ("cpu-fp32", "cpu-int4")]
        recipe = Recipe.model_validate(plain | more)
        cache = StepCache(tmp_path / "cache") if cached else None
        return forecast_run(recipe, ModelSource.parse(recipe.source), cache=cache)

    size = model_size(ModelSource.parse(str(tiny_llama_dir)))
    assert size is not None
    floats, (plain, alone) = 4 * size.parameters, (told(), told(cached=False))
    # A cache has the export besides, and the chosen variant is there twice.
    few_bits = plain.disk
    assert 0 < few_bits < floats / 4
    assert plain.cache + plain.disk == alone.disk + floats + few_bits
    calibrated = told(calibration={"data": "text.txt"})
    assert calibrated.cache == plain.cache + few_bits


def test_labelled_data_count_with_the_longest_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path
) -> None:
    size = model_size(ModelSource.parse(str(tiny_llama_dir)))
    assert size is not None
    encoder = dataclasses.replace(size, decoder=False, width=100, inner=400, positions=512)
    monkeypatch.setattr(forecast, "model_size", lambda *_, **__: encoder)

    def told(letters: int | None, **more: object) -> int:
        plain = recipe_of(tiny_llama_dir).model_dump(mode="json", exclude_unset=True)
        if letters is not None:
            (tmp_path / "rows.csv").write_text(f"text,label\nshort,a\n{'x' * letters},b\n")
            plain["evaluation"] = {"benchmark": None, "task": {"data": "rows.csv", "batch": 8} | more}
        recipe = Recipe.model_validate(plain)
        return forecast_run(recipe, ModelSource.parse(recipe.source), cache=None, base=tmp_path).phases[
            "check"
        ]

    none, short, long = told(None), told(30), told(3000)
    each = 3 * 8 * (4 * 100 + 400) * 4
    assert short - none > 12 * each
    # No more than the model reads.
    assert long - short == (512 - 12) * each
    assert told(3000, max_length=64) - short == (64 - 12) * each


def test_what_a_disk_of_its_own_does_not_take_for_the_cache_is_needed_beside_the_artifact(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or on_one_disk(memory, tmp_path):
        pytest.skip("there is no second file system to be had")
    monkeypatch.setenv("ONNXSMITH_HOME", str(memory / "not-there"))
    recipe, room = recipe_of(tiny_llama_dir), shutil.disk_usage(tmp_path).free
    require_resources(forecast.Forecast(1, disk=1000, cache=1000), recipe, tmp_path / "out")
    too_much = shutil.disk_usage(memory).free + 10**9
    if too_much < room:
        require_resources(forecast.Forecast(1, disk=1000, cache=too_much), recipe, tmp_path / "out")
    with pytest.raises(ResourceError, match=f"disk of {tmp_path}; .*choose another -o"):
        require_resources(forecast.Forecast(1, cache=room + too_much), recipe, tmp_path / "out")


FACTORY = """
import torch

CALLS = []

def make():
    CALLS.append(1)
    return torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 4)), torch.zeros(2, 256)
"""


def test_a_factory_is_called_before_its_size_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sized_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipe_of("sized_factory:make")
    report = run_recipe(recipe, tmp_path / "out")
    assert report.steps[0].note == (
        "no forecast because a factory does not say how large its model is before it is called"
    )
    assert report.forecast is not None and 500 < report.forecast["peak_mb"] < 600
    import sized_factory  # type: ignore[import-not-found]

    assert sized_factory.CALLS == [1]
    told = foresee(recipe, tmp_path / "other", cache=None)
    assert told.peak is not None and told.to_json() == report.forecast
    monkeypatch.setattr(forecast, "available_memory", lambda: 100_000_000)
    with pytest.raises(ResourceError, match="100 MB of memory available"):
        run_recipe(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_archives_and_pickles_say_how_large_they_are(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 8)).eval()
    torch.export.save(torch.export.export(module, (torch.zeros(2, 64),)), tmp_path / "model.pt2")
    size = model_size(ModelSource.parse(str(tmp_path / "model.pt2")))
    assert size is not None and size.parameters == sum(p.numel() for p in module.parameters())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 64}')
    torch.save(module.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    size = model_size(ModelSource.parse(str(tmp_path / "hf")))
    assert size is not None and size.width == 64 and not size.lazy
    assert size.parameters == sum(p.numel() for p in module.parameters())


def test_what_is_not_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for source, why in (
        ("someone/nothing", "cache of the hub"),
        ("package.module:factory", "before it is called"),
    ):
        told = forecast_run(recipe_of(source), ModelSource.parse(source), cache=None)
        assert told.peak is None and why in str(told) and why in told.to_json()["reason"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_counts(tmp_path: Path, version: int) -> None:
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    group = top / "job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n" if version == 1 else "0::/job\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    (group / names[0]).write_text("5000000\n")
    (group / names[1]).write_text("3000000\n")
    (group / "memory.stat").write_text(f"anon 1\n{names[2]} 1000000\n")
    assert available_memory(root=tmp_path) == 3_000_000
    (group / names[0]).write_text("max\n")
    assert available_memory(root=tmp_path) > 3_000_000


def test_a_large_vocabulary_and_recurrent_layers_count(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = recipe_of(tiny_llama_dir).model_dump(mode="json", exclude_unset=True)
    plain["variants"] = [{"name": one, "preset": one} for one in ("cpu-fp32", "cpu-int4")]
    recipe = Recipe.model_validate(plain | {"evaluation": {"benchmark": {"prompt_tokens": 32}}})
    source = ModelSource.parse(recipe.source)
    size = model_size(source)
    assert size is not None

    def told(**changed: Any) -> forecast.Forecast:
        made = dataclasses.replace(size, parameters=10_000_000, **changed)
        monkeypatch.setattr(forecast, "model_size", lambda *_, **__: made)
        return forecast_run(recipe, source, cache=None)

    few, many = told(vocabulary=1000), told(vocabulary=50_000)
    # The logits that are compared, and those of the 160 tokens of the longest case twice.
    assert many.phases["check"] - few.phases["check"] == (217 + 2 * 160) * 49_000 * 4
    # In two processes, the logits of 32 tokens and what is made of them.
    assert many.workers - few.workers == 2 * 6 * 32 * 49_000 * 4
    tied = told(vocabulary=50_000, tied=True, embedding=4_000_000)
    assert tied.workers - many.workers == 4 * 4_000_000
    # Recurrent layers are as large in four bits.
    assert told(recurrent=9_000_000).disk - told().disk > 3 * 9_000_000
