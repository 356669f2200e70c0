"""Fine-tuning and distillation on tiny models: what they learn, how they stop, and how they go on."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsmith.errors import BadInputError, CheckFailedError, FeedError, LackingError, ResourceError
from onnxsmith.training.cross_validation import cross_validate
from onnxsmith.training.examples import IGNORED, Example, Examples
from onnxsmith.training.settings import TrainingSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from onnxsmith.pipeline.training_metrics import held_out_metrics  # noqa: E402
from onnxsmith.training import distillation_losses as losses  # noqa: E402
from onnxsmith.training.fitting import FitProgress, FitResult, evaluate_loss, fit  # noqa: E402
from onnxsmith.training.objectives import Distillation, DistillationWeights, Supervision  # noqa: E402
from onnxsmith.training.teachers import RuntimeTeacher, TorchTeacher  # noqa: E402

VOCABULARY = 40
QUICK = TrainingSettings(epochs=4, batch=16, learning_rate=3e-3, device="cpu", dropout=0.0)


def bert(kind: str = "class", *, layers: int = 2, width: int = 16, seed: int = 0, classes: int = 2) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=32, num_labels=1 if kind == "value" else classes,
        pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    made = {
        "tokens": transformers.BertForTokenClassification,
        "embedding": transformers.BertModel,
    }.get(kind, transformers.BertForSequenceClassification)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(config).eval()


def sentences(count: int, *, seed: int = 0, kind: str = "class") -> Examples:
    """Whether a sentence has more low tokens than high ones: what a small model can learn."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = random.integers(1, VOCABULARY, int(random.integers(4, 12))).tolist()
        low = [int(i < VOCABULARY // 2) for i in ids]
        share = sum(low) / len(low)
        label: Any = {"class": int(share > 0.5), "value": share, "tokens": low}.get(kind)
        rows.append(Example(ids, label))
    return Examples(rows, kind=kind)


def accuracy(model: Any, examples: Examples) -> float:
    batch = examples.batch(range(len(examples)))
    labels = batch.pop("labels")
    with torch.no_grad():
        right = model(**batch).logits.argmax(-1) == labels
    return float(right[labels != IGNORED].float().mean())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small, threads that wait for each other beside other tests only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def taught() -> tuple[Any, FitResult]:
    """A teacher: it has learned the sentences."""
    model = bert(layers=2, width=32)
    result = fit(model, sentences(600), Supervision(), dataclasses.replace(QUICK, epochs=6))
    return model, result


# The mathematics


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_are_the_divergence_at_a_temperature(temperature: float) -> None:
    special = pytest.importorskip("scipy.special")
    random = np.random.default_rng(0)
    student, teacher = random.standard_normal((2, 6, 5)) * 3
    said, wanted = (special.softmax(z / temperature, axis=-1) for z in (student, teacher))
    expected = temperature**2 * special.rel_entr(wanted, said).sum(-1)
    found = losses.soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature=temperature)
    assert float(found) == pytest.approx(expected.mean(), rel=1e-5)
    mask = torch.tensor([1, 0, 1, 1, 0, 0])
    masked = losses.soft_target_loss(
        torch.tensor(student), torch.tensor(teacher), temperature=temperature, mask=mask
    )
    assert float(masked) == pytest.approx(expected[mask.numpy() == 1].mean(), rel=1e-5)
    assert float(masked) != pytest.approx(float(found), rel=1e-3)


def test_soft_targets_keep_the_size_of_the_gradient() -> None:
    """Hinton et al.: in the limit of high temperatures the gradient is (z_s - z_t) / classes, without T."""
    student = torch.tensor([[0.3, -0.2, 0.1, -0.2]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.2, -0.4, 0.1]])
    losses.soft_target_loss(student, teacher, temperature=1e3).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 4, rtol=1e-2, atol=1e-4)


def test_hidden_and_attention_losses_against_numpy() -> None:
    random = np.random.default_rng(1)
    student, teacher = random.standard_normal((2, 3, 4, 6)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    on = mask == 1
    found = losses.hidden_loss([torch.tensor(student)], [torch.tensor(teacher)], mask=torch.tensor(mask))
    expected = np.square(student - teacher)[on].mean() / np.square(teacher)[on].mean()
    assert float(found) == pytest.approx(expected, rel=1e-5)
    zeros = losses.hidden_loss([torch.zeros(3, 4, 6)], [torch.tensor(teacher)], mask=torch.tensor(mask))
    assert float(zeros) == pytest.approx(1.0, rel=1e-6)
    cosine = losses.cosine_loss(torch.tensor(student), torch.tensor(teacher), mask=torch.tensor(mask))
    a, b = student[on], teacher[on]
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    assert float(cosine) == pytest.approx(np.mean(1 - (a * b).sum(-1) / norms), rel=1e-4)

    maps = random.random((2, 1, 3, 4, 4))
    maps[..., 3] = 0  # hidden by the mask
    ours, theirs = maps / maps.sum(-1, keepdims=True)
    row = (theirs * (np.log(np.clip(theirs, 1e-9, 1)) - np.log(np.clip(ours, 1e-9, 1)))).sum(-1)
    everything = torch.ones(1, 4)
    found = losses.attention_loss([torch.tensor(ours)], [torch.tensor(theirs)], mask=everything)
    assert float(found) == pytest.approx(row.mean(), rel=1e-4)
    # With fewer heads the means over heads are compared.
    found = losses.attention_loss([torch.tensor(ours[:, :2])], [torch.tensor(theirs)], mask=everything)
    a, b = ours[:, :2].mean(1), theirs.mean(1)
    expected = (b * (np.log(np.clip(b, 1e-9, 1)) - np.log(np.clip(a, 1e-9, 1)))).sum(-1).mean()
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_layers_are_mapped_evenly() -> None:
    assert losses.layer_map(3, 6) == [1, 3, 5]
    assert losses.layer_map(6, 6) == [0, 1, 2, 3, 4, 5]
    assert losses.layer_map(4, 12) == [2, 5, 8, 11]
    assert losses.layer_map(1, 6) == [5]
    with pytest.raises(BadInputError, match="layers: 0; expected at least 1"):
        losses.layer_map(0, 6)


# What is learned


def test_a_model_learns_and_its_loss_falls(taught: tuple[Any, FitResult]) -> None:
    model, result = taught
    assert (result.ended, result.updates, result.kept) == ("finished", 228, 228)
    assert result.curve[-1]["loss"] < 0.4 * result.curve[0]["loss"]
    assert [point["update"] for point in result.curve][-1] == 228
    held = sentences(300, seed=9)
    assert accuracy(model, held) > 0.9 > 0.7 > accuracy(bert(width=32), held)
    assert not model.training and not any(p.grad is not None for p in model.parameters())


def test_distilling_is_better_than_not(taught: tuple[Any, FitResult]) -> None:
    """The same student, the same few labelled examples, and texts that nobody has labelled."""
    teacher, _ = taught
    labelled = sentences(40, seed=3)
    unlabelled = [dataclasses.replace(row, label=None) for row in sentences(500, seed=4).rows]
    both = Examples([*labelled.rows, *unlabelled], kind="class")
    held = sentences(300, seed=9)
    alone, pupil = bert(seed=5), bert(seed=5)
    objective = Distillation(TorchTeacher(teacher), DistillationWeights(temperature=2, hard=0.5))
    before = evaluate_loss(pupil, held, objective)
    settings = dataclasses.replace(QUICK, epochs=6)
    result = fit(pupil, both, objective, settings)
    fit(alone, labelled, Supervision(), dataclasses.replace(settings, epochs=84))
    assert evaluate_loss(pupil, held, objective) < 0.5 * before
    assert accuracy(pupil, held) > accuracy(alone, held) + 0.05
    assert {"soft", "hard", "loss"} <= result.curve[0].keys()
    parts = result.curve[-1]["soft"] + result.curve[-1]["hard"]
    assert result.curve[-1]["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("part", ["hidden", "cosine", "attention"])
def test_a_student_comes_nearer_to_its_teachers_layers(taught: tuple[Any, FitResult], part: str) -> None:
    """Of another width and depth: the projection is learned with it, and thrown away."""
    teacher, _ = taught
    student = bert(layers=1, width=16, seed=1)
    objective = Distillation(TorchTeacher(teacher), DistillationWeights(soft=0, **{part: 1.0}))
    examples = sentences(200, seed=2)
    names = [name for name, _ in student.named_parameters()]
    result = fit(student, examples, objective, dataclasses.replace(QUICK, learning_rate=1e-2))
    assert result.curve[-1][part] < 0.8 * result.curve[0][part]
    assert [name for name, _ in student.named_parameters()] == names


@pytest.mark.parametrize("kind", ["value", "tokens", "embedding"])
def test_other_tasks_are_learned_and_distilled(kind: str) -> None:
    examples = sentences(300, kind=kind)
    teacher = bert(kind, width=32)
    if kind == "embedding":
        with pytest.raises(BadInputError, match="a model that embeds; expected one that predicts labels"):
            fit(bert(kind), examples, Supervision(), QUICK)
    else:
        result = fit(teacher, examples, Supervision(), QUICK)
        assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    student = bert(kind, seed=3, width=32, layers=1)
    objective = Distillation(TorchTeacher(teacher))
    before = evaluate_loss(student, examples, objective)
    fit(student, examples, objective, QUICK)
    assert evaluate_loss(student, examples, objective) < 0.5 * before


def test_a_decoder_is_distilled(tiny_llama_dir: Path) -> None:
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    student = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.zero_()
    random = np.random.default_rng(0)
    rows = [Example(random.integers(1, 64, 12).tolist()) for _ in range(80)]
    examples = Examples(rows, kind="next")
    objective = Distillation(TorchTeacher(teacher), DistillationWeights(temperature=1.0))
    held = Examples([Example(random.integers(1, 64, 12).tolist()) for _ in range(20)], kind="next")
    before = evaluate_loss(student, held, objective)
    # The first evaluation is the first control: a model is no distance from itself.
    assert evaluate_loss(teacher, held, objective) == pytest.approx(0, abs=1e-6) and before > 0.05
    fit(student, examples, objective, dataclasses.replace(QUICK, epochs=8), validation=held)
    assert evaluate_loss(student, held, objective) < 0.6 * before


def test_the_perplexity_of_texts_is_that_of_all_their_tokens(tiny_llama_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    texts = [list(range(1, 20)), [5, 9, 2], [40, 41, 3, 60, 12, 7]]
    likelihoods: list[list[float]] = []
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
        likelihoods.append([logits[place, token] for place, token in enumerate(ids[1:])])
    one = Examples([Example(texts[0])], kind="next")
    assert evaluate_loss(model, one, Supervision()) == pytest.approx(-np.mean(likelihoods[0]), rel=1e-5)
    expected = np.exp(-np.mean(np.concatenate(likelihoods)))
    examples = Examples([Example(ids) for ids in texts], kind="next")
    for batch in (1, 2, 3):
        found = held_out_metrics(model, examples, batch=batch)
        assert found == {"perplexity": pytest.approx(expected, rel=1e-5)}


def test_a_taught_decoder_is_watched_by_its_perplexity(tiny_llama_dir: Path) -> None:
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    examples = Examples([Example([1, 2, 3, 4, 5, 6])] * 32, kind="next")
    fit(teacher, examples, Supervision(), dataclasses.replace(QUICK, epochs=6))
    student = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    begun = held_out_metrics(student, examples)["perplexity"]
    settings = dataclasses.replace(QUICK, epochs=6, watch="perplexity", patience=6)
    result = fit(
        student, examples, Distillation(TorchTeacher(teacher)), settings,
        validation=examples, metrics=lambda model: held_out_metrics(model, examples),
    )  # fmt: skip
    seen = [point["perplexity"] for point in result.evaluations]
    # What is left to learn of the teacher says nothing about the text.
    assert seen[-1] < 0.5 * begun and seen[0] != pytest.approx(np.exp(result.evaluations[0]["loss"]), rel=0.1)
    kept = next(point for point in result.evaluations if point["update"] == result.kept)
    assert kept["perplexity"] == min(seen)
    assert held_out_metrics(student, examples)["perplexity"] == pytest.approx(min(seen), rel=1e-5)


def test_another_runtime_teaches_the_same(taught: tuple[Any, FitResult]) -> None:
    teacher, _ = taught

    def run(feeds: dict[str, Any]) -> Mapping[str, Any]:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            return {"logits": teacher(**tensors).logits.numpy()}

    names = ["input_ids", "attention_mask", "token_type_ids"]
    other = RuntimeTeacher(run, inputs=names, outputs=["logits"], name="other")
    results = []
    for one in (TorchTeacher(teacher), other):
        student = bert(seed=7)
        fit(student, sentences(60), Distillation(one), dataclasses.replace(QUICK, epochs=1))
        results.append(student.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name])
    with pytest.raises(FeedError, match="an ONNX model, which gives its outputs only"):
        objective = Distillation(other, DistillationWeights(hidden=1))
        fit(bert(), sentences(60), objective, QUICK)
    with pytest.raises(FeedError, match="the input 'past_key_values"):
        RuntimeTeacher(run, inputs=["past_key_values.0.key"], outputs=["logits"])
    with pytest.raises(FeedError, match="the outputs pooled; expected logits or last_hidden_state"):
        RuntimeTeacher(run, inputs=names, outputs=["pooled"])


# How it is trained


def test_accumulating_is_a_larger_batch() -> None:
    """Of examples of one length: then the mean of means is the mean."""
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, (64, 8))
    rows = [Example(row.tolist(), int((row < VOCABULARY // 2).sum() > 4)) for row in ids]
    examples = Examples(rows, kind="class")
    models = []
    for batch, accumulate in ((16, 1), (4, 4)):
        model = bert(seed=2)
        settings = dataclasses.replace(QUICK, steps=1, batch=batch, accumulate=accumulate)
        # The same 16 examples, whatever the batches are called.
        first = Examples(rows[:16], kind="class")
        fit(model, first, Supervision(), settings)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-3, atol=1e-4)
    assert len(examples) == 64


def test_the_schedule_rises_and_falls() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_share=0.2)
    rates = [settings.learning_rate_at(update, 10) for update in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = dataclasses.replace(settings, schedule="cosine", warmup_share=0.0)
    assert [cosine.learning_rate_at(update, 4) for update in (0, 2)] == pytest.approx([1.0, 0.5])
    constant = dataclasses.replace(settings, schedule="constant", warmup_share=0.0)
    assert constant.learning_rate_at(9, 10) == 1.0


def test_gradients_are_clipped_and_frozen_weights_stay() -> None:
    model = bert(seed=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = dataclasses.replace(QUICK, steps=3, freeze=("bert.embeddings.*",))
    fit(model, sentences(60), Supervision(), settings)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == name.startswith("bert.embeddings."), name
    with pytest.raises(BadInputError, match=r"freeze 'encoder\.\*': no parameter of this name"):
        fit(model, sentences(60), Supervision(), dataclasses.replace(settings, freeze=("encoder.*",)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_in_low_precision(precision: str) -> None:
    seen: set[torch.dtype] = set()
    model = bert(width=32)
    query = model.bert.encoder.layer[0].attention.self.query
    hook = query.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    settings = dataclasses.replace(QUICK, precision=precision, epochs=8)
    result = fit(model, sentences(300), Supervision(), settings)
    hook.remove()
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result.curve[-1]["loss"] < 0.7 * result.curve[0]["loss"]


def test_loss_scaling_leaves_out_what_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss as large as this overflows in float16 as soon as it is scaled by 65536."""

    class Large(Supervision):
        def loss(self, *arguments: Any) -> Any:
            value, parts = super().loss(*arguments)
            return value * 1e4, parts

    model = bert()
    settings = dataclasses.replace(QUICK, precision="fp16", epochs=6)
    result = fit(model, sentences(120), Large(), settings)
    assert 0 < result.skipped < result.updates
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    plain = fit(bert(), sentences(120), Supervision(), dataclasses.replace(settings, precision="float32"))
    assert plain.skipped == 0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(CheckFailedError, match=r"update 1: the loss is nan; .* Lower learning_rate"):
        fit(model, sentences(20), Supervision(), QUICK)


def test_training_stops_early_and_keeps_the_best() -> None:
    """The metric is told, so it is known when it should have stopped."""
    values = iter([0.5, 0.7, 0.6, 0.65, 0.1, 0.1])
    kept: list[dict[str, Any]] = []

    def metrics(model: Any) -> dict[str, float]:
        kept.append({name: t.clone() for name, t in model.state_dict().items()})
        return {"f1": next(values)}

    model = bert()
    settings = dataclasses.replace(QUICK, epochs=6, patience=2, watch="f1")
    result = fit(model, sentences(64), Supervision(), settings, metrics=metrics)
    assert (result.ended, result.updates, result.kept) == ("patience", 16, 8)
    assert [e["f1"] for e in result.evaluations] == [0.5, 0.7, 0.6, 0.65]
    assert all(torch.equal(t, kept[1][name]) for name, t in model.state_dict().items())
    assert not all(torch.equal(t, kept[3][name]) for name, t in model.state_dict().items())
    with pytest.raises(BadInputError, match="watch: 'f2'; expected one of f1"):
        values = iter([0.5])
        fit(bert(), sentences(64), Supervision(), dataclasses.replace(settings, watch="f2"), metrics=metrics)
    with pytest.raises(BadInputError, match=r"patience: no held-out examples; .* validation_share"):
        fit(bert(), sentences(64), Supervision(), settings)


def test_training_stops_when_its_time_is_over() -> None:
    settings = dataclasses.replace(QUICK, epochs=1000, max_minutes=0.002)
    seen: list[FitProgress] = []
    result = fit(bert(), sentences(64), Supervision(), settings, on_update=seen.append)
    assert result.ended == "time" and 0 < result.updates < 4000
    assert result.curve[-1]["update"] == result.updates
    assert [p.update for p in seen] == list(range(1, result.updates + 1))
    assert seen[-1].updates == 4000 and (seen[-1].seconds_left or 0) > 0


def test_the_same_seed_gives_the_same_bits() -> None:
    found = []
    for seed in (0, 0, 1):
        model = bert()
        settings = dataclasses.replace(QUICK, epochs=1, dropout=None, seed=seed)
        torch.manual_seed(len(found))  # what others do with random numbers is nothing to it
        state = torch.random.get_rng_state()
        fit(model, sentences(64), Supervision(), settings)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# Interruptions

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_training as t
t.long_training(
    Path(sys.argv[2]), lambda p: os.kill(os.getpid(), signal.SIGKILL) if p.update == 11 else None
)
"""


def long_training(checkpoint: Path | None, on_update: Callable[[FitProgress], None] | None) -> Any:
    """With everything that has a state: dropout, projections, loss scaling, accumulation, best weights."""
    teacher, student = bert(width=32, seed=1), bert(seed=2, layers=1)
    objective = Distillation(TorchTeacher(teacher), DistillationWeights(hidden=1.0, hard=1.0))
    settings = dataclasses.replace(
        QUICK, epochs=3, batch=8, accumulate=2, dropout=None, precision="fp16", checkpoint_seconds=0,
        evaluate_every=4, patience=50,
    )  # fmt: skip
    result = fit(
        student, sentences(100), objective, settings, validation=sentences(40, seed=8),
        checkpoint=checkpoint, on_update=on_update,
    )  # fmt: skip
    return result, student


def test_what_was_killed_goes_on_to_the_same_bits(tmp_path: Path, one_thread: None) -> None:
    whole, expected = long_training(tmp_path / "a" / "state.pt", None)
    assert (whole.resumed_at, whole.updates) == (None, 21)
    # Within the second epoch, in a process of its own that gets no chance to say anything.
    path = tmp_path / "b" / "state.pt"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Half a file, as a process that is killed while it writes leaves it.
    (path.parent / "state.pt.999999999.partial").write_bytes(b"PK")
    result, found = long_training(path, None)
    assert result.resumed_at == 10
    for (name, tensor), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(tensor, other), name
    assert result.curve == whole.curve and result.evaluations == whole.evaluations
    # What is finished is read, not trained again.
    assert long_training(path, None)[0].resumed_at == 21
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    fit(bert(), sentences(32), Supervision(), dataclasses.replace(QUICK, epochs=1), checkpoint=path)
    with pytest.raises(BadInputError, match=r"the state of another training; .* Remove it"):
        fit(bert(), sentences(33), Supervision(), dataclasses.replace(QUICK, epochs=1), checkpoint=path)
    with pytest.raises(BadInputError, match="the state of another training"):
        fit(bert(seed=1), sentences(32), Supervision(), dataclasses.replace(QUICK, epochs=1), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInputError, match="cannot be read"):
        fit(bert(), sentences(32), Supervision(), dataclasses.replace(QUICK, epochs=1), checkpoint=path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        fit(bert(), sentences(32), Supervision(), QUICK, checkpoint=tmp_path / "file" / "state.pt")


# Data


def test_examples_are_held_out_by_class() -> None:
    rows = [Example([1, 2], int(n % 10 == 0)) for n in range(200)] + [Example([3, 4])] * 50
    train, held = Examples(rows, kind="class").split(0.4, seed=1)
    assert (len(train), len(held)) == (170, 80)
    assert sum(row.label for row in held.rows) == 8 and held.labelled == 80  # type: ignore[misc]
    parts = Examples(rows, kind="class").folds(4, seed=1)
    assert sorted(n for part in parts for n in part) == list(range(200))
    assert [sum(rows[n].label for n in part) for part in parts] == [5, 5, 5, 5]  # type: ignore[misc]
    with pytest.raises(BadInputError, match="50 labelled examples in 60 parts"):
        Examples(rows[:50], kind="class").folds(60, seed=0)


def test_cross_validation_judges_each_example_once() -> None:
    examples = sentences(50)
    judged: list[int] = []

    def train(rest: Examples, part: Examples, fold: int) -> dict[str, float]:
        assert len(rest) + len(part) == 50
        judged.append(len(part))
        return {"f1": 0.5 + fold / 10, "count": len(part)}

    found = cross_validate(train, examples, folds=5, seed=0)
    assert judged == [10] * 5
    assert found.mean["f1"] == pytest.approx(0.7) and found.spread["f1"] == pytest.approx(0.1581, abs=1e-4)


def test_an_epoch_sees_each_example_once() -> None:
    examples = sentences(130)
    batches = examples.order(8, seed=3, epoch=1)
    assert sorted(n for batch in batches for n in batch) == list(range(130))
    assert examples.order(8, seed=3, epoch=1) == batches != examples.order(8, seed=3, epoch=2)
    assert len(batches) == 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: 0; expected a number above 0"),
        ({"batch": 0}, "batch: 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout: 1.0; expected from 0 to below 1"),
        ({"schedule": "step"}, "schedule: 'step'; expected one of linear, cosine, constant"),
        ({"precision": "int8"}, "precision: 'int8'; expected one of float32, bf16, fp16"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        TrainingSettings(**change)


def test_what_cannot_be_learned_is_said() -> None:
    with pytest.raises(BadInputError, match="examples: none; expected at least one"):
        Examples([], kind="class")
    with pytest.raises(BadInputError, match="kind: 'words'; expected one of class, value"):
        Examples([Example([1])], kind="words")
    with pytest.raises(BadInputError, match="3 tokens and 2 labels; expected a label for each token"):
        Examples([Example([1, 2, 3], [0, 1])], kind="tokens")
    with pytest.raises(BadInputError, match="class 2; expected below 2, the model's classes"):
        fit(bert(), Examples([Example([1, 2], 2)], kind="class"), Supervision(), QUICK)
    with pytest.raises(LackingError, match=r"device: 'nothing' cannot be used"):
        fit(bert(), sentences(9), Supervision(), dataclasses.replace(QUICK, device="nothing"))
    with pytest.raises(BadInputError, match="all weights are 0; expected one of soft, hard"):
        DistillationWeights(soft=0)
    with pytest.raises(BadInputError, match="temperature: 0; expected above 0"):
        DistillationWeights(temperature=0)
    wide = Distillation(TorchTeacher(bert(classes=3)))
    with pytest.raises(BadInputError, match=r"logits: \[9, 2\] of the student; expected \[9, 3\]"):
        fit(bert(), sentences(9), wide, QUICK)
    layers = Distillation(TorchTeacher(bert()), DistillationWeights(hidden=1), layers=[0, 7])
    with pytest.raises(BadInputError, match=r"layers: \[0, 7\]; expected 2 layers of the teacher"):
        fit(bert(), sentences(9), layers, QUICK)
