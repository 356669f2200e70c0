"""Smaller PyTorch models: pruning, and teaching the smaller model back."""

from __future__ import annotations

from collections.abc import Sequence

__all__: Sequence[str] = ()
