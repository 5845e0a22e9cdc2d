from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, UsageError
from distcl.training.build import assemble
from distcl.types import DataSpec
from distcl.updaters.logits import LastLogits, LogitTable
from tests.small import small


def _rows(ids):
    return torch.tensor([[i, -i] for i in ids], dtype=torch.float64)


def test_logits_are_found_by_id_and_forgotten_with_it():
    table = LogitTable()
    table.put(np.array([9, 2, 5]), _rows([9, 2, 5]))
    table.keep(np.array([5, 9, 77]))
    table.put(np.array([1, 7]), _rows([1, 7]))
    like = torch.empty(0, 2, dtype=torch.float64)
    assert torch.equal(table.of(torch.tensor([7, 9, 7, 5]), like), _rows([7, 9, 7, 5]))
    assert table.of(torch.tensor([1]), like.float()).dtype == torch.float32
    assert table.of(torch.empty(0, dtype=torch.int64), like).shape == (0, 2)
    with pytest.raises(UsageError, match="sample id 2"):
        table.of(torch.tensor([5, 2]), like)


def test_a_table_without_logits_names_the_first_id_too():
    with pytest.raises(UsageError, match="sample id 4"):
        LogitTable().of(torch.tensor([4, 3]), torch.empty(0, 2))


def test_the_last_step_that_held_a_sample_wins():
    last = LastLogits(np.array([3, 1, 8]), Runtime())
    assert last.merge()[1] is None
    last.note(torch.tensor([8, 5, 3]), _rows([80, 50, 30]))
    last.note(torch.tensor([3, 4]), _rows([31, 40]))
    last.note(torch.empty(0, dtype=torch.int64), _rows([])[:0].reshape(0, 2))
    noted, logits = last.merge()
    assert last.ids.tolist() == [1, 3, 8]
    assert noted.tolist() == [False, True, True]
    assert torch.equal(logits[1:], _rows([31, 80]))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.one(x.flatten(1)), self.two(x.flatten(1))


def pair(spec: DataSpec) -> nn.Module:
    return Pair()


def pair_loss(outputs, y):
    return nn.functional.cross_entropy(outputs[0] + outputs[1], y, reduction="none")


@pytest.mark.parametrize("mode", ["der", "lwf"])
def test_a_model_of_several_outputs_is_refused_by_name(mode, tmp_path: Path):
    config = small(
        f"continual_learning.update_mode={mode}",
        "model.name=tests.unit.updaters.test_logits:pair",
        "model.options={}",
        "model.loss=tests.unit.updaters.test_logits:pair_loss",
    )
    stream = create_stream(config.stream, 0)
    parts = assemble(config, Runtime(), stream, tmp_path)
    with pytest.raises(ConfigError, match=f"update_mode = '{mode}' needs a model that returns one"):
        parts.updater.fwd_bwd(stream.read(stream.experiences[0].train[:5]), None)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_distillation_refuses_a_loss_without_classes(loss, tmp_path: Path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.random((900, 4)), y=rng.random(900))
    source = ["stream.source=arrays", f"stream.path={tmp_path / 'd.npz'}", "stream.drift=permute"]
    config = small("continual_learning.update_mode=lwf", f"model.loss={loss}", *source)
    with pytest.raises(ConfigError, match=f"'lwf' distils .* model.loss = '{loss}' has not"):
        assemble(config, Runtime(), create_stream(config.stream, 0), tmp_path)
