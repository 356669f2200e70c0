"""The command about the library with onnxsmith's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from onnxsmith.pipeline.arguments import Json
from onnxsmith.pipeline.ending import guarded

__all__ = ["KERNEL_COMMANDS", "describe_kernels"]


def describe_kernels(*, again: bool = False) -> dict[str, Any]:
    """What runs onnxsmith's own operators here; the library is compiled where that was not done yet.

    Args:
        again: Whether to compile it in any case.

    Returns:
        Library, compiler, seconds that compiling took, instruction set and operators, as plain data.

    Raises:
        KernelsUnavailableError: It cannot be compiled or loaded here.
    """
    from onnxsmith.runtime.kernel_library import instruction_set, kernel_library, operators

    library = kernel_library(again=again)
    return {
        "library": str(library.path),
        "bytes": library.path.stat().st_size,
        "compiler": library.compiler,
        "seconds": library.seconds,
        "instruction_set": instruction_set(library),
        "operators": operators(library),
    }


@guarded
def kernels(
    build: Annotated[bool, typer.Option("--build", help="Compile again, even if that was done.")] = False,
    json_target: Json = None,
) -> None:
    """Show what runs onnxsmith's own operators on this machine; compile them where that was not done yet."""
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.tables import show_kernels

    found = describe_kernels(again=build)
    if json_target:
        emit_json(json_target, "kernels", found)
    if json_target != "-":
        show_kernels(found)


KERNEL_COMMANDS: Sequence[Callable[..., None]] = (kernels,)
