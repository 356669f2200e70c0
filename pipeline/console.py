"""What a person sees on a terminal: progress, tables and messages, all on standard error but the results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxsmith._version import __version__
from onnxsmith.environment import describe_environment
from onnxsmith.errors import DestinationError
from onnxsmith.pipeline.artifact import to_plain
from onnxsmith.progress import Progress, Step

__all__ = ["TerminalProgress", "emit_json", "message", "print_table", "progress_for"]


def message(text: str) -> None:
    """Says something on standard error."""
    sys.stderr.write(text + "\n")


def progress_for(stream: Any = None) -> Progress:
    """A progress display where standard error is a terminal, else none."""
    stream = sys.stderr if stream is None else stream
    return TerminalProgress() if stream.isatty() else Progress()


class TerminalProgress(Progress):
    """A bar for each step, with time; finished steps stay as lines."""

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Step]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            *((TimeRemainingColumn(),) if total else ()),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
            task = bars.add_task(name, total=total, note="")

            class Shown(Step):
                def advance(self, count: int = 1, note: str | None = None) -> None:
                    super().advance(count, note)
                    bars.update(task, advance=count, note=self.note)

            step = Shown(name)
            yield step
            done = bars.tasks[task].completed
            bars.update(task, total=total or 1, completed=total or max(done, 1), note=step.note)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output; columns after the first are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; a narrow guess would cut the numbers.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False)
    console.print(table)


def emit_json(target: str, command: str, body: dict[str, Any]) -> None:
    """Writes a result as JSON: to standard output for ``-``, else to a file.

    Raises:
        DestinationError: The file cannot be written.
    """
    document = {
        "schema_version": 1,
        "onnxsmith": __version__,
        "environment": describe_environment(),
        "command": command,
        **to_plain(body),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    try:
        # Whole or not at all, like everything else that is written.
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DestinationError(f"--json {target}", got=f"cannot be written: {error.strerror}") from error
