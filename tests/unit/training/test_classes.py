"""What is told of each class: which it is taken for, and its accuracy."""

from __future__ import annotations

import numpy as np
import torch

from distcl.training.class_scores import class_pairs, class_report, count_confusions
from distcl.types import Outputs


def outputs(logits: torch.Tensor) -> Outputs:
    return Outputs(torch.zeros(len(logits)), logits)


def test_counts_are_those_of_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(200, 5, generator=g), torch.randint(0, 4, (200,), generator=g)
    y[:3] = -100
    wanted = np.zeros((5, 5), np.int64)
    for one, label in zip(logits, y.tolist(), strict=True):
        if label >= 0:
            wanted[label, int(one.argmax())] += 1
    pairs = class_pairs(outputs(logits), y, "cross_entropy")
    counts = count_confusions(pairs, 4)
    assert counts is not None
    np.testing.assert_array_equal(counts, wanted)
    soft = torch.nn.functional.one_hot(y[3:], 5).float()
    again = class_pairs(outputs(logits[3:]), soft, "cross_entropy")
    assert torch.equal(again, pairs[3:])
    told = class_report([counts, None], 1, ())
    assert told is None
    told = class_report([counts, counts * 2, counts[:4, :4]], 2, ("cat", "dog"))
    assert told is not None
    assert told["names"] == ["cat", "dog", "2", "3", "4"]
    assert told["confusion"] == (3 * wanted).tolist()
    right = [wanted[k, k] / wanted[k].sum() for k in range(4)]
    assert told["accuracy"] == [*right, None]  # no sample of class 4
    assert told["by_experience"][1] == told["accuracy"]
    assert len(told["by_experience"][2]) == 5


def test_what_has_no_classes_or_too_many_is_not_counted() -> None:
    logits = torch.randn(6, 3)
    for y in (torch.randn(6, 3), torch.randn(6), torch.zeros(6, 3).long()):
        assert class_pairs(outputs(logits), y, "mse").shape == (6, 0)
        assert class_pairs(outputs(logits[:, :1]), y, "mse").shape == (6, 0)
    assert class_pairs(outputs(logits), (logits > 0).float(), "bce").shape == (6, 0)
    assert count_confusions(torch.zeros(6, 0), 3) is None
    some = torch.tensor([[0, 1], [1000, 3]])
    assert count_confusions(some, 3) is None
    many = count_confusions(some[:1], 101)
    told = class_report([many], 1, ())
    assert told is not None
    assert (told["confusion"], told["by_experience"]) == (None, None)
    assert len(told["accuracy"]) == 101
