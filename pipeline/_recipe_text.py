"""A recipe as it was written: the text with its lines, what overrides it, and where an error is in it."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pydantic

from onnxsmith.errors import RecipeError
from onnxsmith.pipeline._recipe_lines import line_of, line_of_toml, stands
from onnxsmith.pipeline._yaml_values import compose_yaml, load_yaml
from onnxsmith.pipeline.recipe_placeholders import PlaceholderError, fill_environment

__all__ = ["RecipeText"]

_MAX_BYTES = 256 * 1024
# A YAML file of a few lines can stand for billions of values, each alias for many.
_MAX_VALUES = 100_000
# What pydantic calls the parts of a union in the place of an error, and kinds of values in its messages.
_BRANCHES = ("str", "dict[")
_KINDS: Mapping[str, str] = {
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', the first a letter or digit",
}


@dataclasses.dataclass
class RecipeText:
    """The content of a recipe file.

    Attributes:
        path: The file.
        data: Its content as plain data, with overrides.
        tree: Its YAML nodes, which know their lines; None where there are none.
        overrides: The places that ``--set`` gave, with what the user wrote.
        extended: The file that this one extends, and so on; what it has stands in ``data`` too.
        own: What stands in this file alone; empty where it extends none.
        toml: The text, where it is TOML.
        before: The content without overrides.
    """

    path: Path
    data: dict[str, Any]
    tree: Any
    overrides: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    extended: RecipeText | None = None
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    toml: str | None = None
    before: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, *, extends: bool = False, below: tuple[Path, ...] = ()) -> Self:
        """Reads a file.

        Args:
            path: YAML, JSON, or TOML where it is called so.
            extends: Whether its key ``extends`` names a file that it adds to: mappings are merged key by
                key, everything else is replaced.
            below: The files that lead to this one.

        Raises:
            RecipeError: It cannot be read, is none of these, or no mapping; or files extend each other.
        """
        found = cls._read_alone(path)
        try:
            found.data = fill_environment(found.data)
        except PlaceholderError as error:
            raise _unfilled(error, found.where(error.place)) from None
        if not extends or "extends" not in found.data:
            return found
        where = found.where(["extends"])
        name = found.data.pop("extends")
        if name is None:
            # So a recipe that was written from its model says that it extends nothing.
            return found
        if not isinstance(name, str):
            raise RecipeError(f"{where}: extends", got=_shown(name), expected="a path")
        target = (path.parent / name).resolve()
        chain = (*below, path.resolve())
        if target in chain:
            raise RecipeError(
                f"{where}: extends", got=f"{name}, which extends this file", expected="a recipe that ends"
            )
        base = cls.read(target, extends=True, below=chain)
        merged = _merged(base.data, found.data)
        return cls(path, merged, found.tree, extended=base, own=found.data, toml=found.toml)

    @classmethod
    def _read_alone(cls, path: Path) -> Self:
        import yaml

        text = _content(path)
        if path.suffix.lower() == ".toml":
            return cls(path, _toml(path, text), None, toml=text)
        try:
            tree = compose_yaml(text)
            if tree is not None:
                _check_tree(path, tree)
            data = load_yaml(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            # JSON allows tabs between its values, and YAML does not.
            found = _json_or_none(text)
            if not isinstance(found, dict):
                raise _syntax_error(path, error) from error
            tree, data = _tree_without_tabs(text), found
        if not isinstance(data, dict):
            kind = "an empty file" if data is None else f"a {type(data).__name__}"
            raise RecipeError(str(path), got=kind, expected="a mapping of keys to values")
        return cls(path, data, tree)

    def override(self, text: str) -> None:
        """Applies ``key=value``.

        Raises:
            RecipeError: It is no such thing, or the key leads nowhere.
        """
        import yaml

        key, equals, value = text.partition("=")
        where = f"--set {text}"
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(where, got="no key=value", expected="for example budgets.size_mb=100")
        try:
            tree = compose_yaml(value)
            if tree is not None:
                _check_tree(self.path, tree)
            parsed = fill_environment(load_yaml(value))
        except PlaceholderError as error:
            raise _unfilled(error, where) from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise RecipeError(where, got=f"the value {value!r}", expected="a YAML value") from error
        if self.before is None:
            self.before = copy.deepcopy(self.data)
        target: Any = self.data
        place: list[str] = []
        for part in parts[:-1]:
            target, step = _descend(target, part, where)
            place.append(step)
        if isinstance(target, list):
            index = _index(target, parts[-1], where)
            target[index] = parsed
            place.append(str(index))
        elif isinstance(target, dict):
            target[parts[-1]] = parsed
            place.append(parts[-1])
        else:
            raise _below_plain(parts[-1], target, where)
        self.overrides[tuple(place)] = text

    def explain(self, error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> RecipeError:
        """What is wrong, where, and what was meant."""
        errors = _without_branches(error.errors(include_url=False))
        # A misspelt key is why another one is missing.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        # A rule about several keys knows which of them is to blame, and what it says.
        rule = first.get("ctx", {}) if first["type"] == "rule" else {}
        location = [*_place(first["loc"]), *rule.get("at", ())]
        where = f"{self.where(location)}: {'.'.join(map(str, location)) or 'recipe'}"
        count = len(errors) - 1
        more = f"({count} more error{'s' if count > 1 else ''})" if count else None
        if first["type"] == "extra_forbidden":
            known = _keys_at(model, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            meant = f"Did you mean {near[0]!r}?" if near else None
            return RecipeError(
                where,
                got=f"unknown key {str(location[-1])!r}",
                expected=f"one of {', '.join(known)}" if known else None,
                remedy=" ".join(filter(None, (meant, more))) or None,
            )
        if first["type"] == "missing":
            return RecipeError(where, got="it is missing", expected="a value", remedy=more)
        if rule:
            return RecipeError(where, got=rule["got"], expected=rule["expected"], remedy=more)
        if first["type"] == "invalid_key":
            return RecipeError(where, got=f"the key {_shown(first['input'])}", expected="text", remedy=more)
        return RecipeError(where, got=_shown(first["input"]), expected=_wanted(first), remedy=more)

    def where(self, location: Sequence[int | str]) -> str:
        """The override that a place comes from, or else its line in the file.

        Args:
            location: Keys and indices that lead to it.
        """
        parts = tuple(str(part) for part in location)
        for place, text in reversed(self.overrides.items()):
            if parts[: len(place)] == place:
                return f"--set {text}"
        # What leads to the key of an override may stand nowhere else.
        first = next((n for n in range(1, len(parts) + 1) if not self._written(location[:n])), 0)
        for place, text in reversed(self.overrides.items()) if first else ():
            if place[:first] == parts[:first]:
                return f"--set {text}"
        # An extended file is to blame for what only it says.
        if self.extended is not None and not stands(self.own, location) and self.extended._says(location):
            return self.extended.where(location)
        if self.toml is not None:
            return f"{self.path}, line {line_of_toml(self.toml, location)}"
        return str(self.path) if self.tree is None else f"{self.path}, line {line_of(self.tree, location)}"

    def _written(self, location: Sequence[int | str]) -> bool:
        return stands(self.data if self.before is None else self.before, location)

    def _says(self, location: Sequence[int | str]) -> bool:
        return stands(self.data, location)


def _unfilled(error: PlaceholderError, where: str) -> RecipeError:
    key = ".".join(map(str, error.place))
    return RecipeError(
        f"{where}: {key}" if key else where, got=error.got, expected=error.expected, remedy=error.remedy
    )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` on it: mappings key by key, everything else in whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _merged(below, value)
        merged[key] = value
    return merged


def _toml(path: Path, text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem, _, place = str(error).partition(" (at ")
        where = f"{path}, {place.rstrip(')')}" if place else str(path)
        raise RecipeError(where, got=problem, expected="TOML") from error
    except RecursionError as error:
        raise RecipeError(str(path), got="it is nested too deeply", expected="TOML") from error


def _content(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise RecipeError(
                str(path), got="more than 256 KiB", expected="a recipe, which is a few lines of YAML or JSON"
            )
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        got = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise RecipeError(
            str(path), got=f"cannot be read: {got}", expected="a recipe in YAML, JSON or TOML"
        ) from error


def _check_tree(path: Path, tree: Any) -> None:
    """Refuses what stands for too many values, and keys that are given twice, of which one would be lost."""
    import yaml

    sizes: dict[int, int] = {}
    # Each node twice: before its children, and when their sizes are known.
    stack: list[tuple[Any, bool]] = [(tree, False)]
    open_nodes: set[int] = set()
    while stack:
        node, left = stack.pop()
        if left:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in _children(node))
            if sizes[id(node)] > _MAX_VALUES:
                line = node.start_mark.line + 1
                raise RecipeError(
                    f"{path}, line {line}",
                    got="aliases that stand for very many values",
                    expected=f"at most {_MAX_VALUES}",
                )
            continue
        if id(node) in sizes:
            continue
        if id(node) in open_nodes:
            raise RecipeError(
                f"{path}, line {node.start_mark.line + 1}",
                got="an alias for what it stands in",
                expected="values that end",
            )
        open_nodes.add(id(node))
        stack.append((node, True))
        stack += [(child, False) for child in _children(node)]
        if isinstance(node, yaml.MappingNode):
            _check_keys(path, node)


def _check_keys(path: Path, node: Any) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key.value, str) and seen.setdefault(key.value, line) != line:
            raise RecipeError(
                f"{path}, line {line}: {key.value}",
                got=f"the key stands in line {seen[key.value]} already",
                expected="each key once",
            )


def _children(node: Any) -> Iterator[Any]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tree_without_tabs(text: str) -> Any:
    import yaml

    try:
        return compose_yaml(text.replace("\t", " "))
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _syntax_error(path: Path, error: Exception) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
    problem = getattr(error, "problem", None) or (
        "it is nested too deeply" if isinstance(error, RecursionError) else "it is not text"
    )
    return RecipeError(where, got=problem, expected="YAML or JSON")


def _descend(target: Any, part: str, where: str) -> tuple[Any, str]:
    if isinstance(target, list):
        index = _index(target, part, where)
        return target[index], str(index)
    if isinstance(target, dict):
        if target.get(part) is None:
            target[part] = {}
        return target[part], part
    raise _below_plain(part, target, where)


def _below_plain(part: str, target: Any, where: str) -> RecipeError:
    return RecipeError(
        where, got=f"{part!r} is below the plain value {_shown(target)}", expected="a mapping or a list"
    )


def _index(target: list[Any], part: str, where: str) -> int:
    # Variants are easier to name than to count.
    for number, item in enumerate(target):
        if isinstance(item, dict) and item.get("name") == part:
            return number
    if part.isdecimal() and int(part) < len(target):
        return int(part)
    names = [str(item["name"]) for item in target if isinstance(item, dict) and "name" in item]
    known = [*names, *(str(number) for number in range(len(target)))]
    near = difflib.get_close_matches(part, known, n=1)
    raise RecipeError(
        where,
        got=f"unknown entry {part!r}",
        expected=f"one of {', '.join(known)}" if known else "a list that is not empty",
        remedy=f"Did you mean {near[0]!r}?" if near else None,
    )


def _place(location: Sequence[int | str]) -> list[int | str]:
    return [part for part in location if not (isinstance(part, str) and part.startswith(_BRANCHES))]


def _without_branches(errors: Sequence[Any]) -> list[Any]:
    """One error for each place: a value that fits no branch of a union is reported once for each branch."""
    found: dict[tuple[int | str, ...], Any] = {}
    for error in errors:
        # The branch that was entered knows more than the one that was not.
        place = tuple(_place(error["loc"]))
        for known in list(found):
            if place[: len(known)] == known and len(place) > len(known):
                del found[known]
        if not any(known[: len(place)] == place for known in found):
            found[place] = error
    return list(found.values())


def _wanted(error: Any) -> str:
    if any(isinstance(part, str) and part.startswith(_BRANCHES) for part in error["loc"]):
        return "the name of a pass, or {name: {parameter: value}}"
    if error["type"] in _KINDS:
        return _KINDS[error["type"]]
    message = str(error["msg"])
    for start in (
        "Value error, ",
        "Input should be ",
        "String should have ",
        "Tuple should have ",
        "List should have ",
    ):
        message = message.removeprefix(start)
    return message.split(" after validation")[0]


def _shown(value: Any) -> str:
    if isinstance(value, datetime.date):
        return f"the date {value}, without quotes"
    text = json.dumps(value, default=str, skipkeys=True)
    return text if len(text) < 80 else f"{text[:77]}..."


def _keys_at(model: Any, location: Sequence[int | str]) -> list[str]:
    """The known keys of the part of the schema that a location leads to."""
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = next((m for m in _models_in(field.annotation)), None)
    return sorted(getattr(model, "model_fields", {}))


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
