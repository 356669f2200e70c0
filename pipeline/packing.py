"""One directory that people's runtimes load: onnxruntime, onnxruntime-genai, optimum, transformers.js."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith.environment import describe_versions
from onnxsmith.errors import BadInputError, UnknownNameError
from onnxsmith.onnx_file import save_model, weight_bytes
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import MANIFEST_NAME, load_package, read_manifest
from onnxsmith.pipeline.artifact import write_manifest
from onnxsmith.pipeline.layouts import DTYPE_SUFFIXES, LAYOUTS, Laid, graph_name, rename_axes
from onnxsmith.pipeline.model_card import CARD_NAME, model_card
from onnxsmith.pipeline.sbom import write_sbom
from onnxsmith.pipeline.signing import sign_artifact
from onnxsmith.pipeline.staging import check_destination, require_space, staged_directory

__all__ = ["Packed", "package_model"]

# transformers.js makes the first, empty cache from the names of its axes.
_AXES: Mapping[str, str] = {"batch": "batch_size"}


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was laid out.

    Attributes:
        directory: Where.
        layouts: The layouts that were made.
        refused: Layouts that this model cannot have, with the reason.
        graphs: The files of the graphs.
        signed_by: The fingerprint of the key; None where it was not signed.
    """

    directory: Path
    layouts: Sequence[str]
    refused: Mapping[str, str]
    graphs: Sequence[str]
    signed_by: str | None = None


def package_model(
    models: Sequence[Path],
    destination: Path,
    *,
    layouts: Sequence[str] = ("all",),
    sign_key: Path | None = None,
    force: bool = False,
) -> Packed:
    """Lays a model out so that real runtimes load it, with its weights once.

    Several models are variants of one: the same signature in other precisions. The first one is what clients
    get that do not choose.

    Args:
        models: Artifacts, directories with one ONNX model, or ONNX files; at least one.
        destination: Where the result is to be; it is an artifact too.
        layouts: Names of ``LAYOUTS``, or ``all`` for those that the model can have.
        sign_key: An Ed25519 private key to sign the manifest with.
        force: Whether an artifact that is there may be replaced.

    Raises:
        BadInputError: No model, or variants that do not belong together, or a layout that this model cannot
            have.
        UnknownNameError: No such layout.
        OnnxsmithError: A model cannot be read or the destination not be written.
    """
    if not models:
        raise BadInputError("package", got="no model", expected="at least one")
    for name in layouts:
        if name != "all" and name not in LAYOUTS:
            raise UnknownNameError("package", name=name, known=["all", *LAYOUTS], kind="layout")
    check_destination(destination, force=force)
    variants = [load_package(path) for path in models]
    _check_variants(models, variants)
    main = variants[0]
    refusals = {name: layout.refusal(main) for name, layout in LAYOUTS.items()}
    wanted = [name for name in LAYOUTS if "all" in layouts or name in layouts]
    for name in wanted:
        if refusals[name] and "all" not in layouts:
            raise BadInputError(
                f"package: layout {name}", got=refusals[name], expected="a model that it can serve"
            )
    made = [name for name in wanted if not refusals[name]]
    size = sum(weight_bytes(c.model) for variant in variants for c in variant.components.values())
    require_space(destination.resolve().parent, size, purpose=f"package of {models[0]}")
    with staged_directory(destination, force=force) as staging:
        laid = _save_graphs(variants, staging)
        for name, content in main.files.items():
            (staging / name).write_bytes(content)
        for name in made:
            for file, content in LAYOUTS[name].files(laid).items():
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                (staging / file).write_bytes(content)
        measurements, environment = _measured(models[0])
        title = destination.resolve().name
        card = model_card(
            main, name=title, measurements=measurements, environment=environment, usage=_usage(made)
        )
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        write_sbom(main, staging, name=title)
        packed = _placed(main, laid, staging)
        write_manifest(packed, staging, measurements=measurements)
        signed_by = sign_artifact(staging, sign_key) if sign_key is not None else None
        graphs = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*.onnx"))
    refused = {name: refusals[name] for name in wanted if refusals[name]}
    return Packed(destination, made, refused, graphs, signed_by)


def _placed(main: ModelPackage, laid: Laid, directory: Path) -> ModelPackage:
    """The main variant with its graphs where they stand now, for the manifest."""
    components = {
        name: dataclasses.replace(component, path=directory / laid.graphs[name])
        for name, component in main.components.items()
    }
    return dataclasses.replace(main, components=components)


def _save_graphs(variants: Sequence[ModelPackage], staging: Path) -> Laid:
    (staging / "onnx").mkdir()
    graphs: dict[str, str] = {}
    dtypes: list[str] = []
    external: list[str] = []
    for variant in variants:
        precision = variant.precision
        for name, component in variant.derive().components.items():
            file = graph_name(name, precision, single=len(variants) == 1)
            rename_axes(component, _AXES)
            # The name that transformers.js and optimum expect of a file of weights.
            save_model(component.model, staging / file, external_data_name=f"{Path(file).name}_data")
            if (staging / f"{file}_data").exists():
                external.append(file)
            graphs.setdefault(name, file)
        single = len(variants) == 1
        dtypes.append("fp32" if single else DTYPE_SUFFIXES.get(precision, ("", precision))[1])
    return Laid(variants[0], graphs, dtypes, external)


def _check_variants(models: Sequence[Path], variants: Sequence[ModelPackage]) -> None:
    def shape_of(package: ModelPackage) -> dict[str, Any]:
        return {
            name: ({s.name for s in c.inputs}, {s.name for s in c.outputs})
            for name, c in package.components.items()
        }

    seen: dict[str, Path] = {}
    for path, variant in zip(models, variants, strict=True):
        precision = variant.precision
        if precision in seen:
            raise BadInputError(
                f"package: {path}",
                got=f"a second variant in {precision}, as {seen[precision]}",
                expected="one of each precision",
            )
        seen[precision] = path
        if shape_of(variant) != shape_of(variants[0]):
            raise BadInputError(
                f"package: {path}",
                got="other graphs, inputs or outputs",
                expected=f"a variant of {models[0]}",
                remedy="Package them one by one",
            )


def _measured(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the manifest of the model says was measured of it, and where."""
    if not (model / MANIFEST_NAME).is_file():
        return {}, describe_versions()
    manifest = read_manifest(model)
    measurements, environment = manifest.get("measurements"), manifest.get("environment")
    return (
        measurements if isinstance(measurements, dict) else {},
        environment if isinstance(environment, dict) else {},
    )


def _usage(layouts: Sequence[str]) -> list[str]:
    lines = {
        "ort": "- ONNX Runtime alone: `pip install -r requirements.txt`, then `python infer.py`",
        "optimum": "- optimum: `ORTModelFor....from_pretrained(DIR)`",
        "genai": "- onnxruntime-genai: `onnxruntime_genai.Model(DIR)`",
        "transformers-js": "- transformers.js: `pipeline(TASK, DIR)` with `env.localModelPath` set",
        "sentence-transformers": '- sentence-transformers: `SentenceTransformer(DIR, backend="onnx")`',
    }
    return [lines[name] for name in layouts]
