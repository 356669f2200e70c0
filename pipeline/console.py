"""What a person sees on a terminal: progress, tables and messages, all on standard error but the results."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from onnxsmith._version import __version__
from onnxsmith.environment import describe_environment
from onnxsmith.errors import DestinationError, ResourceError
from onnxsmith.pipeline.artifact import to_plain
from onnxsmith.pipeline.staging import write_beside
from onnxsmith.progress import Progress, Step

__all__ = ["TerminalProgress", "emit_json", "message", "print_table", "progress_for", "red"]


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
        """Opens a step, shown until it ends.

        Args:
            name: What is being done.
            total: Number of parts, if known.
        """
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
            TimeRemainingColumn(elapsed_when_finished=True) if total else TimeElapsedColumn(),
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


def red(text: str) -> str:
    """The text in red, where standard output is a terminal."""
    return f"\x1b[31m{text}\x1b[0m" if sys.stdout.isatty() else text


def print_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    spare: Sequence[str] = (),
    text: Collection[str] = (),
) -> None:
    """Prints a table on standard output.

    Columns in which nothing stands are left out.

    Args:
        title: Above the table; none where empty.
        headers: Of the columns.
        rows: The cells.
        spare: Columns that a narrow terminal does without, the first to go first.
        text: Columns besides the first that are aligned to the left.

    Raises:
        BrokenPipeError: Nobody reads standard output any more.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width; a narrow guess would cut the numbers.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False)
    widths = {
        header: max(len(header), *(len(row[number]) for row in rows))
        for number, header in enumerate(headers)
        if any(row[number] for row in rows)
    }
    for header in spare:
        if sum(widths.values()) + 2 * (len(widths) - 1) <= console.width:
            break
        widths.pop(header, None)
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, header in enumerate(widths):
        justify: Literal["left", "right"] = "left" if number == 0 or header in text else "right"
        table.add_column(header, justify=justify, overflow="fold")
    for row in rows:
        # Not markup: a name may hold brackets.
        table.add_row(*(Text(row[n]) for n, header in enumerate(headers) if header in widths))
    with console.capture() as captured:
        console.print(table)
    # Not through rich, which ends the process where the pipe is broken.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def emit_json(target: str, command: str, body: dict[str, Any]) -> None:
    """Writes a result as JSON: to standard output for ``-``, else to a file.

    Raises:
        DestinationError: The file cannot be written.
        ResourceError: The disk is full.
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
    try:
        write_beside(Path(target), text)
    except OSError as error:
        kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else DestinationError
        raise kind(f"--json {target}", got=f"cannot be written: {error.strerror}") from error
