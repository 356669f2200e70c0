"""What a model says of labelled data, task by task: from rows to an outcome that metrics can judge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsmith.context_length import context_length
from onnxsmith.errors import BadInputError, FeedError, UnknownNameError, require
from onnxsmith.package import TEXT_GENERATION, ModelPackage
from onnxsmith.pipeline.datasets import Dataset
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.runtime import Session, generate_batch
from onnxsmith.runtime.metrics import Outcome
from onnxsmith.runtime.scoring import score_texts

if TYPE_CHECKING:
    from onnxsmith.runtime.session import Array

__all__ = ["DEFAULT_METRICS", "NEEDS_ALL_ROWS", "TASK_RUNS", "RunSettings", "run_task"]

_DEFAULT_LENGTH = 512
_MAX_ANSWER_TOKENS = 30

DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "labels": ("accuracy", "precision_macro", "recall_macro", "f1_macro"),
    "values": ("pearson", "spearman"),
    "texts": ("exact_match", "bleu", "chrf", "rougeL", "wer"),
    "answers": ("exact_match", "f1"),
    "losses": ("perplexity",),
}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How a model is run on data.

    Attributes:
        batch: Rows in one call.
        max_length: Tokens of a row; what the model allows, at most 512, where None.
        max_new_tokens: Tokens to generate for a row with a target.
        train_share: Of the rows, for the probe on features: the rest is judged.
        seed: Of the split.
        on_rows: Called with the number of rows done, for progress.
    """

    batch: int = 16
    max_length: int | None = None
    max_new_tokens: int = 64
    train_share: float = 0.75
    seed: int = 0
    on_rows: Callable[[int], None] | None = None


def run_task(
    task: str, session: Session, files: Mapping[str, bytes], data: Dataset, settings: RunSettings
) -> Outcome:
    """Runs a model on data.

    Args:
        task: A key of ``TASK_RUNS``.
        session: The model, open.
        files: Its tokenizer and configuration files.
        data: The rows.
        settings: How.

    Raises:
        UnknownNameError: Nobody knows how to evaluate this task.
        BadInputError: The data have not what the task needs.
        FeedError: The model takes or gives something else.
    """
    if task not in TASK_RUNS:
        raise UnknownNameError("evaluate: --task", name=task, known=TASK_RUNS, kind="task")
    if settings.batch < 1:
        raise BadInputError("evaluate: --batch", got=str(settings.batch), expected="at least 1")
    return TASK_RUNS[task](_Run(session, files, data, settings))


class _Run:
    def __init__(
        self, session: Session, files: Mapping[str, bytes], data: Dataset, settings: RunSettings
    ) -> None:
        self.session, self.data, self.settings = session, data, settings
        self.tokenizer = PackageTokenizer(ModelPackage({}, files=dict(files)))
        self.config = _json(files, "config.json")
        self.pad = self.config.get("pad_token_id") or 0
        self.max_length = settings.max_length or _max_length(
            self.config, _json(files, "tokenizer_config.json")
        )

    def output(self, *names: str) -> str:
        known = [spec.name for spec in self.session.outputs]
        for name in names:
            if name in known:
                return name
        raise FeedError(
            self.session.name, got=f"the outputs {', '.join(known[:4])}", expected=" or ".join(names)
        )

    def batches(
        self, texts: Sequence[Any], *, words: bool = False
    ) -> Iterator[tuple[list[int], list[Any], dict[str, Array]]]:
        """Rows of about the same length together: their numbers, encodings and inputs."""
        encodings = self.tokenizer.encode_batch(texts, max_length=self.max_length, words=words)
        # The longest first: what is smaller fits into memory that was used before.
        order = sorted(range(len(encodings)), key=lambda n: -len(encodings[n].ids))
        for begin in range(0, len(order), self.settings.batch):
            numbers = order[begin : begin + self.settings.batch]
            rows = [encodings[number] for number in numbers]
            yield numbers, rows, self._feeds(rows)
            if self.settings.on_rows is not None:
                self.settings.on_rows(len(numbers))

    def _feeds(self, rows: Sequence[Any]) -> dict[str, Array]:
        length = max(max(len(row.ids) for row in rows), 1)
        ids = np.full((len(rows), length), self.pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        types = np.zeros((len(rows), length), np.int64)
        for number, row in enumerate(rows):
            count = len(row.ids)
            ids[number, :count], mask[number, :count], types[number, :count] = row.ids, 1, row.type_ids
        known = {
            "input_ids": ids, "attention_mask": mask, "token_type_ids": types,
            "position_ids": np.broadcast_to(np.arange(length), ids.shape),
        }  # fmt: skip
        feeds = {}
        for spec in self.session.inputs:
            if spec.name not in known:
                raise FeedError(
                    f"{self.session.name}: input {spec.name!r}",
                    got="an input that text models are not known to have",
                    expected=", ".join(known),
                )
            feeds[spec.name] = np.ascontiguousarray(known[spec.name]).astype(spec.dtype)
        return feeds

    def label_names(self) -> dict[int, str]:
        names = self.config.get("id2label")
        if not isinstance(names, dict):
            return {}
        return {int(key): str(value) for key, value in names.items()}

    def labels(self, values: Sequence[Any]) -> list[str]:
        """Labels as the model calls them: numbers are looked up, names are kept."""
        ours, given = self.label_names(), self.data.label_names
        found = []
        for value in values:
            text = str(value).strip()
            if text.lstrip("-").isdecimal() and text not in ours.values():
                number = int(text)
                text = given[number] if 0 <= number < len(given) else ours.get(number, text)
            found.append(text)
        unknown = sorted(set(found) - set(ours.values())) if ours else []
        if unknown:
            raise BadInputError(
                self.data.where, got=f"the label {unknown[0]!r}",
                expected=f"labels of the model: {', '.join(list(ours.values())[:12])}",
            )  # fmt: skip
        return found


def _classify(run: _Run) -> Outcome:
    texts: Sequence[Any] = run.data.texts("text")
    if run.data.has("text_pair"):
        texts = list(zip(texts, run.data.texts("text_pair"), strict=True))
    name, rows = run.output("logits"), len(texts)
    scores: list[Any] = [None] * rows
    for numbers, _, feeds in run.batches(texts):
        logits = run.session.run(feeds, [name])[name]
        for number, row in zip(numbers, logits, strict=True):
            scores[number] = row
    if len(scores[0]) == 1:
        return Outcome("values", _numbers(run.data), [float(row[0]) for row in scores])
    names = run.label_names()
    right = run.labels(run.data.column("label"))
    return Outcome("labels", right, [names.get(int(r.argmax()), str(int(r.argmax()))) for r in scores])


def _classify_tokens(run: _Run) -> Outcome:
    words = [_list(value, run.data.where) for value in run.data.column("tokens")]
    tags = [run.labels(_list(value, run.data.where)) for value in run.data.column("tags")]
    for number, (some, others) in enumerate(zip(words, tags, strict=True), run.data.first):
        if len(some) != len(others):
            raise BadInputError(
                f"{run.data.where}, row {number}", got=f"{len(some)} words and {len(others)} tags",
                expected="one tag for each word",
            )  # fmt: skip
    name, names = run.output("logits"), run.label_names()
    right: list[list[str]] = [[] for _ in words]
    said: list[list[str]] = [[] for _ in words]
    for numbers, encodings, feeds in run.batches(words, words=True):
        best = run.session.run(feeds, [name])[name].argmax(-1)
        for number, encoding, row in zip(numbers, encodings, best, strict=True):
            # The first token of a word speaks for it; words that were cut off are not judged.
            firsts: dict[int, int] = {}
            for place, word in enumerate(encoding.word_ids):
                if word is not None:
                    firsts.setdefault(word, place)
            right[number] = [tags[number][word] for word in firsts]
            said[number] = [names.get(int(row[place]), str(int(row[place]))) for place in firsts.values()]
    return Outcome("labels", right, said)


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return value
    raise BadInputError(where, got=f"tokens of type {type(value).__name__}", expected="a list, or a text")


def _probe(run: _Run) -> Outcome:
    """A linear model on the features, trained on a part of the rows and judged on the rest."""
    share = run.settings.train_share
    if not 0 < share < 1:
        raise BadInputError("evaluate: --train-share", got=str(share), expected="between 0 and 1")
    texts = run.data.texts("text")
    name = run.output("sentence_embedding", "last_hidden_state", "pooler_output")
    features: Any = None
    for numbers, rows, feeds in run.batches(texts):
        hidden = run.session.run(feeds, [name])[name].astype(np.float64)
        if hidden.ndim == 3:
            mask = np.zeros((*hidden.shape[:2], 1))
            for number, row in enumerate(rows):
                mask[number, : len(row.ids)] = 1
            hidden = (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
        hidden /= np.maximum(np.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)
        features = np.zeros((len(texts), hidden.shape[-1])) if features is None else features
        features[numbers] = hidden
    order = np.random.default_rng(run.settings.seed).permutation(len(texts))
    train, test = np.split(order, [round(share * len(texts))])
    labels = run.data.column("label")
    values = _as_numbers(labels)
    linear = require("sklearn.linear_model", purpose="a probe on features")
    if not len(test) or len(train) < 2:
        raise BadInputError(
            run.data.where, got=f"{len(texts)} rows", expected="enough to train and to judge on"
        )
    if values is not None:
        probe = linear.Ridge(alpha=1.0).fit(features[train], values[train])
        return Outcome(
            "values", [float(v) for v in values[test]], [float(v) for v in probe.predict(features[test])]
        )
    names = np.array([str(label) for label in labels])
    if len(set(names[train])) < 2:
        raise BadInputError(run.data.where, got="one label only", expected="at least two, to tell apart")
    probe = linear.LogisticRegression(C=10.0, max_iter=2000).fit(features[train], names[train])
    return Outcome("labels", [str(v) for v in names[test]], [str(v) for v in probe.predict(features[test])])


def _as_numbers(labels: Sequence[Any]) -> npt.NDArray[np.float64] | None:
    """Labels that are scores and not the names of classes: at least one has a fraction."""
    try:
        values = np.array([float(label) for label in labels])
    except (TypeError, ValueError):
        return None
    return values if np.isfinite(values).all() and (values != np.round(values)).any() else None


def _numbers(data: Dataset) -> list[float]:
    try:
        return [float(value) for value in data.column("label")]
    except (TypeError, ValueError) as error:
        raise BadInputError(data.where, got=str(error), expected="labels that are numbers") from error


def _generate(run: _Run) -> Outcome:
    """Perplexity of texts; where rows have a target, what is generated is compared with it."""
    texts = run.data.texts("text")
    if not run.data.has("target"):
        encoded = [np.array(run.tokenizer.encode(text), np.int64) for text in texts]
        windows = [len(ids) // run.max_length + (len(ids) % run.max_length >= 2) for ids in encoded]
        sums, counts = [0.0] * len(texts), [0] * len(texts)
        done = run.settings.on_rows or _ignore
        done(windows.count(0))
        for scored in score_texts(run.session, encoded, window=run.max_length, batch=run.settings.batch):
            sums[scored.text] += float(scored.losses().sum())
            counts[scored.text] += len(scored.targets)
            windows[scored.text] -= 1
            done(int(windows[scored.text] == 0))
        losses = list(zip(sums, counts, strict=True))
        return Outcome("losses", [None] * len(losses), losses)
    targets = run.data.texts("target")
    said: list[str] = []
    for begin in range(0, len(texts), run.settings.batch):
        prompts = [run.tokenizer.encode(text) for text in texts[begin : begin + run.settings.batch]]
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in generate_batch(
            run.session, prompts, max_new_tokens=run.settings.max_new_tokens, stop=run.tokenizer.stop_ids
        ):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        said += [run.tokenizer.continuation(p, row) for p, row in zip(prompts, rows, strict=True)]
        if run.settings.on_rows is not None:
            run.settings.on_rows(len(prompts))
    return Outcome("texts", [t.strip() for t in targets], [text.strip() for text in said])


def _ignore(_: int) -> None:
    pass


def _answer(run: _Run) -> Outcome:
    """The span of the context that begins and ends most likely."""
    contexts = run.data.texts("context")
    pairs = list(zip(run.data.texts("question"), contexts, strict=True))
    names = [run.output("start_logits"), run.output("end_logits")]
    said = [""] * len(pairs)
    for numbers, encodings, feeds in run.batches(pairs):
        results = run.session.run(feeds, names)
        for place, (number, encoding) in enumerate(zip(numbers, encodings, strict=True)):
            inside = np.array([n for n, part in enumerate(encoding.sequence_ids) if part == 1], np.int64)
            if not inside.size:
                continue
            start, end = (results[name][place][inside].astype(np.float64) for name in names)
            scores = start[:, None] + end[None, :]
            allowed = np.triu(np.ones_like(scores, np.bool_))
            allowed &= ~np.triu(np.ones_like(scores, np.bool_), _MAX_ANSWER_TOKENS)
            first, last = np.unravel_index(np.where(allowed, scores, -np.inf).argmax(), scores.shape)
            begin = encoding.offsets[int(inside[first])][0]
            said[number] = contexts[number][begin : encoding.offsets[int(inside[last])][1]]
    return Outcome("answers", [_answers(value, run.data.where) for value in run.data.column("answers")], said)


def _answers(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value or [""]
    raise BadInputError(where, got=f"answers of type {type(value).__name__}", expected="a text or several")


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _max_length(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int:
    limits = [context_length(config), tokenizer.get("model_max_length")]
    return min([_DEFAULT_LENGTH, *(int(n) for n in limits if isinstance(n, int | float) and 1 < n < 1e9)])


TASK_RUNS: Mapping[str, Callable[[_Run], Outcome]] = {
    "feature-extraction": _probe,
    "question-answering": _answer,
    "text-classification": _classify,
    TEXT_GENERATION: _generate,
    "token-classification": _classify_tokens,
}
NEEDS_ALL_ROWS = frozenset({"feature-extraction"})
"""Tasks that learn from some rows and judge others."""
