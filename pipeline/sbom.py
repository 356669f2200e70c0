"""A bill of materials for an artifact, in CycloneDX: the model, what it was made from, and what made it."""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path
from typing import Any

from onnxsmith._version import __version__
from onnxsmith.environment import describe_versions
from onnxsmith.errors import require
from onnxsmith.package import ModelPackage
from onnxsmith.pipeline.artifact import file_entries

__all__ = ["SBOM_NAME", "bill_of_materials", "write_sbom"]

SBOM_NAME = "sbom.cdx.json"
# The bill says nothing of when it was made: the same artifact has the same bill.
_NO_TIME = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NAMESPACE = uuid.UUID("6a0f6a1e-3d0c-5b52-9d0e-0f1f5a6f6e11")


def write_sbom(package: ModelPackage, directory: Path, *, name: str) -> None:
    """Writes ``sbom.cdx.json`` for the files that stand in a directory.

    Args:
        package: What was saved there.
        directory: The artifact.
        name: What to call the model.
    """
    (directory / SBOM_NAME).write_text(bill_of_materials(package, directory, name=name), encoding="utf-8")


def bill_of_materials(package: ModelPackage, directory: Path, *, name: str) -> str:
    """A CycloneDX 1.6 document as JSON.

    The model is a component of the type ``machine-learning-model`` with the artifact's files and hashes; the
    files that it was made from are ``data``; the libraries that made it are ``library``.

    Args:
        package: What was saved.
        directory: The artifact.
        name: What to call the model.
    """
    require("cyclonedx", purpose="a bill of materials")
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    def hashed(value: str | None) -> list[Any]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=value)] if value else []

    licenses = _licenses(package.source.get("license"))
    files = [
        Component(
            name=file, type=ComponentType.FILE, bom_ref=f"file:{file}", hashes=hashed(entry.sha256),
            properties=[Property(name="onnxsmith:bytes", value=str(entry.bytes))],
        )
        for file, entry in file_entries(directory).items()
    ]  # fmt: skip
    told = {
        "task": package.task,
        "precision": package.precision,
        "architecture": package.source.get("architecture"),
        "parameters": package.source.get("parameters"),
        "steps": " > ".join(step.name for step in package.steps),
    }
    model = Component(
        name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="model", licenses=licenses,
        components=files,
        properties=[Property(name=f"onnxsmith:{k}", value=str(v)) for k, v in told.items() if v is not None],
    )  # fmt: skip
    sources = [
        Component(
            name=str(file.get("name")), type=ComponentType.DATA, bom_ref=f"source:{file.get('name')}",
            hashes=hashed(file.get("sha256")), licenses=licenses,
            properties=[Property(name="onnxsmith:source", value=str(package.source.get("text")))],
        )
        for file in package.source.get("files") or []
    ]  # fmt: skip
    libraries = [
        _library(Component, library, version)
        for library, version in {"onnxsmith": __version__, **describe_versions()["versions"]}.items()
    ]
    bom = Bom(components=[*sources, *libraries])
    bom.metadata.component = model
    bom.metadata.timestamp = _NO_TIME
    bom.register_dependency(model, [*sources, *libraries])
    facts = "\n".join(f"{c.name} {h.content}" for c in (*files, *sources) for h in c.hashes)
    bom.serial_number = uuid.uuid5(_NAMESPACE, facts)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2) + "\n"


def _library(component: Any, name: str, version: str) -> Any:
    from cyclonedx.model.component import ComponentType
    from packageurl import PackageURL

    public = version.partition("+")[0]
    return component(
        name=name, version=version, type=ComponentType.LIBRARY, bom_ref=f"library:{name}",
        purl=PackageURL("pypi", None, name.lower(), public),
    )  # fmt: skip


def _licenses(text: Any) -> list[Any]:
    from cyclonedx.model.license import DisjunctiveLicense
    from license_expression import get_spdx_licensing

    if not isinstance(text, str) or not text:
        return []
    # Model hubs write apache-2.0, SPDX writes Apache-2.0.
    known = {key.lower(): key for key in get_spdx_licensing().known_symbols}
    spdx = known.get(text.lower())
    return [DisjunctiveLicense(id=spdx) if spdx else DisjunctiveLicense(name=text)]
