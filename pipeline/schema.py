"""Writes the JSON Schemas of recipes and batches: ``python -m onnxsmith.pipeline.schema DIRECTORY``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pydantic

from onnxsmith.pipeline.batch_jobs import BatchSpec
from onnxsmith.pipeline.recipe import Recipe

__all__ = ["SCHEMAS", "json_schema"]

# The file of each schema in the documentation.
SCHEMAS: Mapping[str, type[pydantic.BaseModel]] = {
    "batch.schema.json": BatchSpec,
    "recipe.schema.json": Recipe,
}


def json_schema(model: type[pydantic.BaseModel]) -> str:
    """The JSON Schema of a file that users write, as text."""
    schema = model.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for file, kind in SCHEMAS.items():
        Path(sys.argv[1], file).write_text(json_schema(kind), encoding="utf-8")
