"""Providers: what a user may ask for, how it is found and installed, and the gate on placement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxsmith.errors import (
    BadInputError,
    CheckFailedError,
    DestinationError,
    ProviderUnavailableError,
    UnknownNameError,
)
from onnxsmith.runtime import PROVIDERS, Placement, check_requirements, choose_provider, requirements_of
from onnxsmith.runtime.environments import find_environment, home_directory, make_environment
from onnxsmith.runtime.provider_install import install_provider, problem_of, uninstall_provider
from onnxsmith.runtime.provider_options import OPTIONS, check_options

pytest.importorskip("onnxruntime")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for environments."""
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# What a user asks for


def test_a_choice_has_options_and_a_library(tmp_path: Path) -> None:
    library = tmp_path / "libmine.so"
    library.touch()
    choice = choose_provider(f"mine@{library}:threads=2,devices=GPU,CPU")
    assert (choice.name, choice.library) == ("mine", str(library))
    assert choice.options == {"threads": "2", "devices": "GPU,CPU"}
    assert choice.apart
    assert not choose_provider("cpu").apart


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", BadInputError, r"no name of a provider; expected NAME\[@LIBRARY\]\[:KEY=VALUE,\.\.\.\]"),
        ("cpu:", BadInputError, "no name of a provider"),
        ("cpu:threads", BadInputError, "no name of a provider"),
        ("openvino:=1", BadInputError, "no name of a provider"),
        ("openvino:num_streams=1,=2", BadInputError, "'=2'; expected key=value"),
        ("openvino:layout=1,layout=2", BadInputError, "'layout' twice; expected each option once"),
        ("openvino:num_stream=1", UnknownNameError, r"option 'num_stream'.*Did you mean 'num_streams'\?"),
        ("cuda:device_id=first", BadInputError, "device_id: 'first'; expected an integer"),
        ("cuda:enable_cuda_graph=yes", BadInputError, "'yes'; expected one of 0, 1, true, false"),
        ("openvino:precision=FP8", BadInputError, "'FP8'; expected one of FP32, FP16, ACCURACY"),
        ("cpu:threads=1", UnknownNameError, "unknown option 'threads'; expected no option at all"),
        ("cudda", UnknownNameError, r"Did you mean 'cuda'\?"),
        ("mine@/no/such/lib.so", BadInputError, "no file /no/such/lib.so; expected a library"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        choose_provider(text)


def test_options_are_known_by_the_names_of_providers() -> None:
    assert set(OPTIONS) <= set(PROVIDERS)
    check_options("nobody", {"anything": "goes"})


# Environments


def test_environments_are_kept_where_the_user_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_directory() == home
    monkeypatch.delenv("ONNXSMITH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert home_directory().name == "onnxsmith"


def test_a_broken_environment_is_none(home: Path) -> None:
    place = home / "environments" / "onnxruntime-openvino"
    assert find_environment("onnxruntime-openvino") is None
    place.mkdir(parents=True)
    for text in ("", "[]", '{"versions": 1}', '{"versions": {}, "python": "3"}'):
        (place / "environment.json").write_text(text)
        assert find_environment("onnxruntime-openvino") is None
    with pytest.raises(ProviderUnavailableError, match="`onnxsmith providers --install openvino`"):
        choose_provider("openvino")
    assert uninstall_provider("openvino")
    assert not place.exists()
    assert not uninstall_provider("openvino")


def test_an_installation_that_fails_says_why_and_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An empty directory of wheels as the only index.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    steps: list[str] = []
    with pytest.raises(
        ProviderUnavailableError,
        match=r"installation of onnxruntime-openvino: pip fails: ERROR: .*onnxruntime-openvino==1.0.*nothing",
    ):
        install_provider("openvino==1.0", on_step=steps.append)
    assert steps == ["create the environment", "install onnxruntime-openvino==1.0 numpy ml_dtypes"]
    assert list((home / "environments").iterdir()) == []


def test_an_environment_that_fails_its_check_is_not_kept(home: Path) -> None:
    def check(environment: Any) -> None:
        assert environment.interpreter.exists()
        raise ProviderUnavailableError("check", got="planted")

    with pytest.raises(ProviderUnavailableError, match="planted"):
        make_environment("anything", ("--dry-run", "pip"), check=check)
    assert list((home / "environments").iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONNXSMITH_HOME", str(tmp_path / "file"))
    with pytest.raises(DestinationError, match=r"cannot be written.*Set ONNXSMITH_HOME to another one"):
        install_provider("openvino")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("cpu", BadInputError, "it is part of onnxruntime itself; expected one of cuda"),
        ("xnnpack", BadInputError, "it has no package of its own"),
        ("openvin", UnknownNameError, r"Did you mean 'openvino'\?"),
        ("open vino", UnknownNameError, "unknown execution provider"),
    ],
)
def test_what_cannot_be_installed_is_refused(
    name: str, kind: type[Exception], message: str, home: Path
) -> None:
    with pytest.raises(kind, match=message):
        install_provider(name)
    assert not home.exists()


def test_the_cpu_has_no_problem_and_a_library_that_is_none_has_one(tmp_path: Path) -> None:
    assert problem_of(choose_provider("cpu")) == ""
    library = tmp_path / "libbroken.so"
    library.write_bytes(b"no library")
    assert "ONNX Runtime" in problem_of(choose_provider(f"broken@{library}"))


# The gate on placement

MIXED = Placement(
    {"CUDAExecutionProvider": 90, "CPUExecutionProvider": 10},
    {"CUDAExecutionProvider": {"MatMul": 90}, "CPUExecutionProvider": {"Shape": 6, "Gather": 4}},
    {"CUDAExecutionProvider": 0.7, "CPUExecutionProvider": 0.3},
    {"CUDAExecutionProvider": 0.999, "CPUExecutionProvider": 0.001},
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CUDA were installed: the gate's own arithmetic needs no GPU."""
    import onnxruntime

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("cuda", True),
        ("cuda>=90%", True),
        ("cuda >= 90.0 %", True),
        ("CUDAExecutionProvider>=90%", True),
        ("cuda>=90.5%", False),
        ("cuda>=70%of time", True),
        ("cuda>=71%of time", False),
        ("cuda>=99.9%of bytes", True),
        ("cuda>=100%of bytes", False),
    ],
)
def test_a_requirement_is_on_nodes_time_or_bytes(text: str, holds: bool, cuda: None) -> None:
    requirements = requirements_of([text], ["cuda", "cpu"])
    name = "CUDAExecutionProvider"
    if holds:
        check_requirements(MIXED, requirements, name="model", provider=name)
    else:
        with pytest.raises(
            CheckFailedError,
            match=r"model on CUDAExecutionProvider: \d+\.\d% of (nodes|time|bytes) on CUDA.*: 10 of 100 "
            r"nodes on CPU, 30% of the time \(Shape, Gather\); expected cuda>=",
        ):
            check_requirements(MIXED, requirements, name="model", provider=name)
    # A candidate on another provider is not held against it.
    check_requirements(MIXED, requirements, name="model", provider="CPUExecutionProvider")


def test_a_requirement_fails_where_nothing_is_known(cuda: None) -> None:
    requirements = requirements_of(["cuda"], ["cuda"])
    with pytest.raises(CheckFailedError, match="its placement is not known; expected cuda"):
        check_requirements(None, requirements, name="model", provider="CUDAExecutionProvider")
    nothing = Placement({"CPUExecutionProvider": 3}, {"CPUExecutionProvider": {"Add": 3}})
    with pytest.raises(CheckFailedError, match=r"0\.0% of nodes.*3 of 3 nodes on CPU \(Add\)"):
        check_requirements(nothing, requirements, name="model", provider="CUDAExecutionProvider")


@pytest.mark.parametrize("text", ["", ">=5%", "cpu>5%", "cpu>=101%", "cpu>=5%of memory", "cpu>=5"])
def test_a_requirement_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(
        BadInputError, match=r"--require-provider .*: not understood; expected PROVIDER, PROV"
    ):
        requirements_of([text], ["cpu"])


def test_a_gate_that_nothing_goes_through_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"nothing runs on CUDA.*expected one of CPU.*--provider too"):
        requirements_of(["cuda>=95%"], ["cpu"])


def test_graphs_of_a_model_are_held_to_a_requirement_together(cuda: None) -> None:
    name, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    small = Placement(
        {name: 1, cpu: 3}, {name: {"MatMul": 1}, cpu: {"Shape": 3}}, {name: 10, cpu: 30}, {name: 1}
    )
    large = Placement({name: 96}, {name: {"MatMul": 96}}, {name: 960}, {name: 99}, copies=0, copied_bytes=0)
    whole = Placement.merged({"decoder": small, "encoder": large})
    assert (whole.nodes, whole.operators[name]) == ({name: 97, cpu: 3}, {"MatMul": 97})
    assert (whole.share(name), whole.time_shares[name], whole.bytes_shares[name]) == (0.97, 0.97, 1.0)
    assert whole.copies is None
    assert list(whole.graphs_to_json()) == ["decoder", "encoder"]
    for text, holds in (("cuda>=97%", True), ("cuda>=97%of time", True), ("cuda>=97.1%of time", False)):
        requirements = requirements_of([text], ["cuda"])
        if holds:
            check_requirements(whole, requirements, name="model", provider=name)
            continue
        with pytest.raises(
            CheckFailedError, match=r"97\.0% of time on CUDA\w+ \(decoder 25\.0%, encoder 100\.0%\): 3 of 100"
        ):
            check_requirements(whole, requirements, name="model", provider=name)
    # Where the time of one is not known, that of the whole is not.
    unknown = Placement.merged({"decoder": small, "encoder": Placement({name: 96}, large.operators)})
    assert unknown.time_shares == {}
    with pytest.raises(CheckFailedError, match=r"0\.0% of time"):
        check_requirements(unknown, requirements_of(["cuda>=1%of time"], ["cuda"]), name="m", provider=name)


def test_a_placement_survives_as_plain_data() -> None:
    plain = json.loads(json.dumps(MIXED.to_json()))
    assert plain["CPUExecutionProvider"]["time_share"] == 0.3
    assert Placement.from_json(plain) == MIXED
    assert MIXED.only_provider is None
