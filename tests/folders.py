"""Run folders for tests of what reads them, written as a run writes them."""

from __future__ import annotations

import json

import numpy as np

from distcl.config import Config
from distcl.config.load import to_toml
from distcl.sampling.draw_log import BINS, EDGES
from distcl.types import pack_ids

ACCURACY = [[0.9, 0.3, None], [0.8, 0.7, 0.4], [0.85, 0.6, 0.75]]


def run_folder(path, *, seed=0, alpha=1.0, shift=0.0, state="done", rounds=2):
    """Write a run folder of three experiences; return its path."""
    path.mkdir(parents=True)
    config = Config.model_validate(
        {
            "run": {"seed": seed, "out": str(path)},
            "continual_learning": {"importance_weighting": True, "importance_alpha": alpha},
        }
    )
    (path / "config.toml").write_text(to_toml(config))
    (path / "status.json").write_text(json.dumps({"state": state, "exit_code": 0, "reason": ""}))
    accuracy = [[v if v is None else v + shift for v in row] for row in ACCURACY]
    lines = [{"round": 0, "step": 10 * k, "loss": 2.0 / (k + 1)} for k in range(1, 4)]
    lines += [
        {"round": 0, "step": 30, "position": 64 * k, "monitor/error": 0.1 * (k % 4)}
        for k in range(20)
    ]
    for i, row in enumerate(accuracy):
        values = {f"accuracy/{j + 1}": v for j, v in enumerate(row) if v is not None}
        lines.append({"round": i, "step": 30 + 10 * i, **values})
        lines.append({"round": i + 1, "step": 40 + 10 * i, "loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reports = [report(k + 1) for k in range(rounds)]
    if state == "done":
        (path / "summary.json").write_text(json.dumps(summary(accuracy, reports, seed)))
    rng = np.random.default_rng(seed)
    (path / "draws").mkdir()
    for k in range(1, rounds + 1):
        np.savez(
            path / "draws" / f"round-{k:04d}.npz",
            ids=pack_ids(k, np.arange(7)),
            counts=np.arange(20, 13, -1),
            labels=np.arange(7),
            thumbnails=rng.integers(0, 256, (7, 8, 8, 1), dtype=np.uint8),
            cur_counts=rng.multinomial(500, np.ones(BINS) / BINS),
            cur_edges=EDGES,
        )
    return path


def report(number):
    stats = {"n": 500, "min": 0.0, "mean": 1.0, "max": 3.0, "std": 1.0, "ess_fraction": 0.5}
    return {
        "round": number,
        "trigger": f"drift at {400 * number}",
        "steps": 10,
        "train_seconds": 2.0,
        "priority_seconds": 0.5,
        "evaluate_seconds": 0.25,
        "forward_passes_per_sample": 2.0,
        "draws_sha256": "0" * 64,
        "final_loss": 0.25,
        "draws": {"draws": 1000, "distinct": 450, "coverage": 0.9, "most": 20},
        "priority": {"cur": stats},
    }


def summary(accuracy, reports, seed):
    return {
        "status": "done",
        "world_size": 1,
        "strategy": "ddp",
        "seconds": 10.0,
        "samples_per_second": 5000.0,
        "seed": seed,
        "metric": "accuracy",
        "accuracy": accuracy,
        "average_accuracy": sum(accuracy[-1]) / 3,
        "average_forgetting": 0.075,
        "backward_transfer": -0.075,
        "forward_transfer": 0.25,
        "average_anytime_accuracy": 0.8,
        "worst_experience_accuracy": min(accuracy[-1]),
        "drifts": [400, 800],
        "pretrain": {"steps": 30, "train_seconds": 1.0, "final_loss": 0.5, "draws_sha256": ""},
        "evaluate_seconds": 0.5,
        "rounds": reports,
    }
