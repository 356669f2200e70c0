"""The command about the cache of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.arguments import Json
from onnxsmith.pipeline.ending import guarded

__all__ = ["CACHE_COMMANDS", "tidy_cache"]

_DAY_S = 86_400.0


def tidy_cache(
    *,
    root: Path | None = None,
    prune: bool = False,
    max_bytes: int | None = None,
    unused_days: float | None = None,
) -> dict[str, Any]:
    """What is in the cache of steps; with ``prune`` after what is not wanted was removed.

    What a run is using stays.

    Args:
        root: Where the cache is; the user's where None.
        prune: Whether to remove anything.
        max_bytes: What may stay together, the most recently used first; the cache's limit where None.
        unused_days: Remove what was not used for so many days, too.

    Returns:
        Directory, limit, bytes, entries and what was removed, as plain data.

    Raises:
        BadInputError: The limit is no size.
    """
    from onnxsmith.pipeline.run_steps import cache_directory
    from onnxsmith.pipeline.step_cache import StepCache
    from onnxsmith.user_directories import cache_limit

    cache = StepCache(root or cache_directory())
    limit, removed = cache_limit(), []
    if prune:
        unused_s = None if unused_days is None else unused_days * _DAY_S
        removed = cache.prune(limit if max_bytes is None else max_bytes, unused_s=unused_s)
    now = time.time()

    def plain(entries: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {
                "kind": entry.kind,
                "key": entry.key,
                "bytes": entry.bytes,
                "unused_days": max(0.0, now - entry.used) / _DAY_S,
                "made_from": entry.summary,
            }
            for entry in entries
        ]

    entries = cache.entries()
    return {
        "directory": str(cache.root),
        "limit_bytes": limit,
        "bytes": sum(entry.bytes for entry in entries),
        "entries": plain(entries),
        "removed": plain(removed),
    }


@guarded
def cache(
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove damaged entries, and the least recently used over the limit."),
    ] = False,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="With --prune: what may stay, such as 5GB; 0 for nothing."),
    ] = None,
    unused_days: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="With --prune: remove what was not used for N days."),
    ] = None,
    json_target: Json = None,
) -> None:
    """Show what runs keep for later ones, and remove what is not wanted any more."""
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.tables import show_cache
    from onnxsmith.user_directories import bytes_of

    if not prune and (max_size is not None or unused_days is not None):
        raise BadInputError(
            "cache", got="a limit without --prune", expected="--prune with it, which removes entries"
        )
    found = tidy_cache(
        prune=prune,
        max_bytes=None if max_size is None else bytes_of(max_size, where="cache: --max-size"),
        unused_days=unused_days,
    )
    if json_target:
        emit_json(json_target, "cache", found)
    if json_target != "-":
        show_cache(found)


CACHE_COMMANDS: Sequence[Callable[..., None]] = (cache,)
