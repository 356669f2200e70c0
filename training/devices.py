"""Where a model is trained."""

from __future__ import annotations

from typing import Any

from onnxsmith.errors import LackingError

__all__ = ["cuda_devices", "usable_device"]


def usable_device(name: str) -> str:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        LackingError: There is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # torch raises AssertionError, RuntimeError and others
        raise LackingError(
            "training: device", got=f"{name!r} cannot be used: {str(error).splitlines()[0]}",
            expected="a device that is there", remedy="Leave it out, or set it to cpu",
        ) from error  # fmt: skip
    return name


def cuda_devices(device: str) -> list[Any]:
    """For ``torch.random.fork_rng``: the GPUs whose random numbers are at stake."""
    import torch

    return [torch.device(device).index or 0] if device.startswith("cuda") else []
