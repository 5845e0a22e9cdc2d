"""Scores as users bring them, right and wrong."""

from __future__ import annotations

import torch


def right(outputs, y):
    return outputs.argmax(1) == y


def wrong(outputs, y):
    return outputs.argmax(1) != y


wrong.higher_is_better = False


def inverted(outputs, y):
    """More is better; a configuration may say otherwise."""
    return right(outputs, y)


def undefined(outputs, y):
    return torch.where(y == 3, torch.nan, 1.0)


def mean(outputs, y):
    return right(outputs, y).double().mean()


def broken(outputs, y):
    return y / (1 // 0)
