"""What a run says it will need, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxsmith import Recipe, run_recipe
from onnxsmith.errors import ResourceError
from onnxsmith.free_memory import available_memory
from onnxsmith.pipeline import forecast
from onnxsmith.pipeline.model_size import model_size
from onnxsmith.source import ModelSource

pytest.importorskip("torch")


def recipe_of(source: Path) -> Recipe:
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
    with pytest.raises(ResourceError, match=r"100 MB of memory available; expected about 520 MB at the peak"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = run_recipe(recipe, tmp_path / "out", ignore_forecast=True)
    assert report.passed and report.steps[0].note.startswith("about 520 MB of memory, at most ")


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
