"""The command line as a contract: names, exit statuses, streams, and one clear error for each bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.pipeline.cli import run_command

pytest.importorskip("torch")
pytest.importorskip("transformers")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def onnxsmith(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in an empty directory, as the console script does, but in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["onnxsmith", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert "internal error" not in err
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def exported(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as an artifact, by `export`."""
    from onnxsmith import export_model

    directory = tmp_path_factory.mktemp("exported") / "tiny"
    export_model(str(tiny_llama_dir), directory)
    return directory


@pytest.fixture(scope="session")
def small(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its weights in 8 bits."""
    from onnxsmith import PRESETS, optimize_model

    directory = tmp_path_factory.mktemp("small") / "tiny-int8"
    optimize_model(exported, directory, PRESETS["cpu-int8"])
    return directory


def corrupt(artifact: Path, copy: Path, name: str) -> Path:
    """A copy of an artifact in which a few numbers of one weight are others."""
    from onnxsmith import load_package

    shutil.copytree(artifact, copy)
    model = load_package(copy).main.model
    value = model.graph.initializers[name].const_value
    assert value is not None
    array = value.numpy()
    wrong = np.array(array)
    wrong[0, :4] += np.float32(0.5)
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        if path.name.startswith("model.onnx") and array.tobytes() in content:
            path.write_bytes(content.replace(array.tobytes(), wrong.tobytes()))
            return copy
    raise AssertionError(f"{name} is in no file")


# What works.


def test_export_compares_and_writes_an_artifact(
    onnxsmith: Command, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    done = onnxsmith("export", tiny_llama_dir, "-o", "out", "--json", "-")
    assert done.status == 0, done.err
    assert done.json["schema_version"] == 1
    assert done.json["task"] == "text-generation"
    assert done.json["comparison"]["passed"]
    cases = {tensor["case"] for tensor in done.json["comparison"]["tensors"]}
    assert len(cases) >= 5
    assert onnxsmith("verify", "out").status == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["measurements"]["comparison"]["verified"]
    assert manifest["source"]["files"]


def test_an_export_that_was_not_compared_says_so(
    onnxsmith: Command, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    done = onnxsmith("export", tiny_llama_dir, "-o", "out", "--no-verify")
    assert done.status == 0, done.err
    assert "not compared with PyTorch (--no-verify)" in done.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["measurements"]["comparison"] == {"verified": False}


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_export_with_passes_is_export_and_optimize(
    onnxsmith: Command, tiny_llama_dir: Path, exported: Path, tmp_path: Path, verify: str
) -> None:
    from onnxsmith import load_package

    passes = ("--preset", "cpu-int8", "--pass", "strip_metadata")
    done = onnxsmith("export", tiny_llama_dir, "-o", "out", *passes, verify, "--json", "-")
    assert done.status == 0, done.err
    assert onnxsmith("optimize", exported, "-o", "two", *passes).status == 0
    weights = [
        {
            name: value.const_value.tobytes()
            for name, value in load_package(tmp_path / one).main.model.graph.initializers.items()
        }
        for one in ("out", "two")
    ]
    assert weights[0] == weights[1]
    assert onnxsmith("verify", "out").status == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = [step["name"] for step in manifest["steps"]]
    assert names[0] == "export" and {"quantize_weights", "strip_metadata"} <= set(names)
    comparison = manifest["measurements"]["comparison"]
    assert comparison["verified"] == (verify == "--verify") == bool(done.json["comparison"])
    assert comparison.get("of") == ("the graph before the passes" if verify == "--verify" else None)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "two"}


def test_export_says_what_its_passes_did(onnxsmith: Command, tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = onnxsmith(
        "export",
        tiny_llama_dir,
        "-o",
        "out",
        "--pass",
        "quantize_weights",
        "--no-verify",
        "--json",
        "steps.json",
    )
    assert done.status == 0, done.err
    assert "quantize_weights" in done.out and "transpose_weights" not in done.out
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert steps[-1]["name"] == "quantize_weights" and steps[-1]["details"]["changes"] > 0


def test_passes_for_an_onnx_model_are_for_optimize(onnxsmith: Command, exported: Path) -> None:
    done = onnxsmith("export", exported, "-o", "out", "--preset", "cpu-int4")
    assert done.status == 2
    assert "which is an ONNX model" in done.err and "Use `onnxsmith optimize`" in done.err


def test_optimize_says_what_it_did(onnxsmith: Command, exported: Path) -> None:
    done = onnxsmith("optimize", exported, "-o", "out", "--preset", "cpu-fp32", "--pass", "to_float16")
    assert done.status == 0, done.err
    assert "fuse_transformer" in done.out and "to_float16" in done.out
    assert onnxsmith("inspect", "out", "--json", "-").json["precision"] == "float16"


def test_compare_agrees(onnxsmith: Command, exported: Path, small: Path, tiny_llama_dir: Path) -> None:
    done = onnxsmith("compare", tiny_llama_dir, exported, small, "--json", "-")
    assert done.status == 0, done.err
    assert done.json["passed"]
    fp32, int8 = done.json["comparisons"]
    assert fp32["provider"] == "CPUExecutionProvider"
    logits = [tensor for tensor in fp32["tensors"] if tensor["name"] == "logits"]
    assert {"max_abs", "max_rel", "cosine", "kl", "top1_agreement", "passed"} <= set(logits[0])
    assert max(t["max_abs"] for t in logits) < 1e-4
    assert max(t["max_abs"] for t in int8["tensors"]) > 1e-3


def test_compare_finds_one_wrong_weight(
    onnxsmith: Command, exported: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    wrong = corrupt(exported, tmp_path / "wrong", "model.layers.1.mlp.up_proj.weight")
    done = onnxsmith("compare", tiny_llama_dir, exported, wrong, "--json", "-")
    assert done.status == 1
    assert [result["passed"] for result in done.json["comparisons"]] == [True, False]
    assert "logits" in done.json["comparisons"][1]["reason"]
    assert onnxsmith("verify", wrong).status == 1


def test_a_quantized_model_does_not_pass_as_float32(onnxsmith: Command, exported: Path, small: Path) -> None:
    assert onnxsmith("compare", exported, small).status == 0
    done = onnxsmith("compare", exported, small, "--tolerance", "float32")
    assert done.status == 1
    assert onnxsmith("compare", exported, small, "--atol", "1e-6", "--rtol", "0").status == 1


def test_compare_takes_inputs_from_a_file(onnxsmith: Command, onnx_package: Any, tmp_path: Path) -> None:
    onnx_package("a (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }", "a")
    onnx_package("b (float[n, 4] x) => (float[n, 4] y) { y = Abs(x) }", "b")
    np.savez(tmp_path / "positive.npz", x=np.ones((3, 4), np.float32))
    np.savez(tmp_path / "negative.npz", x=-np.ones((3, 4), np.float32))
    assert onnxsmith("compare", "a.onnx", "b.onnx", "--inputs", "positive.npz").status == 0
    assert onnxsmith("compare", "a.onnx", "b.onnx", "--inputs", "negative.npz").status == 1


def test_bench_measures_in_turn(onnxsmith: Command, exported: Path, small: Path) -> None:
    done = onnxsmith(
        "bench", exported, small, "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 2, "--json", "-"
    )
    assert done.status == 0, done.err
    first, second = done.json["results"]
    for result in (first, second):
        assert result["latency_ms"]["runs"] == 2
        assert {"p50", "p90", "p99", "mean"} <= set(result["latency_ms"])
        assert result["load_s"] > 0
        assert result["peak_rss_mb"] > 10
        assert result["prefill_tokens_per_s"]["p50"] > 0
        assert result["decode_tokens_per_s"]["p50"] > 0
        assert result["placement"]
    assert second["size_mb"] < first["size_mb"]


def test_generate_continues_as_torch_does(
    onnxsmith: Command, exported: Path, tiny_llama_dir: Path, tiny_loaded: Any
) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer("the smith", return_tensors="pt").input_ids
    with torch.no_grad():
        made = tiny_loaded.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    expected = tokenizer.decode(made[0], skip_special_tokens=True)
    done = onnxsmith("generate", exported, "the smith", "--max-new-tokens", 12)
    assert done.status == 0, done.err
    assert done.out.split() == expected.split()
    assert onnxsmith("generate", exported, "the smith", "--max-new-tokens", 12, "--json", "-").json["text"]


def test_package_says_what_it_made_and_what_not(onnxsmith: Command, exported: Path) -> None:
    done = onnxsmith("package", exported, "-o", "out")
    assert done.status == 0, done.err
    assert re.search(r"^genai +ready$", done.out, re.MULTILINE)
    assert re.search(r"^sentence-transformers +left out: ", done.out, re.MULTILINE)
    assert onnxsmith("verify", "out").status == 0
    assert onnxsmith("package", exported, "-o", "out").status == 2
    assert onnxsmith("generate", "out", "the smith", "--max-new-tokens", 4).status == 0


def test_inspect_reads_no_weights(onnxsmith: Command, exported: Path) -> None:
    done = onnxsmith("inspect", exported, "--top", 3, "--json", "-")
    assert done.status == 0, done.err
    model = done.json["components"]["model"]
    assert len(model["largest"]) == 3
    assert model["operators"]["com.microsoft.GroupQueryAttention"] == 2
    assert model["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    shown = onnxsmith("inspect", exported).out
    assert shown.count("\n") > 10
    # Next to nothing is the model's own.
    assert 95 < done.json["memory"]["running_mb"] < 96
    assert "memory     about 95 MB" in shown and "`onnxsmith run RECIPE --forecast`" in shown


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("providers", {"cpu", "cuda", "openvino"}),
        ("passes", {"cleanup", "fuse_transformer", "quantize_weights"}),
        ("presets", {"cpu-fp32", "cpu-int8", "cpu-int4"}),
    ],
)
def test_lists_name_what_there_is(onnxsmith: Command, command: str, names: set[str]) -> None:
    done = onnxsmith(command)
    assert done.status == 0, done.err
    assert names <= {line.split()[0].rstrip(":") for line in done.out.splitlines() if line.strip()}
    assert onnxsmith(command, "--json", "-").json[command]


def test_json_goes_to_a_file_beside_the_table(onnxsmith: Command, exported: Path, tmp_path: Path) -> None:
    done = onnxsmith("inspect", exported, "--json", "result.json")
    assert done.status == 0
    assert done.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "inspect"
    assert {"versions", "cpu"} <= set(result["environment"])


# What does not.


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["export", "LLAMA", "-o", "out", "--preset", "cpu-int44"], 2, "Did you mean 'cpu-int4'?"),
        (["export", "gone.gguf", "-o", "out"], 2, "gone.gguf: no such file or directory"),
        (["export", "./gone", "-o", "out"], 2, "no such file or directory"),
        (["export", "no_such_module:make", "-o", "out"], 2, "no_such_module"),
        (["export", "cut.gguf", "-o", "out"], 2, "cut.gguf"),
        (["export", "weights.pt", "-o", "out"], 2, "a pickle, which can run code when it is opened"),
        (["export", "LLAMA", "-o", "out", "--task", "text-generatoin"], 2, "Did you mean 'text-generation'?"),
        (["export", "LLAMA", "-o", "out", "--dtype", "float23"], 2, "unknown type 'float23'"),
        (["export", "LLAMA", "-o", "out", "--attention", "fusd"], 2, "Did you mean 'fused'?"),
        (["export", "LLAMA", "-o", "out", "--opset", "7"], 2, "18 to 25"),
        (["export", "LLAMA", "-o", "full"], 2, "full: a directory with other things in it"),
        (["export", "LLAMA", "-o", "file"], 2, "file: a file; expected a directory"),
        (["export", "LLAMA", "-o", "/proc/out"], 2, "cannot be written"),
        (["export", "LLAMA"], 2, "Missing option '-o'"),
        (["optimize", "gone.onnx", "-o", "out", "--preset", "clean"], 2, "no such file or directory"),
        (["optimize", "text.onnx", "-o", "out", "--preset", "clean"], 2, "text.onnx"),
        (["optimize", "cut.onnx", "-o", "out", "--preset", "clean"], 2, "cut.onnx"),
        (["optimize", "good.onnx", "-o", "out"], 2, "no pass; expected at least one --preset or --pass"),
        (["optimize", "good.onnx", "-o", "out", "--preset", "cpu-int5"], 2, "unknown preset 'cpu-int5'"),
        (["optimize", "good.onnx", "-o", "out", "--pass", "clenaup"], 2, "Did you mean 'cleanup'?"),
        (["optimize", "good.onnx", "-o", "out", "--pass", "quantize_weights:bitz=4"], 2, "'bits'"),
        (["optimize", "good.onnx", "-o", "out", "--pass", "quantize_weights:bits=5"], 2, "bits"),
        (["optimize", "good.onnx", "-o", "out", "--pass", "quantize_weights:bits"], 2, "expected key=value"),
        (["compare", "good.onnx", "gone.onnx"], 2, "gone.onnx: no such file or directory"),
        (["compare", "good.onnx", "other.onnx"], 1, ""),
        (["compare", "good.onnx"], 2, "Missing argument"),
        (["compare", "good.onnx", "good.onnx", "--samples", "0"], 2, "at least 1"),
        (["compare", "good.onnx", "good.onnx", "--provider", "cdua"], 2, "Did you mean 'cuda'?"),
        (["compare", "good.onnx", "good.onnx", "--provider", "cuda"], 3, "onnxruntime-gpu"),
        (["compare", "good.onnx", "good.onnx", "--inputs", "wide.npz"], 2, "'x'"),
        (["bench", "good.onnx", "--runs", "0"], 2, "runs: 0; expected at least 1"),
        (["bench", "good.onnx", "--provider", "cuda"], 3, "onnxruntime-gpu"),
        (["bench", "gone.onnx"], 2, "gone.onnx"),
        (["generate", "good.onnx", "hello"], 2, "a model without a KV cache; expected a decoder"),
        (["inspect", "gone.onnx"], 2, "gone.onnx"),
        (["inspect", "good.onnx", "--top", "-1"], 2, "at least 0"),
        (["inspect", "good.onnx", "--json", "gone/result.json"], 2, "there is no directory gone"),
        (["package", "good.onnx", "-o", "out", "--layout", "genia"], 2, "Did you mean 'genai'?"),
        (
            ["package", "good.onnx", "-o", "out", "--layout", "genai"],
            2,
            "layout genai: the model has no config",
        ),
        (["package", "good.onnx", "-o", "out", "--sign-key", "gone.pem"], 2, "key gone.pem: cannot be read"),
        (["verify", "full"], 2, "no manifest.json; expected an artifact"),
        (["run", "gone.yaml"], 2, "gone.yaml: cannot be read"),
        (["run", "typo.yaml"], 2, "typo.yaml, line 3: sorce: unknown key 'sorce'"),
        (["run", "pass.yaml"], 2, "Did you mean 'cleanup'?"),
        (["run", "onnx.yaml"], 2, "an ONNX model; expected a PyTorch model to compare with"),
        (["frobnicate"], 2, "No such command"),
        (["inspect", "good.onnx", "--tpo", "3"], 2, "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_error(
    onnxsmith: Command,
    tiny_llama_dir: Path,
    onnx_package: Any,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    onnx_package("good (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }", "good")
    onnx_package("other (float[n, 4] x) => (float[n, 4] z) { z = Relu(x) }", "other")
    (tmp_path / "text.onnx").write_text("I am no model")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "good.onnx").read_bytes()[:-9])
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").write_text("x")
    np.savez(tmp_path / "wide.npz", x=np.ones((3, 5), np.float32))
    head = "schema_version: 1\nname: toy\n"
    variants = "variants: [{name: a, preset: clean}]\n"
    (tmp_path / "typo.yaml").write_text(f"{head}sorce: my:make\n{variants}")
    (tmp_path / "onnx.yaml").write_text(f"{head}source: good.onnx\n{variants}")
    (tmp_path / "pass.yaml").write_text(
        f"{head}source: {tiny_llama_dir}\nvariants: [{{name: a, passes: [clenaup]}}]\n"
    )
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = onnxsmith(*(str(tiny_llama_dir) if a == "LLAMA" else a for a in arguments))
    assert done.status == status, done.err
    said = done.err if message else done.out
    # The usage errors of the option parser are framed, and broken into lines.
    assert message in " ".join(said.replace("│", " ").split())
    assert len(done.err.strip().splitlines()) <= (1 if done.err.startswith("onnxsmith: ") else 12)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_artifact_is_not_replaced_without_force(
    onnxsmith: Command, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    done = onnxsmith("optimize", exported, "-o", "out", "--preset", "clean")
    assert done.status == 2
    assert "an artifact is already there" in done.err and "--force" in done.err
    assert onnxsmith("verify", "out").status == 0
    assert onnxsmith("optimize", exported, "-o", "out", "--preset", "cpu-int8", "--force").status == 0
    assert onnxsmith("inspect", "out", "--json", "-").json["precision"] == "int8"


def test_nothing_is_left_of_an_export_that_differs_from_torch(
    onnxsmith: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that computes something else where it is exported."""
    (tmp_path / "moody.py").write_text(
        "import torch\n"
        "class Moody(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return {'y': x * (2.0 if torch.compiler.is_exporting() else 3.0)}\n"
        "def make():\n"
        "    return Moody(), {'x': torch.ones(2, 3)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = onnxsmith("export", "moody:make", "-o", "out")
    sys.modules.pop("moody", None)
    assert done.status == 1
    assert "expected what PyTorch computes" in done.err and "--no-verify" in done.err
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_bench_sweeps_and_profiles(onnxsmith: Command, onnx_package: Any) -> None:
    onnx_package("g (float[batch, length, 8] x) => (float[batch, length, 8] y) { y = Relu(x) }", "plain")
    options = ("--batch", "1,3", "--prompt-tokens", "2,4", "--threads", "1", "--runs", "1", "--json", "-")
    done = onnxsmith("bench", "plain.onnx", *options)
    assert done.status == 0, done.err
    settings = [(r["settings"]["batch"], r["settings"]["prompt_tokens"]) for r in done.json["results"]]
    assert settings == [(1, 2), (1, 4), (3, 2), (3, 4)]
    assert not done.json["interrupted"]
    done = onnxsmith("bench", "plain.onnx", "--runs", "1", "--threads", "1", "--profile")
    assert done.status == 0, done.err
    assert "roofs measured on CPU with 1 threads" in done.out
    assert "Relu" in done.out


def test_bench_measures_torch_beside_onnx(onnxsmith: Command, exported: Path, tiny_llama_dir: Path) -> None:
    options = ("--prompt-tokens", 8, "--new-tokens", 3, "--runs", 1, "--threads", 1, "--json", "-")
    done = onnxsmith("bench", tiny_llama_dir, exported, *options)
    assert done.status == 0, done.err
    torch, onnx = done.json["results"]
    assert (torch["provider"], onnx["provider"]) == ("torch", "CPUExecutionProvider")
    assert "torch" in torch["versions"]
    assert torch["peak_rss_mb"] > onnx["peak_rss_mb"]


@pytest.mark.parametrize("share", ["cpu>=100%", "cpu>=100%of time"])
def test_a_provider_is_required(onnxsmith: Command, onnx_package: Any, share: str) -> None:
    onnx_package("g (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }", "plain")
    assert onnxsmith("bench", "plain.onnx", "--runs", 1, "--require-provider", share).status == 0
    assert onnxsmith("compare", "plain.onnx", "plain.onnx", "--require-provider", share).status == 0
    refused = onnxsmith("compare", "plain.onnx", "plain.onnx", "--require-provider", "cuda>=95%")
    assert refused.status == 2
    assert "nothing runs on CUDAExecutionProvider" in refused.err


def test_an_interrupted_bench_keeps_what_it_measured(
    onnxsmith: Command, onnx_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.runtime.benchmarking import _ProcessRunner

    onnx_package("g (float[batch, length, 8] x) => (float[batch, length, 8] y) { y = Relu(x) }", "plain")
    measure = _ProcessRunner.measure
    rounds: list[int] = []

    def interrupted(self: Any) -> Any:
        rounds.append(self.settings.batch)
        if rounds.count(3) == 3:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(_ProcessRunner, "measure", interrupted)
    done = onnxsmith(
        "bench", "plain.onnx", "--batch", "1,3,5", "--runs", 4, "--threads", 1, "--json", "b.json"
    )
    assert done.status == 130
    assert "interrupted; what was measured until then is above" in done.err
    saved = json.loads(Path("b.json").read_text())
    assert saved["interrupted"]
    whole, part = saved["results"]
    assert (whole["settings"]["batch"], whole["interrupted"], whole["latency_ms"]["runs"]) == (1, False, 4)
    assert (part["settings"]["batch"], part["interrupted"], part["latency_ms"]["runs"]) == (3, True, 1)


def test_providers_are_listed(onnxsmith: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path))
    listed = onnxsmith("providers", "--json", "-")
    assert listed.status == 0
    rows = {row["name"]: row for row in listed.json["providers"]}
    assert rows["cpu"]["installed"] and rows["cpu"]["where"] == "here" and rows["cpu"]["version"]
    assert rows["cpu"]["devices"]
    assert not rows["openvino"]["installed"]
    assert rows["openvino"]["command"] == "onnxsmith providers --install openvino"
    checked = onnxsmith("providers", "--check")
    assert checked.status == 0
    assert "onnxsmith providers --install webgpu" in checked.out
    assert onnxsmith("providers", "--install", "cpu").status == 2
    assert onnxsmith("providers", "--remove", "openvino").status == 0


def test_an_interrupted_comparison_keeps_what_it_compared(
    onnxsmith: Command, onnx_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxsmith.pipeline import operations

    onnx_package("g (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }", "plain")
    compare, done = operations.compare_package, []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return compare(*arguments, **settings)

    monkeypatch.setattr(operations, "compare_package", interrupted)
    ended = onnxsmith("compare", "plain.onnx", "plain.onnx", "plain.onnx", "--json", "c.json")
    assert ended.status == 130
    assert "interrupted; what was compared until then is above" in ended.err
    saved = json.loads(Path("c.json").read_text())
    assert (saved["passed"], saved["interrupted"], len(saved["comparisons"])) == (False, True, 1)
    assert saved["comparisons"][0]["passed"]


def test_cache_shows_and_prunes(onnxsmith: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxsmith.pipeline.step_cache import StepCache
    from onnxsmith.pipeline.step_keys import step_key

    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "1GB")
    empty = onnxsmith("cache")
    assert (empty.status, "0 entries, 0.0 MB of at most 1000" in empty.out) == (0, True)
    cache = StepCache(tmp_path / "home" / "cache")
    for number, kind in enumerate(("export", "variant", "variant")):

        def make(directory: Path) -> dict[str, Any]:
            (directory / "data").write_bytes(bytes(1_000_000))
            return {}

        cache.result(step_key(kind, number=number, summary="a model"), make)
    shown = onnxsmith("cache")
    assert re.search(r"export +1 +1\.0 +0\.0\n", shown.out) and re.search(r"variant +2 +2\.0 ", shown.out)
    assert "3 entries, 3.0 MB" in shown.out
    # What a run is using stays.
    assert "3 entries" in onnxsmith("cache", "--prune", "--max-size", 0).out
    cache.close()
    pruned = onnxsmith("cache", "--prune", "--max-size", "2.5MB", "--json", "-").json
    assert [entry["made_from"] for entry in pruned["removed"]] == ["a model"]
    assert len(pruned["entries"]) == 2 and pruned["limit_bytes"] == 10**9
    assert "2 entries" in onnxsmith("cache", "--prune", "--unused-days", 1).out
    assert "0 entries" in onnxsmith("cache", "--prune", "--unused-days", 0).out
    for arguments, message in (
        (("--max-size", "1GB"), "cache: a limit without --prune; expected --prune with it"),
        (("--prune", "--max-size", "big"), "cache: --max-size: 'big'; expected a size such as 20GB"),
    ):
        ended = onnxsmith("cache", *arguments)
        assert (ended.status, message in ended.err) == (2, True)


def test_resuming_needs_the_cache(
    onnxsmith: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "schema_version": 1,
        "name": "x",
        "source": "a:b",
        "variants": [{"name": "v", "preset": "clean"}],
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    ended = onnxsmith("run", "r.json", "--resume")
    assert (ended.status, "run: --resume: a cache that is switched off" in ended.err) == (2, True)
    monkeypatch.setenv("ONNXSMITH_CACHE_SIZE", "1GB")
    ended = onnxsmith("run", "r.json", "--resume", "--no-cache")
    assert (ended.status, "run: --resume: --no-cache; expected the cache" in ended.err) == (2, True)


def test_sizes_that_an_onnx_reference_does_not_take_are_left_out(onnxsmith: Command, tmp_path: Path) -> None:
    import onnx

    text = (
        '<ir_version: 9, opset_import: ["": 20]> g (float[b, 3, h, w] x) => (float[b, 2, v, u] y) '
        "<float[2, 3, 4, 4] kernel = {%s}> { y = Conv(x, kernel) }"
    )
    onnx.save(onnx.parser.parse_model(text % ", ".join(["0.5"] * 96)), tmp_path / "m.onnx")
    done = onnxsmith("compare", "m.onnx", "m.onnx")
    assert done.status == 0
    assert "are left out, because the reference does not run them" in done.err
    assert "height=1" not in done.out and "m.onnx: agrees" in done.out
    done = onnxsmith("bisect", "m.onnx", "m.onnx", "--samples", "1")
    assert done.status == 0


def test_bisect_wants_two_forms_of_one_model(onnxsmith: Command, tmp_path: Path) -> None:
    import onnx

    for name in ("x", "other"):
        text = f"g (float[b] {name}) => (float[b] y) {{ y = Abs({name}) }}"
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {text}')
        onnx.save(model, tmp_path / f"{name}.onnx")
    done = onnxsmith("bisect", "x.onnx", "other.onnx")
    assert done.status == 2
    assert "the inputs other, which x.onnx does not take; expected two forms of one model: x" in done.err
