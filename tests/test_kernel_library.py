"""Compiling the library with onnxsmith's own operators, keeping it, and refusing to load what is not ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxsmith.errors import KernelsUnavailableError
from onnxsmith.own_operators import OWN_DOMAIN, uses_own_operators
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.bench_tables import show_bench
from onnxsmith.pipeline.cli import run_command
from onnxsmith.runtime import BenchSettings, Candidate, OrtBackend, OrtSession, benchmark
from onnxsmith.runtime.behaviour import observe
from onnxsmith.runtime.graph_file import GraphFile
from onnxsmith.runtime.kernel_library import SOURCES, instruction_set, kernel_library
from onnxsmith.runtime.kernels.build import FLAGS, compile_commands, find_compiler, machine_name
from packed_matrices import matmul_model, matmul_node, product, random_matrix, save

EXPORT = 'extern "C" __attribute__((visibility("default")))'
TINY = (
    f'{EXPORT} void* RegisterCustomOps(void*, const void*) {{ return nullptr; }}\n'
    f'{EXPORT} const char* onnxsmith_kernels_isa() {{ return "plain"; }}\n'
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that compiles at once, and a home where nothing was compiled yet."""
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ONNXSMITH_KERNELS_LIBRARY", raising=False)
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "tiny.cpp").write_text(TINY)
    return directory


def without_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is not None:
        pytest.skip("ziglang is installed, so there always is a compiler")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX", raising=False)


def test_it_is_compiled_once(sources: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = kernel_library(sources=sources, on_step=said.append)
    assert first.path.is_relative_to(tmp_path / "home" / "kernels")
    assert instruction_set(first) == "plain"
    assert first.compiler and first.compiler in said[0] and "once" in said[0]
    assert kernel_library(sources=sources, on_step=said.append) == first
    assert len(said) == 1
    before = first.path.stat().st_ino
    assert kernel_library(sources=sources, again=True, on_step=said.append).path == first.path
    assert len(said) == 2 and first.path.stat().st_ino != before
    # Only the library, its record and the lock: no scratch directory.
    assert len(list(first.path.parent.iterdir())) == 3
    assert all(place.stat().st_mode & 0o077 == 0 for place in (first.path.parent, first.path.parent.parent))


def test_other_sources_and_flags_are_another_library(sources: Path) -> None:
    first = kernel_library(sources=sources)
    (sources / "tiny.cpp").write_text(f"// flags: -DCHANGED\n{TINY}")
    second = kernel_library(sources=sources)
    (sources / "more.h").write_text("#pragma once\n")
    assert len({first.path, second.path, kernel_library(sources=sources).path}) == 3


def test_flags_and_processors_stand_in_the_first_lines(sources: Path) -> None:
    (sources / "fast.cpp").write_text(
        "// only: x86_64 riscv128\n// flags: -mavx2 -mfma\nint fast;\n// flags: -no\n"
    )
    (sources / "other.cpp").write_text("// only: riscv128\nint other;\n")
    commands = compile_commands(sources)
    assert commands["tiny.cpp"] == FLAGS
    assert commands.keys() == ({"tiny.cpp", "fast.cpp"} if machine_name() == "x86_64" else {"tiny.cpp"})
    if "fast.cpp" in commands:
        assert commands["fast.cpp"] == (*FLAGS, "-mavx2", "-mfma")


def test_two_processes_compile_it_once(sources: Path) -> None:
    code = (
        "import pathlib, sys; from onnxsmith.runtime.kernel_library import kernel_library\n"
        "print(kernel_library(sources=pathlib.Path(sys.argv[1])).path)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(sources)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in ended}) == 1 and Path(ended[0][0].strip()).is_file()
    assert sum(err.count("compiling kernels") for _, err in ended) == 1


def test_what_a_killed_process_left_goes(sources: Path) -> None:
    kept = kernel_library(sources=sources).path.parent
    (kept / ".build-dead").mkdir()
    (kept / ".build-dead" / "half.o").write_bytes(b"\x7fELF")
    kernel_library(sources=sources, again=True)
    assert not (kept / ".build-dead").exists()


def test_old_ones_go(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxsmith.runtime.kernel_library._MOST_KEPT", 2)
    made = []
    for number in range(4):
        (sources / "tiny.cpp").write_text(f"{TINY}int number = {number};\n")
        made.append(kernel_library(sources=sources).path)
    assert [path.exists() for path in made] == [False, False, True, True]


def test_no_compiler_names_the_command(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compilers(monkeypatch, tmp_path)
    with pytest.raises(KernelsUnavailableError, match=r"no C\+\+ compiler .*`pip install ziglang`") as caught:
        kernel_library(sources=sources)
    assert caught.value.exit_status == 3


def test_what_was_compiled_outlives_its_compiler(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kernel_library(sources=sources)
    without_compilers(monkeypatch, tmp_path)
    assert kernel_library(sources=sources) == made


def test_an_upgraded_compiler_compiles_anew(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "my-c++"
    wrapper.write_text(f'#!/bin/sh\nexec {find_compiler().file} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} -DMINE")
    first = kernel_library(sources=sources)
    assert json.loads(first.path.with_suffix(".json").read_text())["command"] == [str(wrapper), "-DMINE"]
    assert kernel_library(sources=sources).path == first.path
    os.utime(wrapper, (1, 1))
    assert kernel_library(sources=sources).path != first.path


@pytest.mark.parametrize("given", ["no-such-compiler -O9", "g++ -DNAME='a"])
def test_a_chosen_compiler_that_is_none(given: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(KernelsUnavailableError, match=r"\$CXX: .*, which is no program"):
        kernel_library(sources=sources)


def test_a_file_that_does_not_compile(sources: Path) -> None:
    (sources / "broken.cpp").write_text("int f() { return nothing; }\n")
    with pytest.raises(KernelsUnavailableError, match=r"broken\.cpp: c\+\+ fails: .*nothing.*C\+\+17"):
        kernel_library(sources=sources)


def test_a_library_without_operators(sources: Path) -> None:
    (sources / "tiny.cpp").write_text("int nothing;\n")
    with pytest.raises(KernelsUnavailableError, match=r"does not load: .*RegisterCustomOps"):
        kernel_library(sources=sources)


def test_a_home_that_cannot_be_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(KernelsUnavailableError, match=r"cannot be written: Not a directory.*ONNXSMITH_HOME"):
        kernel_library(sources=sources)


def test_a_system_without_kernels(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(KernelsUnavailableError, match=r"this is .*; expected Linux or macOS"):
        kernel_library(sources=sources)


@pytest.mark.parametrize("what", ["library", "directory", "above"])
def test_what_others_can_write_is_not_loaded(what: str, sources: Path, tmp_path: Path) -> None:
    made = kernel_library(sources=sources)
    place = {"library": made.path, "directory": made.path.parent, "above": tmp_path / "home"}[what]
    mode = place.stat().st_mode
    place.chmod(mode | 0o002)
    with pytest.raises(KernelsUnavailableError, match=rf"{place}: others can write to it .*chmod go-w"):
        kernel_library(sources=sources)
    place.chmod(mode)
    assert kernel_library(sources=sources) == made


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["library", "directory"])
def test_what_is_of_others_is_not_loaded(what: str, sources: Path) -> None:
    made = kernel_library(sources=sources)
    os.chown(made.path if what == "library" else made.path.parent, 54321, -1)
    with pytest.raises(KernelsUnavailableError, match=r"it belongs to user 54321"):
        kernel_library(sources=sources)


def test_a_given_library(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernel_library(sources=sources)
    own = tmp_path / "mine.so"
    own.write_bytes(made.path.read_bytes())
    own.chmod(0o600)
    monkeypatch.setenv("ONNXSMITH_KERNELS_LIBRARY", str(own))
    assert kernel_library(sources=sources).path == own
    own.chmod(0o666)
    with pytest.raises(KernelsUnavailableError, match="others can write to it"):
        kernel_library(sources=sources)
    own.unlink()
    with pytest.raises(KernelsUnavailableError, match=r"ONNXSMITH_KERNELS_LIBRARY: no file .*mine\.so"):
        kernel_library(sources=sources)


def test_sessions_register_it_where_a_graph_needs_it(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random_matrix(np.random.default_rng(0), 32, 64)
    package = load_package(save(matmul_model(matrix), tmp_path / "packed.onnx"))
    a = np.ones((3, 64), np.float32)
    with OrtSession(package) as session:
        np.testing.assert_allclose(session.run({"A": a})["Y"], product(a, matrix), rtol=1e-5, atol=1e-5)
    # A library that is not there is missed by graphs with such operators, and by no others.
    monkeypatch.setenv("ONNXSMITH_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(KernelsUnavailableError, match=r"none\.so"):
        OrtSession(package)
    plain = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[2] x) => (float[2] y) {y=Neg(x)}'
    )
    OrtSession(load_package(save(plain, tmp_path / "plain.onnx"))).close()
    monkeypatch.setenv("ONNXSMITH_KERNELS_LIBRARY", str(tmp_path / "text.so"))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(KernelsUnavailableError, match="ONNX Runtime refuses it"):
        OrtSession(package)


def test_operators_are_found_in_subgraphs_and_functions(tmp_path: Path) -> None:
    model = matmul_model(random_matrix(np.random.default_rng(0), 32, 64))
    [node] = model.graph.node
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(OWN_DOMAIN, 1)]
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("Y", 1, None)])
    del model.graph.node[:]
    model.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["c"], ["Y"], then_branch=branch, else_branch=branch))
    package = load_package(save(model, tmp_path / "branches.onnx"))
    assert uses_own_operators(package.main.model)
    graph = GraphFile.of(package)
    assert graph.own_operators and GraphFile.from_json(graph.to_json()).own_operators

    inner = matmul_node(random_matrix(np.random.default_rng(0), 32, 64))
    function = helper.make_function("local", "Twice", list(inner.input), ["Y"], [inner], opsets)
    call = helper.make_node("Twice", list(inner.input), ["Y"], domain="local")
    del model.graph.node[:], model.graph.input[1:]
    model.graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert uses_own_operators(load_package(save(model, tmp_path / "functions.onnx")).main.model)


def test_an_instruction_set_that_is_not_here(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del kernels  # compiled
    library = kernel_library()
    monkeypatch.setenv("ONNXSMITH_KERNELS_ISA", "mmx")
    with pytest.raises(KernelsUnavailableError, match=r"ONNXSMITH_KERNELS_ISA: 'mmx', which .* generic"):
        instruction_set(library)


def bringing_a_function(directory: Path) -> Path:
    """A product whose graph has a function in its place, which gives zeros: one can tell them apart."""
    model = matmul_model(random_matrix(np.random.default_rng(0), 64, 64))
    [node] = model.graph.node
    node.overload = "form"
    zero = helper.make_node("Sub", ["A", "A"], ["Y"])
    function = helper.make_function(
        OWN_DOMAIN, node.op_type, list(node.input), ["Y"], [zero], list(model.opset_import)[:1],
        attributes=["K", "N", "bits", "block_size"],
    )  # fmt: skip
    function.overload = "form"
    model.functions.append(function)
    model.ir_version = 10
    return save(model, directory / "bringing.onnx")


def test_a_graph_with_functions_runs_without_the_library(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del sources  # for its empty home
    package = load_package(bringing_a_function(tmp_path))
    a = np.ones((2, 64), np.float32)
    with OrtSession(package) as session:
        assert session.own_kernels in ("avx512vnni", "avxvnni", "avx2", "dotprod", "generic")
        assert session.run({"A": a})["Y"].any()
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "other"))
    without_compilers(monkeypatch, tmp_path)
    capsys.readouterr()
    for _ in range(2):
        with OrtSession(package) as session:
            assert session.own_kernels == "functions"
            assert not session.run({"A": a})["Y"].any()
    assert capsys.readouterr().err.count("standard operators run in the place of onnxsmith's own") == 1
    behaviour = observe(package, OrtBackend("cpu"), name="model")
    assert "own_kernels" in [finding.rule for finding in behaviour.findings]
    [result] = benchmark([Candidate("m", path=tmp_path / "bringing.onnx")], BenchSettings(runs=1, threads=1))
    assert result.own_kernels == "functions" and result.latency_ms is not None
    show_bench([result])
    assert "KERNELS    m: none of its own" in capsys.readouterr().out


def test_the_command_shows_it(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del sources  # for its empty home
    monkeypatch.setattr(sys, "argv", ["onnxsmith", "kernels", "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        run_command()
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert ended.value.code == 0 and "compiling kernels" in err
    assert Path(found["library"]).is_relative_to(tmp_path / "home")
    assert {"MatMulPacked", "GatherPacked"} <= set(found["operators"])
    assert found["instruction_set"] and found["seconds"] > 0


def test_commands_say_what_is_missing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del sources
    path = save(matmul_model(random_matrix(np.random.default_rng(0), 32, 64)), tmp_path / "packed.onnx")
    without_compilers(monkeypatch, tmp_path)
    for command in (["kernels"], ["compare", str(path), str(path)], ["bench", str(path)]):
        monkeypatch.setattr(sys, "argv", ["onnxsmith", *command])
        with pytest.raises(SystemExit) as ended:
            run_command()
        assert ended.value.code == 3
        err = capsys.readouterr().err
        assert "pip install ziglang" in err and "Traceback" not in err


def test_the_directory_holds_sources_and_nothing_else() -> None:
    # What stands there goes into the wheel.
    strange = [
        path.name
        for path in SOURCES.iterdir()
        if path.name != "__pycache__" and path.suffix not in (".cpp", ".h", ".inl", ".py")
    ]
    assert strange == []
