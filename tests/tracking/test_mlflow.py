import json
import os

import pytest

from distcl.config import TrackingConfig
from distcl.tracking import create_tracker

pytest.importorskip("mlflow", reason="the package mlflow-skinny is not installed")

from mlflow.tracking import MlflowClient


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def tracker(out, resume):
    return create_tracker(TrackingConfig(kind="mlflow", project="p", name="n"), out, 0, resume)


def test_a_run_that_is_requeued_is_one_run_with_each_step_once(tmp_path):
    (tmp_path / "config.toml").write_text("[training]\nepochs = 3\n")
    first = tracker(tmp_path, resume=False)
    for n in range(2):
        first.log({"round": 1, "loss": 1.0 / (n + 1), "note": "text"}, n)
    state = first.state_dict()
    first.log({"round": 1, "loss": 1.0 / 3}, 2)
    first.finish()
    second = tracker(tmp_path, resume=True)
    second.load_state_dict(state)
    for n in range(2, 4):
        second.log({"round": 1, "loss": 1.0 / (n + 1)}, n)
    second.summarize({"average_accuracy": 0.75, "drifts": [5]})
    second.finish()

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("p")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(n, 1.0 / (n + 1)) for n in range(4)]
    assert run.data.metrics["final/average_accuracy"] == 0.75
    assert run.data.metrics["call"] == 3  # of four; a run that is extended goes on with the fifth
    assert run.data.params["training.epochs"] == "3"
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize(("ending", "status"), [("preempted", "KILLED"), ("failed", "FAILED")])
def test_a_run_has_its_own_folder_its_checkpoint_and_how_it_ended(tmp_path, ending, status):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        one = tracker(tmp_path / name, resume=False)
        assert "MLFLOW_TRACKING_URI" not in os.environ
        one.log({"loss": 1.0}, 0)
        one.checkpoint(tmp_path / "step-7")
        one.summarize({"average_accuracy": 0.5})
        one.finish(ending)
        client = MlflowClient(tracking_uri=(tmp_path / name / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("p")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == status
        assert run.data.tags["distcl.checkpoint"] == (tmp_path / "step-7").as_uri()
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["summary.json"]
