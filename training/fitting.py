"""The loop: examples, objective, optimizer, precision, evaluations, checkpoints."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError, CheckFailedError, require
from onnxsmith.training.checkpoints import read_checkpoint, write_checkpoint
from onnxsmith.training.devices import cuda_devices, usable_device
from onnxsmith.training.dropout import dropout_of
from onnxsmith.training.examples import Examples
from onnxsmith.training.objectives import Objective
from onnxsmith.training.settings import LESS_IS_BETTER, PRECISIONS, TrainingSettings
from onnxsmith.training.sparsity import kept_zeros

if TYPE_CHECKING:
    import torch

__all__ = ["FitProgress", "FitResult", "evaluate_loss", "fit", "weights_digest"]

Metrics = Callable[["torch.nn.Module"], Mapping[str, float]]
# Points of a loss curve.
_CURVE = 200
# Updates in a row that loss scaling may leave out: 2 ** 16 is its first scale.
_MAX_SKIPPED = 24


@dataclasses.dataclass(frozen=True)
class FitProgress:
    """Where a training is.

    Attributes:
        update: Updates done.
        updates: Updates in all.
        loss: Mean of the last updates.
        seconds_left: At the speed so far; None before there is one.
    """

    update: int
    updates: int
    loss: float
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What came of a training.

    Attributes:
        updates: Updates done.
        ended: Why it ended: ``finished``, ``patience`` or ``time``.
        curve: Points with ``update``, ``loss``, ``learning_rate`` and the parts of the loss.
        evaluations: Points with ``update``, ``loss`` and metrics, on held-out examples.
        kept: The update whose weights were kept.
        seconds: Time of training and evaluating, that before an interruption included.
        skipped: Updates that loss scaling left out.
        resumed_at: The update that it went on from; None where it was not interrupted.
        fingerprint: What identifies the training.
        device: Where it ran.
    """

    updates: int
    ended: str
    curve: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    kept: int
    seconds: float
    skipped: int
    resumed_at: int | None
    fingerprint: str
    device: str


def fit(
    model: torch.nn.Module,
    examples: Examples,
    objective: Objective,
    settings: TrainingSettings | None = None,
    *,
    validation: Examples | None = None,
    metrics: Metrics | None = None,
    checkpoint: Path | None = None,
    on_update: Callable[[FitProgress], None] | None = None,
) -> FitResult:
    """Trains a model in place. Afterwards it is in eval mode, on the CPU, with the weights that were kept.

    With a checkpoint, training that was killed goes on where the file says. On a CPU, with the same number of
    threads, it ends with the same bits as if it had not been: the order of the examples follows from the
    seed, and optimizer, loss scale and the state of the random numbers are in the file.

    Args:
        model: What to train; a model of transformers.
        examples: What it learns from.
        objective: What it learns.
        settings: How.
        validation: Held-out examples, for evaluations.
        metrics: Computes more of an evaluation, from the model in eval mode.
        checkpoint: The file of the state; none is written where None.
        on_update: Called after each update.

    Raises:
        BadInputError: Settings, data or the checkpoint do not fit.
        CheckFailedError: The loss is not finite.
        LackingError: There is no such device.
    """
    require("torch", purpose="training")
    return _Fit(model, examples, objective, settings or TrainingSettings(), validation, metrics).run(
        checkpoint, on_update
    )


def evaluate_loss(
    model: torch.nn.Module, examples: Examples, objective: Objective, *, batch: int = 64, device: str = "cpu"
) -> float:
    """The mean loss on examples, in eval mode and without gradients, each batch weighted by its rows."""
    import torch

    was_training = model.training
    model.eval()
    total = 0.0
    order = sorted(range(len(examples)), key=lambda n: len(examples.rows[n].ids))
    with torch.no_grad():
        for begin in range(0, len(order), batch):
            numbers = order[begin : begin + batch]
            total += float(objective.loss(model, examples, numbers, device)[0]) * len(numbers)
    model.train(was_training)
    return total / len(examples)


def weights_digest(model: torch.nn.Module) -> str:
    """The SHA-256 of all weights and buffers, by name."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()


class _Fit:
    def __init__(
        self,
        model: torch.nn.Module,
        examples: Examples,
        objective: Objective,
        settings: TrainingSettings,
        validation: Examples | None,
        metrics: Metrics | None,
    ) -> None:
        self.model, self.examples, self.objective = model, examples, objective
        self.settings, self.validation, self.metrics = settings, validation, metrics
        self.device = usable_device(settings.device)
        self.updates = settings.updates(len(examples))
        self.per_epoch = settings.updates_per_epoch(len(examples))
        self.update, self.skipped, self.bad, self.kept = 0, 0, 0, 0
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.best: float | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.ended = ""
        self.seconds_before = 0.0
        if settings.patience is not None and validation is None and metrics is None:
            raise BadInputError(
                "training: patience", got="no held-out examples", expected="some, to see what is better",
                remedy="Set validation_share, or give validation data",
            )  # fmt: skip

    def run(self, checkpoint: Path | None, on_update: Callable[[FitProgress], None] | None) -> FitResult:
        import torch

        with torch.random.fork_rng(devices=cuda_devices(self.device)):
            # Before anything random: projections are initialised too.
            torch.manual_seed(self.settings.seed)
            self.extra = self.objective.learned(self.model)
            self.fingerprint = self._fingerprint()
            found = None
            if checkpoint is not None:
                found = read_checkpoint(checkpoint, fingerprint=self.fingerprint)
            required = {name: p.requires_grad for name, p in self.model.named_parameters()}
            try:
                with dropout_of(self.model, self.settings.dropout):
                    resumed = self._train(found, checkpoint, on_update)
            finally:
                self.model.to("cpu").eval()
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(required[name])
                    parameter.grad = None
        if self.settings.keep_best and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        else:
            self.kept = self.update
        return FitResult(
            self.update, self.ended, self.curve, self.evaluations, self.kept, self._seconds(),
            self.skipped, resumed, self.fingerprint, self.device,
        )  # fmt: skip

    def _fingerprint(self) -> str:
        import torch

        # Where and how often the state is written changes nothing.
        settings = dataclasses.asdict(self.settings)
        settings.pop("checkpoint_seconds")
        # Where they are follows from the weights.
        sparse = sorted(kept_zeros(self.model))
        content = [
            *([sparse] if sparse else []),
            settings, self.objective.described(), self.examples.digest(),
            self.validation.digest() if self.validation is not None else None,
            weights_digest(self.model), torch.__version__, self.device,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _train(
        self,
        found: dict[str, Any] | None,
        checkpoint: Path | None,
        on_update: Callable[[FitProgress], None] | None,
    ) -> int | None:
        import torch

        settings = self.settings
        self.model.to(self.device)
        self.may_change = kept_zeros(self.model)
        if self.extra is not None:
            self.extra.to(self.device)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=settings.learning_rate)
        self.scaler = torch.amp.GradScaler(
            self.device.partition(":")[0], enabled=settings.precision == "fp16"
        )
        self.began = time.perf_counter()
        resumed: int | None = None
        if found is not None:
            self._restore(found)
            resumed = self.update
        began_at, written = self.update, time.perf_counter()
        skipped_in_a_row = 0
        self.model.train()
        batches = self._batches()
        while not self.ended:
            loss, parts = self._accumulated(batches)
            # With loss scaling a sum that overflows is left out, and the scale falls.
            lost = not math.isfinite(loss) and settings.precision != "fp16"
            stepped = not lost and self._step()
            skipped_in_a_row = 0 if stepped else skipped_in_a_row + 1
            self.skipped += not stepped
            if lost or skipped_in_a_row > _MAX_SKIPPED:
                raise CheckFailedError(
                    f"training: update {self.update + 1}", got=f"the loss is {loss}",
                    expected="a finite one",
                    remedy="Lower learning_rate, or use bf16 or float32 in place of fp16",
                )  # fmt: skip
            self.update += 1
            self._record(loss, parts)
            if on_update is not None:
                done = self.update - began_at
                pace = (time.perf_counter() - self.began) / done
                left = pace * (self.updates - self.update)
                on_update(FitProgress(self.update, self.updates, self._recent(), left))
            evaluated = self._evaluate_if_due()
            self._end_if_due()
            due = time.perf_counter() - written >= settings.checkpoint_seconds
            if checkpoint is not None and (due or evaluated or self.ended):
                write_checkpoint(checkpoint, self._state(), fingerprint=self.fingerprint)
                written = time.perf_counter()
        # What ended early ended between two points.
        self._add_point()
        return resumed

    def _batches(self) -> Iterator[list[list[int]]]:
        """The batches of each update, from the one that is next."""
        settings = self.settings
        while True:
            epoch, done = divmod(self.update, self.per_epoch)
            order = self.examples.order(settings.batch, seed=settings.seed, epoch=epoch)
            for begin in range(done * settings.accumulate, len(order), settings.accumulate):
                yield order[begin : begin + settings.accumulate]

    def _accumulated(self, batches: Iterator[list[list[int]]]) -> tuple[float, dict[str, float]]:
        """Gradients of the next batches, and their mean loss."""
        import torch

        rate = self.settings.learning_rate_at(self.update, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        kind = PRECISIONS[self.settings.precision]
        together = next(batches)
        loss, parts = 0.0, dict[str, float]()
        for numbers in together:
            with torch.autocast(
                self.device.partition(":")[0],
                dtype=getattr(torch, kind) if kind else None,
                enabled=kind is not None,
            ):
                value, pieces = self.objective.loss(self.model, self.examples, numbers, self.device)
            self.scaler.scale(value / len(together)).backward()
            loss += float(value.detach()) / len(together)
            for name, piece in pieces.items():
                parts[name] = parts.get(name, 0.0) + float(piece.detach()) / len(together)
        return loss, parts

    def _step(self) -> bool:
        """Updates the weights; False where loss scaling left it out, because a gradient was not finite."""
        import torch

        self.scaler.unscale_(self.optimizer)
        # AdamW leaves a zero that never had a gradient as it is.
        for name, mask in self.may_change.items():
            gradient = self.model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)
        if self.settings.max_gradient_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_gradient_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with and without weight decay; those that keep their values are in neither."""
        frozen = [
            name
            for name, _ in self.model.named_parameters()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.settings.freeze)
        ]
        for pattern in self.settings.freeze:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in self.model.named_parameters()):
                raise BadInputError(
                    f"training: freeze {pattern!r}", got="no parameter of this name",
                    expected=f"patterns of names such as {next(self.model.named_parameters())[0]}",
                )  # fmt: skip
        decayed: list[Any] = []
        others: list[Any] = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
            if parameter.requires_grad:
                (decayed if parameter.dim() > 1 else others).append(parameter)
        if self.extra is not None:
            decayed += list(self.extra.parameters())
        if not decayed and not others:
            raise BadInputError("training: freeze", got="all parameters", expected="some that are trained")
        groups = [(decayed, self.settings.weight_decay), (others, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def _record(self, loss: float, parts: Mapping[str, float]) -> None:
        for name, value in {"loss": loss, **parts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1
        if self.summed >= max(1, self.updates // _CURVE) or self.update == self.updates:
            self._add_point()

    def _add_point(self) -> None:
        if self.summed:
            means = {name: value / self.summed for name, value in self.sums.items()}
            rate = self.settings.learning_rate_at(self.update - 1, self.updates)
            self.curve.append({"update": self.update, "learning_rate": rate, **means})
            self.sums, self.summed = {}, 0

    def _recent(self) -> float:
        return self.sums["loss"] / self.summed if self.summed else self.curve[-1]["loss"]

    def _evaluate_if_due(self) -> bool:
        every = self.settings.evaluate_every or self.per_epoch
        if (self.validation is None and self.metrics is None) or (
            self.update % every and self.update != self.updates
        ):
            return False
        self.evaluations.append({"update": self.update} | self._evaluated())
        value = self.evaluations[-1].get(self.settings.watch)
        if value is None:
            known = [name for name in self.evaluations[-1] if name != "update"]
            raise BadInputError(
                "training: watch", got=repr(self.settings.watch), expected=f"one of {', '.join(known)}"
            )
        value = -value if self.settings.watch in LESS_IS_BETTER else value
        if self.best is None or value > self.best:
            self.best, self.bad, self.kept = value, 0, self.update
            if self.settings.keep_best:
                state = self.model.state_dict()
                self.best_weights = {n: t.detach().cpu().clone() for n, t in state.items()}
        else:
            self.bad += 1
        return True

    def _evaluated(self) -> dict[str, float]:
        import torch

        found: dict[str, float] = {}
        # Evaluating must not change what comes after it.
        with torch.random.fork_rng(devices=cuda_devices(self.device)):
            if self.validation is not None:
                found["loss"] = evaluate_loss(
                    self.model, self.validation, self.objective,
                    batch=self.settings.batch, device=self.device,
                )  # fmt: skip
            if self.metrics is not None:
                self.model.eval()
                with torch.no_grad():
                    found |= {name: float(value) for name, value in self.metrics(self.model).items()}
        self.model.train()
        return found

    def _end_if_due(self) -> None:
        patience, minutes = self.settings.patience, self.settings.max_minutes
        if self.update >= self.updates:
            self.ended = "finished"
        elif patience is not None and self.bad >= patience:
            self.ended = "patience"
        elif minutes is not None and self._seconds() >= minutes * 60:
            self.ended = "time"

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _state(self) -> dict[str, Any]:
        import torch

        cuda = self.device.startswith("cuda")
        return {
            "model": self.model.state_dict(),
            "extra": self.extra.state_dict() if self.extra is not None else None,
            # Nothing follows, and it is twice as large as the model.
            "optimizer": None if self.ended else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.random.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "best_weights": self.best_weights,
            "plain": {name: getattr(self, name) for name in _PLAIN},
            "seconds": self._seconds(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        import torch

        self.model.load_state_dict(state["model"])
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.random.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.best_weights = state["best_weights"]
        for name in _PLAIN:
            setattr(self, name, state["plain"][name])
        self.seconds_before = state["seconds"]


_PLAIN = ("update", "skipped", "bad", "kept", "curve", "evaluations", "best", "sums", "summed", "ended")
