import json

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
    assert run.data.params["training.epochs"] == "3"
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
