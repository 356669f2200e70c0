"""What the points of a search are made from: the model, trained with the values that a point chooses."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import OnnxsmithError
from onnxsmith.pipeline.recipe import Recipe
from onnxsmith.pipeline.training_run import TrainingRun
from onnxsmith.pipeline.tuning_preparing import prepare
from onnxsmith.pipeline.tuning_store import fingerprint
from onnxsmith.progress import Progress
from onnxsmith.source import ModelSource

__all__ = ["TrainedModels"]


class TrainedModels:
    """Models by what was chosen for their training, each made when the first point needs it.

    Steps that several trainings begin with are taken once: their states stay beside the measurements, under
    a hash of what decides them.

    Attributes:
        reference: What PyTorch said of the first of them, for the report; None before there is one.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        work: Path,
        *,
        states: Path,
        base: Path | None,
        progress: Progress,
        content: Mapping[str, Any],
    ) -> None:
        """Reads the data, and checks the settings.

        Args:
            recipe: With a key ``tune``.
            source: The model.
            work: Where models go; it need not be there yet.
            states: Where states of trainings stay.
            base: The directory that relative paths of the recipe start from.
            progress: Who listens.
            content: Hashes of the source, and versions.

        Raises:
            OnnxsmithError: Data of the training cannot be read.
        """
        self.reference: Mapping[str, Any] | None = None
        self._recipe, self._source, self._work, self._base = recipe, source, work, base
        self._states, self._progress, self._content = states, progress, fingerprint(content)
        self._made: dict[str, Path] = {}
        self._failed: dict[str, OnnxsmithError] = {}
        # Trainings draw random numbers of one generator, so they follow each other.
        self._alone = threading.Lock()
        # What is wrong with the data is found now.
        self._plain = self._run(recipe)

    def identity(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What decides what is learned; None where nothing is.

        Args:
            values: See ``TrainingSpec.with_values``.

        Raises:
            BadInputError: They make no sense together.
        """
        if self._plain is None or self._recipe.training is None:
            return None
        return self._plain.identity(self._recipe.training.with_values(values))

    def prepare(self, values: Mapping[str, Any]) -> Path:
        """Trains, exports and asks PyTorch, unless that was done; gives the file that points are made from.

        Raises:
            OnnxsmithError: The model cannot be trained or exported.
        """
        recipe = self._recipe
        key = fingerprint([self.identity(values)])[:16]
        with self._alone:
            if key in self._failed:
                raise self._failed[key]
            if key not in self._made:
                if recipe.training is not None:
                    recipe = recipe.model_copy(update={"training": recipe.training.with_values(values)})
                directory = self._work / f"trained-{key}"
                directory.mkdir(parents=True)
                try:
                    prepared = prepare(
                        recipe, self._source, directory, base=self._base, progress=self._progress,
                        training=self._run(recipe),
                    )  # fmt: skip
                except OnnxsmithError as error:
                    # It would fail again, after as long a time.
                    self._failed[key] = error
                    raise
                self.reference = self.reference or prepared.reference
                self._made[key] = prepared.save(directory / "prepared.pickle")
            return self._made[key]

    def _run(self, recipe: Recipe) -> TrainingRun | None:
        if recipe.training is None:
            return None
        return TrainingRun(recipe, base=self._base, checkpoints=self._states, shared_by=self._content)
