"""Metrics of predictions against what is right, by the libraries of each field."""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxsmith.errors import BadInputError, UnknownNameError, require

__all__ = ["METRICS", "Kind", "Metric", "Outcome", "details_of", "metric_named"]

Kind = str
"""What predictions are: ``labels``, ``values``, ``texts``, ``answers`` or ``losses``."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model said of each sample, and what would have been right.

    Attributes:
        kind: What the predictions are.
        references: One entry for each sample. ``labels``: a label, or the list of labels of a sentence;
            ``values``: a number; ``texts``: a text; ``answers``: all texts that count as right; ``losses``:
            None.
        predictions: One entry for each sample of the same form; ``answers``: one text; ``losses``: the sum
            of negative log-likelihoods and the number of tokens.
    """

    kind: Kind
    references: Sequence[Any]
    predictions: Sequence[Any]

    def __len__(self) -> int:
        return len(self.predictions)

    def take(self, index: Iterable[int]) -> Outcome:
        """The samples of an index, in which one may be there several times."""
        return Outcome(self.kind, [self.references[i] for i in index], [self.predictions[i] for i in index])


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number that says how good predictions are.

    Attributes:
        name: As on the command line.
        kind: Of the predictions that it takes.
        compute: Gives it.
        higher_is_better: Whether more of it is better.
        scale: What one point is: 1 for percentages, 0.01 for shares.
        resamples: How often it is computed again for an interval, at most: some take long.
    """

    name: str
    kind: Kind
    compute: Callable[[Outcome], float]
    higher_is_better: bool = True
    scale: float = 0.01
    resamples: int = 1000


def require_metric(name: str) -> None:
    """Looks whether there is a metric of this name, of whatever kind.

    Raises:
        UnknownNameError: No such metric.
    """
    known = {metric.name for metric in METRICS.values()} | set(_ALIASES)
    if name not in known:
        raise UnknownNameError("metric", name=name, known=known, kind="metric")


def metric_named(name: str, kind: Kind) -> Metric:
    """A metric for predictions of some kind.

    Raises:
        UnknownNameError: There is none; the message names those there are.
    """
    key = f"{kind}/{name}" if f"{kind}/{name}" in METRICS else f"{kind}/{_ALIASES.get(name, name)}"
    if key not in METRICS:
        known = [metric.name for metric in METRICS.values() if metric.kind == kind]
        raise UnknownNameError("--metric", name=name, known=known, kind=f"metric of {kind}")
    return METRICS[key]


def details_of(outcome: Outcome) -> dict[str, Any]:
    """For labels: precision, recall, F1 and count of each class, and the confusion matrix; else nothing."""
    if outcome.kind != "labels":
        return {}
    sklearn = require("sklearn.metrics", purpose="metrics of labels")
    right, said = _flat(outcome)
    classes = sorted(set(right) | set(said))
    scores = sklearn.precision_recall_fscore_support(right, said, labels=classes, zero_division=0)
    # scikit-learn warns where there is one class only, which is no news.
    table = sklearn.confusion_matrix(right, said, labels=classes) if len(classes) > 1 else [[len(right)]]
    return {
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
            for name, p, r, f, n in zip(classes, *scores, strict=True)
        },
        "confusion": {
            name: {other: int(n) for other, n in zip(classes, row, strict=True) if n}
            for name, row in zip(classes, table, strict=True)
        },
    }


def _flat(outcome: Outcome) -> tuple[list[str], list[str]]:
    def one(sides: Sequence[Any]) -> list[str]:
        return [str(label) for entry in sides for label in (entry if isinstance(entry, list) else [entry])]

    return one(outcome.references), one(outcome.predictions)


def _accuracy(outcome: Outcome) -> float:
    sklearn = require("sklearn.metrics", purpose="accuracy")
    return float(sklearn.accuracy_score(*_flat(outcome)))


def _label_score(function: str, average: str) -> Callable[[Outcome], float]:
    def compute(outcome: Outcome) -> float:
        sklearn = require("sklearn.metrics", purpose=function)
        right, said = _flat(outcome)
        # scikit-learn takes twice as long for text, and resampling asks thousands of times.
        number = {name: i for i, name in enumerate(sorted({*right, *said}))}
        sides = [np.fromiter((number[label] for label in side), np.int64) for side in (right, said)]
        return float(getattr(sklearn, function)(*sides, average=average, zero_division=0))

    return compute


def _correlation(function: str) -> Callable[[Outcome], float]:
    def compute(outcome: Outcome) -> float:
        stats = require("scipy.stats", purpose=function)
        right = np.asarray(outcome.references, np.float64)
        said = np.asarray(outcome.predictions, np.float64)
        if len(right) < 2 or np.ptp(right) == 0 or np.ptp(said) == 0:
            return math.nan
        return float(getattr(stats, function)(right, said).statistic)

    return compute


def _mean_squared(outcome: Outcome) -> float:
    sklearn = require("sklearn.metrics", purpose="mean squared error")
    return float(sklearn.mean_squared_error(outcome.references, outcome.predictions))


def _bleu(outcome: Outcome) -> float:
    sacrebleu = require("sacrebleu", purpose="BLEU")
    return float(sacrebleu.corpus_bleu(list(outcome.predictions), [list(outcome.references)]).score)


def _chrf(outcome: Outcome) -> float:
    sacrebleu = require("sacrebleu", purpose="chrF")
    return float(sacrebleu.corpus_chrf(list(outcome.predictions), [list(outcome.references)]).score)


def _rouge(kind: str) -> Callable[[Outcome], float]:
    def compute(outcome: Outcome) -> float:
        scorer = require("rouge_score.rouge_scorer", purpose="ROUGE").RougeScorer([kind], use_stemmer=True)
        pairs = zip(outcome.references, outcome.predictions, strict=True)
        return float(np.mean([scorer.score(right, said)[kind].fmeasure for right, said in pairs]))

    return compute


def _errors(function: str) -> Callable[[Outcome], float]:
    def compute(outcome: Outcome) -> float:
        jiwer = require("jiwer", purpose="word error rate")
        # A reference without words has no rate; jiwer refuses it.
        pairs = [(r, p) for r, p in zip(outcome.references, outcome.predictions, strict=True) if r.strip()]
        if not pairs:
            return math.nan
        return float(getattr(jiwer, function)([r for r, _ in pairs], [p for _, p in pairs]))

    return compute


def _exact_texts(outcome: Outcome) -> float:
    pairs = zip(outcome.references, outcome.predictions, strict=True)
    return float(np.mean([right.strip() == said.strip() for right, said in pairs]))


def _best_answer(score: Callable[[str, str], float]) -> Callable[[Outcome], float]:
    def compute(outcome: Outcome) -> float:
        pairs = zip(outcome.references, outcome.predictions, strict=True)
        return float(np.mean([max(score(right, said) for right in answers) for answers, said in pairs]))

    return compute


def _plain_words(text: str) -> list[str]:
    """As SQuAD's own script compares answers: lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _same_answer(right: str, said: str) -> float:
    return float(_plain_words(right) == _plain_words(said))


def _answer_f1(right: str, said: str) -> float:
    ours, theirs = _plain_words(said), _plain_words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _perplexity(outcome: Outcome) -> float:
    loss = sum(loss for loss, _ in outcome.predictions)
    tokens = sum(count for _, count in outcome.predictions)
    if not tokens:
        raise BadInputError("perplexity", got="texts of fewer than two tokens", expected="longer ones")
    return math.exp(min(loss / tokens, 700.0))


METRICS: Mapping[str, Metric] = {
    f"{metric.kind}/{metric.name}": metric
    for metric in (
        Metric("accuracy", "labels", _accuracy),
        *(
            Metric(f"{name}_{average}", "labels", _label_score(function, average))
            for average in ("macro", "micro", "weighted")
            for name, function in (
                ("precision", "precision_score"),
                ("recall", "recall_score"),
                ("f1", "f1_score"),
            )
        ),
        Metric("pearson", "values", _correlation("pearsonr")),
        Metric("spearman", "values", _correlation("spearmanr")),
        Metric("mse", "values", _mean_squared, higher_is_better=False, scale=1.0),
        Metric("exact_match", "texts", _exact_texts),
        Metric("bleu", "texts", _bleu, scale=1.0, resamples=200),
        Metric("chrf", "texts", _chrf, scale=1.0, resamples=200),
        Metric("rouge1", "texts", _rouge("rouge1"), resamples=200),
        Metric("rouge2", "texts", _rouge("rouge2"), resamples=200),
        Metric("rougeL", "texts", _rouge("rougeL"), resamples=200),
        Metric("wer", "texts", _errors("wer"), higher_is_better=False, resamples=200),
        Metric("cer", "texts", _errors("cer"), higher_is_better=False, resamples=200),
        Metric("exact_match", "answers", _best_answer(_same_answer)),
        Metric("f1", "answers", _best_answer(_answer_f1)),
        Metric("perplexity", "losses", _perplexity, higher_is_better=False, scale=1.0),
    )
}
_ALIASES: Mapping[str, str] = {"precision": "precision_macro", "recall": "recall_macro", "f1": "f1_macro"}
