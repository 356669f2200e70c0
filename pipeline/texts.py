"""Texts to evaluate on: from files, and from Python packages that bring some."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError
from onnxsmith.source import resolve_path

__all__ = ["load_text", "load_texts", "share_bounds", "text_sha256"]

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def load_text(data: str, *, base: Path | None = None) -> str:
    """Reads a text.

    Args:
        data: A text file (``.jsonl``: the key ``text`` of each line), ``pkg:package/file``, or
            ``package.module:attribute``, a text, a list of texts or a mapping to texts.
        base: The directory that relative paths start from.

    Raises:
        BadInputError: There is no such text, or it is empty.
    """
    path = None if _ATTRIBUTE.fullmatch(data) else resolve_path(data, base=base)
    text = _from_attribute(data) if path is None else _from_file(path)
    if not text.strip():
        raise BadInputError(f"data {data}", got="an empty text", expected="some text")
    if _LONE_SURROGATE.search(text):
        raise BadInputError(f"data {data}", got="half of a surrogate pair", expected="text")
    return text


def load_texts(path: Path) -> list[str]:
    """Reads texts: each line that is not empty, or the key ``text`` of each line of a ``.jsonl`` file.

    Raises:
        BadInputError: It cannot be read, or there is no text in it.
    """
    content = _read(path)
    texts = _json_lines(path, content) if path.suffix == ".jsonl" else content.splitlines()
    found = [text for text in texts if text.strip()]
    if not found:
        raise BadInputError(f"data {path}", got="no text", expected="one text a line")
    return found


def text_sha256(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hex; it says which text a perplexity belongs to."""
    return hashlib.sha256(text.encode()).hexdigest()


def share_bounds(count: int, share: tuple[float, float], window: int) -> tuple[int, int]:
    """The first token of a share of a text, and the one after its last; cut between windows.

    Args:
        count: Tokens of the text.
        share: From and to, as shares of the whole.
        window: Tokens in a window.

    Raises:
        BadInputError: There is no window in it.
    """
    windows = -(-count // window)
    begin, end = (min(round(edge * windows) * window, count) for edge in share)
    if end - begin < 2:
        raise BadInputError(
            "evaluation.perplexity",
            got=f"{count} tokens in {windows} windows, and no window from {share[0]:.0%} to {share[1]:.0%}",
            expected="at least one in each part",
            remedy="Take more max_tokens, a shorter window, or fewer folds",
        )
    return begin, end


def _from_file(path: Path) -> str:
    text = _read(path)
    return "\n\n".join(_json_lines(path, text)) if path.suffix == ".jsonl" else text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"data {path}", got=f"cannot be read: {error}", expected="a text file in UTF-8"
        ) from error


def _json_lines(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"data {path}, line {number}", got="no object with a text", expected='{"text": "..."}'
            ) from error
        if not isinstance(found, str):
            raise BadInputError(
                f"data {path}, line {number}", got=f"a text of {found!r}", expected="a string"
            )
        texts.append(found)
    return texts


def _from_attribute(data: str) -> str:
    module, _, attribute = data.partition(":")
    try:
        value: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInputError(
            f"data {data}", got=str(error), expected="a text file, or package.module:attribute"
        ) from error
    except (Exception, SystemExit) as error:
        # A module of the user's can raise anything, and a script without a main guard ends the process.
        got = f"importing {module} fails: {type(error).__name__}: {error}"
        raise BadInputError(f"data {data}", got=got, expected="a module that can be imported") from error
    if isinstance(value, str):
        return value
    values = value.values() if isinstance(value, Mapping) else value
    texts: list[Any] = list(values) if isinstance(values, Iterable) else [None]
    if all(isinstance(text, str) for text in texts):
        return "\n\n".join(texts)
    raise BadInputError(
        f"data {data}", got=f"a {type(value).__name__}", expected="a text, or a list or mapping of texts"
    )
