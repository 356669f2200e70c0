"""A model of your own as a source: a function that returns the module and example inputs."""

from __future__ import annotations

import torch


class DigitClassifier(torch.nn.Module):
    """A small convolutional classifier of images (batch, 1, 28, 28) into ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, kernel_size=3, padding=1),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, kernel_size=3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        )
        self.classifier = torch.nn.Linear(32 * 7 * 7, 10)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(image).flatten(1)
        return {"scores": self.classifier(features)}


def make() -> tuple[torch.nn.Module, torch.Tensor]:
    """The module and an example input. Axis 0 is the batch, which stays free in the exported graph."""
    torch.manual_seed(0)
    # A real factory would load trained weights here: torch.load(path, weights_only=True) or safetensors.
    return DigitClassifier(), torch.randn(2, 1, 28, 28)
