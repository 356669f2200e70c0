"""Metrics, their intervals, and tests of differences; every library that computes them is used."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, MissingDependencyError, UnknownNameError
from onnxsmith.runtime.metrics import METRICS, Outcome, details_of, metric_named
from onnxsmith.runtime.resampling import compare_outcomes, measure

for package in ("sklearn", "scipy", "sacrebleu", "rouge_score", "jiwer"):
    pytest.importorskip(package)

RIGHT = ["a", "a", "a", "a", "b", "b", "c", "c"]
SAID = ["a", "a", "a", "b", "b", "c", "c", "a"]
LABELS = Outcome("labels", RIGHT, SAID)
TEXTS = Outcome(
    "texts",
    ["the cat sat on the mat", "hello world", "one two three four five"],
    ["the cat sat on a mat", "hello world", "one two three five"],
)


# By hand: 5 of 8 right. Precision a 3/4, b 1/2, c 1/2; recall 3/4, 1/2, 1/2; so F1 is 3/4, 1/2, 1/2.
@pytest.mark.parametrize(
    ("outcome", "name", "expected"),
    [
        (LABELS, "accuracy", 5 / 8),
        (LABELS, "precision", (0.75 + 0.5 + 0.5) / 3),
        (LABELS, "recall", (0.75 + 0.5 + 0.5) / 3),
        (LABELS, "f1", (0.75 + 0.5 + 0.5) / 3),
        (LABELS, "f1_micro", 5 / 8),
        (LABELS, "f1_weighted", (4 * 0.75 + 2 * 0.5 + 2 * 0.5) / 8),
        (Outcome("values", [1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), "spearman", 1.0),
        (Outcome("values", [1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), "pearson", 0.9707253),
        (Outcome("values", [1.0, 2.0], [2.0, 4.0]), "mse", 2.5),
        (TEXTS, "exact_match", 1 / 3),
        # Two edits in thirteen words.
        (TEXTS, "wer", 2 / 13),
        (TEXTS, "rouge1", (10 / 12 + 1 + 8 / 9) / 3),
        (Outcome("texts", ["same words here now"] * 2, ["same words here now"] * 2), "bleu", 100.0),
        (Outcome("texts", ["same words"] * 2, ["same words"] * 2), "chrf", 100.0),
        (Outcome("answers", [["The Eiffel Tower", "tower"]], ["eiffel tower!"]), "exact_match", 1.0),
        (Outcome("answers", [["the old tower"]], ["tower in Paris"]), "f1", 0.4),
        (Outcome("losses", [None, None], [(2.0, 2), (4.0, 1)]), "perplexity", math.exp(2.0)),
    ],
)
def test_values(outcome: Outcome, name: str, expected: float) -> None:
    metric = metric_named(name, outcome.kind)
    assert metric.compute(outcome) == pytest.approx(expected, abs=1e-6)


def test_every_metric_is_better_for_better_predictions() -> None:
    """Perfect against corrupted: no metric can be satisfied by anything."""
    random = np.random.default_rng(0)
    words = [" ".join(random.choice(list("abcdefgh"), 8)) for _ in range(20)]
    perfect = {
        "labels": Outcome("labels", RIGHT * 3, RIGHT * 3),
        "values": Outcome("values", list(range(20)), list(range(20))),
        "texts": Outcome("texts", words, words),
        "answers": Outcome("answers", [[w] for w in words], words),
        "losses": Outcome("losses", [None] * 20, [(1.0, 10)] * 20),
    }
    worse = {
        "labels": Outcome("labels", RIGHT * 3, RIGHT[3:] * 3 + RIGHT[:3] * 3),
        "values": Outcome("values", list(range(20)), list(random.permutation(20))),
        "texts": Outcome("texts", words, words[1:] + words[:1]),
        "answers": Outcome("answers", [[w] for w in words], words[1:] + words[:1]),
        "losses": Outcome("losses", [None] * 20, [(30.0, 10)] * 20),
    }
    for metric in METRICS.values():
        good, bad = metric.compute(perfect[metric.kind]), metric.compute(worse[metric.kind])
        assert (good > bad) == metric.higher_is_better, metric.name
        difference = compare_outcomes(metric, worse[metric.kind], perfect[metric.kind], resamples=20)
        assert difference.drop_points > 0, metric.name


def test_classes_and_confusion() -> None:
    details = details_of(LABELS)
    assert details["classes"]["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "count": 4}
    assert details["confusion"] == {"a": {"a": 3, "b": 1}, "b": {"b": 1, "c": 1}, "c": {"a": 1, "c": 1}}
    assert details_of(TEXTS) == {}


def test_labels_of_sentences_are_judged_word_by_word() -> None:
    outcome = Outcome("labels", [["x", "y"], ["x"]], [["x", "x"], ["x"]])
    assert metric_named("accuracy", "labels").compute(outcome) == pytest.approx(2 / 3)
    assert measure(metric_named("accuracy", "labels"), outcome, resamples=50).n == 2


def test_an_unknown_metric_names_those_of_the_task() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown metric of values 'bleu'; expected one of mse, pearson"
    ):
        metric_named("bleu", "values")


def made(right_share: float, seed: int, count: int = 400) -> Outcome:
    random = np.random.default_rng(seed)
    right = random.random(count) < right_share
    return Outcome("labels", ["yes"] * count, ["yes" if r else "no" for r in right])


def test_an_interval_is_that_of_the_binomial() -> None:
    outcome = made(0.8, 1)
    interval = measure(metric_named("accuracy", "labels"), outcome, resamples=1000)
    half = 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.low == pytest.approx(interval.value - half, abs=0.008)
    assert interval.high == pytest.approx(interval.value + half, abs=0.008)
    assert measure(metric_named("accuracy", "labels"), outcome) == interval
    with pytest.raises(BadInputError, match="evaluate: no samples; expected at least one"):
        measure(metric_named("accuracy", "labels"), Outcome("labels", [], []))


@pytest.mark.parametrize(("count", "least"), [(3, 0.37), (30, 0.905), (300, 0.990)])
def test_samples_that_are_all_right_do_not_make_a_model_perfect(count: int, least: float) -> None:
    metric = metric_named("accuracy", "labels")
    right = Outcome("labels", ["a", "b", "c"] * (count // 3), ["a", "b", "c"] * (count // 3))
    interval = measure(metric, right, resamples=50)
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(least, abs=0.002)
    wrong = dataclasses.replace(right, predictions=["d"] * count)
    interval = measure(metric, wrong, resamples=50)
    assert (interval.value, interval.low) == (0.0, 0.0)
    assert interval.high == pytest.approx(1 - least, abs=0.002)
    # Two models that say the same may differ in what was not asked.
    difference = compare_outcomes(metric, right, right, resamples=50)
    assert (difference.value, difference.p, difference.significant) == (0.0, 1.0, False)
    assert difference.high == -difference.low == pytest.approx(1 - least, abs=0.002)


def test_a_paired_difference_is_found_and_chance_is_not() -> None:
    metric = metric_named("accuracy", "labels")
    one = made(0.8, 1)
    # Worse on 20 samples and better on 2.
    said = list(one.predictions)
    right = [i for i, s in enumerate(said) if s == "yes"]
    wrong = [i for i, s in enumerate(said) if s == "no"]
    for i in right[:20]:
        said[i] = "no"
    for i in wrong[:2]:
        said[i] = "yes"
    worse = compare_outcomes(metric, Outcome("labels", one.references, said), one)
    assert worse.value == pytest.approx(-18 / 400)
    assert worse.drop_points == pytest.approx(4.5)
    assert worse.significant
    assert worse.high < 0
    # As many better as worse, and no difference at all.
    for i in wrong[2:20]:
        said[i] = "yes"
    same = compare_outcomes(metric, Outcome("labels", one.references, said), one)
    assert same.value == 0
    assert (same.p, same.significant) == (1.0, False)
    few = list(one.predictions)
    few[right[0]] = "no"
    assert not compare_outcomes(metric, Outcome("labels", one.references, few), one).significant
    with pytest.raises(BadInputError, match="other samples than the reference's; expected the same ones"):
        compare_outcomes(metric, made(0.8, 1, 10), one)


@pytest.mark.parametrize(
    ("module", "metric", "outcome"),
    [
        ("sklearn", "accuracy", LABELS),
        ("sacrebleu", "bleu", TEXTS),
        ("rouge_score", "rougeL", TEXTS),
        ("jiwer", "wer", TEXTS),
    ],
)
def test_a_missing_library_names_the_command(
    module: str, metric: str, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Block:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Block(), *sys.meta_path])
    with pytest.raises(
        MissingDependencyError, match=rf"'{module}' is not installed. Run `pip install 'onnxsmith\[eval\]'`"
    ):
        metric_named(metric, outcome.kind).compute(outcome)
