"""Labelled rows and texts as examples that a model can be trained on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.context_length import context_length
from onnxsmith.errors import BadInputError
from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.pipeline.datasets import Dataset, load_dataset
from onnxsmith.pipeline.texts import load_text, text_sha256
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.training.examples import IGNORED, Example, Examples, inputs_of

if TYPE_CHECKING:
    from onnxsmith.exporters import LoadedModel
    from onnxsmith.pipeline.recipe import Recipe
    from onnxsmith.pipeline.training_recipe import TrainingSpec

__all__ = ["Lessons", "TrainingData"]

_EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")


class Lessons:
    """What a model is taught.

    Attributes:
        train: Examples to learn from.
        held: Held-out ones; None where there are none.
        extra: ``train`` with the texts that nobody has labelled.
        labels: Names of the classes; empty where labels are values.
    """

    def __init__(
        self, train: Examples, held: Examples | None, extra: Examples, labels: Sequence[str]
    ) -> None:
        """Keeps them."""
        self.train, self.held, self.extra, self.labels = train, held, extra, tuple(labels)

    def token_ids(self) -> set[int]:
        """All tokens in any of the examples."""
        parts = [self.train, self.extra, *([self.held] if self.held is not None else [])]
        found = {int(token) for part in parts for row in part.rows for token in row.ids}
        return found | {part.pad_id for part in parts}


class TrainingData:
    """The data of a recipe's training, read before the first minute of work."""

    def __init__(self, recipe: Recipe, *, base: Path | None) -> None:
        """Reads everything.

        Raises:
            BadInputError: Data cannot be read.
        """
        assert recipe.training is not None
        self.spec: TrainingSpec = recipe.training
        self.seed, self._base = recipe.seed, base
        spec = self.spec
        self._of_texts = recipe.task == TEXT_GENERATION
        self.text, self.rows = self._read(spec.data, spec.limit)
        self.held_text, self.held = self._read(spec.validation) if spec.validation else ("", None)
        self.unlabelled = load_text(spec.unlabelled, base=base) if spec.unlabelled else ""
        task = recipe.evaluation.task
        tested = load_dataset(task.data, columns=task.columns, split=task.split, base=base) if task else None
        self.left_out = self._leave_out(tested)

    def _read(self, data: str, limit: int | None = None) -> tuple[str, Dataset | None]:
        """A text, or rows."""
        if _is_text(data) or self._of_texts:
            return load_text(data, base=self._base), None
        columns, split = self.spec.columns, self.spec.split
        return "", load_dataset(data, limit=limit, columns=columns, split=split, base=self._base)

    def described(self) -> dict[str, Any]:
        """For the report and the manifest: which data, how much, and its hash."""
        found: dict[str, Any] = {"data": self.spec.data, "left_out": self.left_out}
        if self.rows is not None:
            text = json.dumps(list(self.rows.rows), sort_keys=True, ensure_ascii=False, default=str)
            found |= {"rows": len(self.rows), "sha256": text_sha256(text)}
        else:
            found["sha256"] = text_sha256(self.text)
        if self.unlabelled:
            found |= {"unlabelled": self.spec.unlabelled, "unlabelled_sha256": text_sha256(self.unlabelled)}
        return found

    def held_sha256(self) -> str | None:
        """A hash of the held-out rows or text that were given; None where they are drawn."""
        if self.held is None:
            return text_sha256(self.held_text) if self.held_text else None
        return text_sha256(json.dumps(list(self.held.rows), sort_keys=True, ensure_ascii=False, default=str))

    def label_names(self) -> list[str]:
        """Names of the classes of a new head: as the data set calls them, else all labels in order.

        Returns:
            Nothing where labels are numbers with a fraction: values and not classes.
        """
        rows = self._required_rows()
        if rows.label_names:
            return list(rows.label_names)
        role = "label" if rows.has("label") else "tags"
        found = {
            str(v) for value in rows.column(role) for v in (value if isinstance(value, list) else [value])
        }
        numbers = [_number(name) for name in found]
        known = [n for n in numbers if n is not None]
        if len(known) == len(found):
            if role == "label" and any(n != int(n) for n in known):
                return []
            return [str(int(n)) for n in sorted(known)]
        return sorted(found)

    def special_ids(self, loaded: LoadedModel) -> set[int]:
        """The tokens that a tokenizer adds by itself, whether they are in the data or not."""
        try:
            added = json.loads(loaded.files["tokenizer.json"]).get("added_tokens") or ()
            return {int(token["id"]) for token in added if token.get("special")}
        except (KeyError, TypeError, ValueError, AttributeError):
            return set()

    def lessons(self, loaded: LoadedModel) -> Lessons:
        """Examples for a model.

        Raises:
            BadInputError: Data that do not fit the model, or a model that cannot be trained.
            TokenizerError: It has no tokenizer.
        """
        model: Any = loaded.module
        accepted = inspect.signature(model.forward).parameters
        if getattr(model, "config", None) is None or "input_ids" not in accepted:
            raise BadInputError(
                f"training of {loaded.source.text}", got=type(model).__name__,
                expected="a model of transformers that takes input_ids",
            )  # fmt: skip
        make = _Maker(loaded, inputs_of(accepted), self.spec.max_length)
        if loaded.task == TEXT_GENERATION:
            train, held = self._parts(lambda text, rows, limit: make.pieces(text or "\n\n".join(rows), limit))
            return Lessons(train, held, make.continued(train, self.unlabelled), ())
        if loaded.task in _EMBEDDING_TASKS:
            train, held = self._parts(lambda text, rows, _: make.texts(rows or _lines(text), "embedding"))
            return Lessons(train, held, make.joined(train, _lines(self.unlabelled)), ())
        train, labels = make.labelled(self._required_rows())
        if self.held is None:
            train, held = self._split(train)
        else:
            held = make.labelled(self.held)[0]
        return Lessons(train, held, make.joined(train, _lines(self.unlabelled)), labels)

    def _parts(
        self, make: Callable[[str, Sequence[str], int | None], Examples]
    ) -> tuple[Examples, Examples | None]:
        """What is learned and what is held out, of a text or of rows with one."""
        train = make(self.text, [] if self.rows is None else self.rows.texts("text"), self.spec.limit)
        if self.held is None and not self.held_text:
            return self._split(train)
        return train, make(self.held_text, [] if self.held is None else self.held.texts("text"), None)

    def _split(self, examples: Examples) -> tuple[Examples, Examples | None]:
        if not self.spec.validation_share:
            return examples, None
        return examples.split(self.spec.validation_share, seed=self.seed)

    def _required_rows(self) -> Dataset:
        if self.rows is None:
            raise BadInputError(
                f"training: data {self.spec.data}", got="a text", expected="labelled rows for this model",
                remedy="Give a .csv, .tsv, .jsonl, .json or .parquet file",
            )  # fmt: skip
        return self.rows

    def _leave_out(self, tested: Dataset | None) -> int:
        """Takes texts out that are evaluated on: on what a model has seen nothing can be measured."""
        known = set(_said(tested))
        if not known:
            return 0
        # What chooses the best weights must not know them either.
        self.rows, count = _without(self.rows, known)
        self.held, others = _without(self.held, known)
        count += others
        if self.unlabelled:
            lines = _lines(self.unlabelled)
            rest = [line for line in lines if line not in known]
            count += len(lines) - len(rest)
            self.unlabelled = "\n".join(rest)
        return count


class _Maker:
    """Makes examples of texts with a model's tokenizer."""

    def __init__(self, loaded: LoadedModel, inputs: tuple[str, ...], max_length: int) -> None:
        self._tokenizer = PackageTokenizer(ModelPackage({}, files=dict(loaded.files)))
        config: Any = loaded.module.config
        self._where = loaded.source.text
        self._inputs, self._task = inputs, loaded.task
        self._pad = int(getattr(config, "pad_token_id", None) or 0)
        limit = context_length(config.to_dict()) or max_length
        self._length = min(max_length, limit)
        self._names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
        self._values = int(getattr(config, "num_labels", 0) or 0) == 1

    def texts(self, texts: Sequence[str], kind: str) -> Examples:
        encodings = self._tokenizer.encode_batch(texts, max_length=self._length)
        return self._examples([Example(e.ids, None, e.type_ids) for e in encodings], kind)

    def joined(self, examples: Examples, texts: Sequence[str]) -> Examples:
        """The examples, and texts without labels."""
        if not texts:
            return examples
        more = self.texts(texts, "embedding").rows
        return self._examples([*examples.rows, *more], examples.kind)

    def continued(self, examples: Examples, text: str) -> Examples:
        """The examples, and pieces of another text."""
        if not text:
            return examples
        return self._examples([*examples.rows, *self.pieces(text, None).rows], examples.kind)

    def pieces(self, text: str, limit: int | None) -> Examples:
        ids = self._tokenizer.encode(text)
        parts = [ids[i : i + self._length] for i in range(0, len(ids), self._length)]
        return self._examples([Example(part) for part in parts if len(part) > 1][:limit], "next")

    def labelled(self, rows: Dataset) -> tuple[Examples, list[str]]:
        if self._task == "token-classification":
            return self._tagged(rows), self._names
        if self._task != "text-classification":
            raise BadInputError(
                f"training of {self._where}", got=f"a model for {self._task or 'no known task'}",
                expected="one for text-classification, token-classification, text-generation or embeddings",
                remedy="Give it a head: `finetune: {task: text-classification}` as the first step",
            )  # fmt: skip
        texts: Sequence[Any] = rows.texts("text")
        if rows.has("text_pair"):
            texts = list(zip(texts, rows.texts("text_pair"), strict=True))
        encodings = self._tokenizer.encode_batch(texts, max_length=self._length)
        labels = rows.column("label")
        made = []
        for number, (encoding, label) in enumerate(zip(encodings, labels, strict=True), 1):
            where = f"{rows.where}, row {number}"
            known = _value(label, where) if self._values else self._class(label, rows, where)
            made.append(Example(encoding.ids, known, encoding.type_ids))
        return self._examples(made, "value" if self._values else "class"), self._names

    def _tagged(self, rows: Dataset) -> Examples:
        words = [_list(value, rows.where) for value in rows.column("tokens")]
        tags = [_list(value, rows.where) for value in rows.column("tags")]
        encodings = self._tokenizer.encode_batch(words, max_length=self._length, words=True)
        made = []
        for number, (encoding, row, some) in enumerate(zip(encodings, tags, words, strict=True), 1):
            where = f"{rows.where}, row {number}"
            if len(row) != len(some):
                raise BadInputError(
                    where, got=f"{len(some)} words and {len(row)} tags", expected="one tag for each word"
                )
            labels = [IGNORED] * len(encoding.ids)
            seen: set[int] = set()
            for place, word in enumerate(encoding.word_ids):
                # The first token of a word speaks for it, as when it is evaluated.
                if word is not None and word not in seen:
                    seen.add(word)
                    labels[place] = self._class(row[word], rows, where)
            made.append(Example(encoding.ids, labels, encoding.type_ids))
        return self._examples(made, "tokens")

    def _class(self, label: Any, rows: Dataset, where: str) -> int:
        name = str(label).strip()
        number = _number(name)
        index = int(number) if number is not None and number == int(number) else None
        if name not in self._names and index is not None:
            # A number is looked up among the data set's names, and else is one itself.
            given = rows.label_names
            name = given[index] if 0 <= index < len(given) else str(index)
        if name in self._names:
            return self._names.index(name)
        if index is not None and not rows.label_names and 0 <= index < len(self._names):
            return index
        raise BadInputError(
            where, got=f"the label {name!r}", expected=f"one of {', '.join(self._names[:12])}",
            remedy="These are the model's. Another head: `finetune: {task: ...}` as the first step",
        )  # fmt: skip

    def _examples(self, rows: Sequence[Example], kind: str) -> Examples:
        return Examples(rows, kind=kind, pad_id=self._pad, inputs=self._inputs)


def _is_text(data: str) -> bool:
    return data.endswith((".txt", ".gz", ".md")) or (":" in data and not data.startswith(("hf:", "pkg:")))


def _said(rows: Dataset | None) -> list[str]:
    """The text of each row, or its words; nothing where rows have neither."""
    if rows is None or not (rows.has("text") or rows.has("tokens")):
        return []
    if rows.has("text"):
        return list(map(str, rows.column("text")))
    return [" ".join(map(str, _list(words, rows.where))) for words in rows.column("tokens")]


def _without(rows: Dataset | None, known: Set[str]) -> tuple[Dataset | None, int]:
    """Rows whose text is not known, and how many others there were."""
    said = _said(rows)
    kept = [number for number, text in enumerate(said) if text not in known]
    if rows is None or len(kept) == len(said):
        return rows, 0
    return rows.take(kept), len(said) - len(kept)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _value(label: Any, where: str) -> float:
    try:
        return float(label)
    except (TypeError, ValueError) as error:
        raise BadInputError(where, got=f"the label {label!r}", expected="a number") from error


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return value
    raise BadInputError(where, got=f"tokens of type {type(value).__name__}", expected="a list, or a text")
