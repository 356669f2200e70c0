"""Writes the JSON Schema of recipes: ``python -m onnxsmith.pipeline.schema [FILE]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from onnxsmith.pipeline.recipe import Recipe

__all__ = ["recipe_schema"]


def recipe_schema() -> str:
    """The JSON Schema of a recipe, as text."""
    schema = Recipe.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(recipe_schema(), encoding="utf-8")
    else:
        sys.stdout.write(recipe_schema())
