"""Reports in the real MLflow, in a store of files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxsmith.errors import OnnxsmithError
from onnxsmith.pipeline.mlflow_logging import log_to_mlflow
from onnxsmith.pipeline.report import Report, VariantReport


def a_report() -> Report:
    good = VariantReport("good", precision="int8", size_mb=12.5, chosen=True, comparison={"passed": True})
    bad = VariantReport("bad", error="it broke")
    return Report(
        "tiny", "onnxsmith run", "2026-01-01T00:00:00Z", "0", {"text": "model"}, {}, {},
        variants=[good, bad], chosen="good", verdict="good chosen",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_report_is_one_run_with_one_below_it_for_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    # Its newer versions want a database; the store of files needs nothing.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "report.html").write_text("page")
    uri = (tmp_path / "store").as_uri()
    run = log_to_mlflow(a_report(), tmp_path, uri=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    parent = client.get_run(run)
    assert parent.data.params["chosen"] == "good" and parent.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run)] == ["report.html"]
    children = {
        child.info.run_name: child
        for child in client.search_runs([parent.info.experiment_id])
        if child.data.tags.get("mlflow.parentRunId") == run
    }
    assert children["good"].data.metrics == {"size_mb": 12.5}
    assert children["bad"].info.status == "FAILED" and children["bad"].data.params["reason"] == "it broke"


def test_without_mlflow_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(OnnxsmithError, match=r"mlflow.*pip install"):
        log_to_mlflow(a_report(), tmp_path, uri="file:store")
