"""What all parts of a recipe have in common."""

from __future__ import annotations

import typing
from typing import Any

import pydantic
from pydantic_core import PydanticCustomError

__all__ = ["RecipeModel", "broken_rule"]


def broken_rule(at: tuple[str | int, ...], got: str, expected: str) -> PydanticCustomError:
    """A rule about several keys that does not hold; ``at`` is the key to blame, below the model."""
    return PydanticCustomError(
        "rule", "{got}; expected {expected}", {"at": at, "got": got, "expected": expected}
    )


class RecipeModel(pydantic.BaseModel):
    """Refuses keys that nobody knows, and is not changed once it was read."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_boolean_numbers(cls, data: Any) -> Any:
        for name, field in cls.model_fields.items():
            kinds = {field.annotation, *typing.get_args(field.annotation)}
            # pydantic takes true for the number 1.
            if kinds & {int, float} and isinstance(data, dict) and isinstance(data.get(name), bool):
                raise broken_rule((name,), str(data[name]).lower(), "a number")
        return data
