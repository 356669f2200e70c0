"""What commands take: options that several of them share, and how their values are read."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.pipeline._yaml_values import load_yaml

if TYPE_CHECKING:
    from onnxsmith.comparison import Tolerance

__all__ = [
    "CalibrationSamples",
    "CalibrationText",
    "CalibrationTokens",
    "Force",
    "Json",
    "Model",
    "Models",
    "Output",
    "Passes",
    "Presets",
    "Providers",
    "RequireProvider",
    "VerifyEach",
    "command_line",
    "known",
    "pass_spec",
    "preset_specs",
    "tolerance_of",
]


def _writable(target: str | None) -> str | None:
    # Found before the work is done, not after.
    if target is None or target == "-":
        return target
    path = Path(target)
    if not target.strip() or path.is_dir():
        raise typer.BadParameter(f"{target!r} is a directory; expected a file, or - for standard output")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{target!r} cannot be written")
    return target


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_writable,
        help="Write the full result as JSON; - for standard output.",
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the artifact is to be.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")]
Presets = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A ready-made list of passes; may be repeated.")
]
Passes = Annotated[
    list[str] | None,
    typer.Option("--pass", metavar="NAME[:KEY=VALUE,...]", help="A pass; may be repeated."),
]
CalibrationText = Annotated[
    str | None, typer.Option(metavar="DATA", help="A text or .npz file, for passes that look at activations.")
]
CalibrationSamples = Annotated[int, typer.Option(metavar="N", min=1, help="Samples used.")]
CalibrationTokens = Annotated[int, typer.Option(metavar="N", min=2, help="Longest sample.")]
VerifyEach = Annotated[
    bool,
    typer.Option(
        "--verify-each", help="Check and compare after each pass; names the one that breaks the model."
    ),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="P",
        help="Execution provider: NAME[:KEY=VALUE,...] or NAME@LIBRARY; may be repeated. [default: cpu]",
    ),
]
RequireProvider = Annotated[
    list[str] | None,
    typer.Option(
        "--require-provider",
        metavar="P[>=N%[of time]]",
        help="Fail unless this provider ran that share of the nodes (or of time, or bytes); may be repeated.",
    ),
]
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="An artifact, a directory with one ONNX model, or an .onnx file."),
]
Models = Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Artifacts or .onnx files.")]


def known(where: str, name: str, names: Sequence[str], *, kind: str) -> None:
    """Refuses a name that is not one of ``names``.

    Raises:
        UnknownNameError: See above; the message says the nearest.
    """
    if name not in names:
        raise UnknownNameError(where, name=name, known=names, kind=kind)


def tolerance_of(
    atol: float | None,
    rtol: float | None,
    *,
    min_cosine: float | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
) -> Tolerance | None:
    """The bounds that were given, or None; only what was given is checked.

    Raises:
        BadInputError: A bound that is negative or no number, or a share above 1.
    """
    from onnxsmith.comparison import Tolerance

    for name, value in (("--atol", atol), ("--rtol", rtol), ("--max-kl", max_kl)):
        if value is not None and not value >= 0:
            raise BadInputError(f"compare: {name}", got=str(value), expected="0 or more")
    for name, value in (("--min-cosine", min_cosine), ("--min-top1", min_top1)):
        if value is not None and not 0 <= value <= 1:
            raise BadInputError(f"compare: {name}", got=str(value), expected="between 0 and 1")
    given = Tolerance(atol, rtol, min_cosine, max_kl, min_top1)
    return None if given == Tolerance() else given


def preset_specs(names: Sequence[str]) -> list[tuple[str, Any]]:
    """The passes of presets, in order.

    Raises:
        UnknownNameError: No such preset.
    """
    from onnxsmith.graph_passes.presets import PRESETS

    for name in names:
        known("--preset", name, tuple(PRESETS), kind="preset")
    return [spec for name in names for spec in PRESETS[name]]


def pass_spec(text: str) -> tuple[str, dict[str, Any]]:
    """A pass with its parameters from ``name:key=value,key=value``.

    Values are YAML, and a list's commas stand in brackets.

    Raises:
        BadInputError: It is no such thing.
    """
    import yaml

    name, _, rest = text.partition(":")
    arguments: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise BadInputError(f"--pass {text}", got=f"{part!r}", expected="key=value")
        if key in arguments:
            raise BadInputError(f"--pass {text}", got=f"{key!r} twice", expected="each parameter once")
        try:
            arguments[key] = load_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise BadInputError(
                f"--pass {text}", got=f"the value {value!r}", expected="a YAML value"
            ) from error
    return name.strip(), arguments


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["onnxsmith", *sys.argv[1:]])
