"""Reports in MLflow: one run for a report, one below it for each variant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onnxsmith.errors import BadInputError, require
from onnxsmith.pipeline.report import Report
from onnxsmith.pipeline.run_tasks import budget_values

__all__ = ["check_store", "log_to_mlflow"]

_MAX_PARAMETER = 500


def check_store(uri: str) -> None:
    """Sees that a tracking store answers, before the work whose report it is to have.

    Args:
        uri: As for ``log_to_mlflow``.

    Raises:
        MissingDependencyError: MLflow is not installed.
        BadInputError: The store cannot be used.
    """
    mlflow: Any = require("mlflow", purpose="run --mlflow")
    try:
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        # Its stores raise what their own libraries do.
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> BadInputError:
    text = str(error).strip().partition("\n")[0]
    return BadInputError(f"--mlflow {uri}", got=text, expected="a tracking store that can be written")


def log_to_mlflow(report: Report, directory: Path, *, uri: str, experiment: str = "onnxsmith") -> str:
    """Logs what was measured of each variant, what it was made of, and the files of the report.

    Args:
        report: Of a run.
        directory: Where ``report.json`` and ``report.html`` are.
        uri: Of the tracking store: ``sqlite:///FILE``, ``file:DIRECTORY`` or a server.
        experiment: The name of the experiment; made where it is missing.

    Returns:
        The id of the run.

    Raises:
        MissingDependencyError: MLflow is not installed.
        BadInputError: The store cannot be used.
    """
    mlflow: Any = require("mlflow", purpose="run --mlflow")
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        home = client.create_experiment(experiment) if found is None else found.experiment_id
        parent = client.create_run(home, run_name=report.name).info.run_id
        _log(
            client,
            parent,
            {"source": report.source["text"], "chosen": report.chosen, "verdict": report.verdict},
            {},
        )
        for variant in report.variants:
            tags = {"mlflow.parentRunId": parent}
            child = client.create_run(home, run_name=variant.name, tags=tags).info.run_id
            passes = " ".join(record["name"] for record in variant.passes)
            facts = {
                "precision": variant.precision,
                "provider": variant.provider,
                "passes": passes,
                "passed": variant.passed,
                "chosen": variant.chosen,
                "reason": variant.reason,
            }
            _log(client, child, facts, dict(budget_values(variant)))
            client.set_terminated(child, "FINISHED" if variant.passed else "FAILED")
        for name in ("report.json", "report.html"):
            if (directory / name).is_file():
                client.log_artifact(parent, str(directory / name))
        client.set_terminated(parent, "FINISHED" if report.passed else "FAILED")
    except mlflow.exceptions.MlflowException as error:
        raise _unusable(uri, error) from error
    return str(parent)


def _log(client: Any, run: str, facts: dict[str, Any], values: dict[str, float | None]) -> None:
    for key, value in facts.items():
        client.log_param(run, key, str(value)[:_MAX_PARAMETER])
    for key, number in values.items():
        if number is not None:
            client.log_metric(run, re.sub(r"[^\w./ -]", "_", key), number)
