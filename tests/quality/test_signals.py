"""Every signal from every source, on one rank and on three; slow, since there are many pairs."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from distcl import registry
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from tests.dist.test_contract import KEYS, _trainer
from tests.small import small
from tests.spawn import run_ranks

SIGNALS = [part.name for part in registry.parts("signal")]


def _signals() -> dict[str, Any]:
    found = {}
    runtime = Runtime(small(*KEYS).run)
    for name in SIGNALS:
        for source in ("score", "candidates", "online"):
            config = small(
                *KEYS,
                "optimizer.lr=0.2",
                "training.epochs=5",
                f"priority.signal={name}",
                f"priority.source={source}",
                f"priority.correction={0 if source == 'candidates' else 1}",
                "priority.target=union",
                "priority.refresh_steps=3",
                "continual_learning.mix_historic_data=true",
            )
            with tempfile.TemporaryDirectory() as out:
                try:
                    trainer = _trainer(runtime, config, out)
                except ConfigError as error:  # what cannot be combined is refused, naming both
                    found[name, source] = str(error)
                    continue
                experiences = trainer.parts.stream.experiences
                trainer.pretrain(experiences[0])
                for experience in experiences[1:]:
                    trainer.run_round(experience, "scheduled")
                found[name, source] = [
                    (
                        r["draws_sha256"],
                        min(stats["ess_fraction"] for stats in r["priority"].values()),
                    )
                    for r in trainer.rounds
                ]
    runtime.close()
    return found


@pytest.mark.timeout(350)
def test_every_signal_draws_the_same_at_one_and_three_ranks_from_every_source() -> None:
    (alone,), three = run_ranks(1, _signals, timeout=170), run_ranks(3, _signals, timeout=170)
    for (name, source), result in alone.items():
        for rank in three:
            other = rank[name, source]
            if isinstance(result, str):
                assert other == result
                assert name in result and source in result
                assert source == "online"  # only there something cannot be combined
                continue
            assert [d for d, _ in other] == [d for d, _ in result], (name, source)
        if not isinstance(result, str):
            assert result[-1][1] < 0.999, f"{name} from {source} draws flat"
