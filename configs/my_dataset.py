"""A dataset of torch's as configs/torch.toml names it: digits, pairs of an image and its class."""

import torch
from torch.utils.data import Dataset

from distcl.config import StreamConfig
from distcl.data.sources.arrays import digits


class Digits(Dataset):
    """Handwritten digits; every second one is written in white on black, by another hand."""

    classes = tuple("0123456789")  # their names

    def __init__(self, hands):
        self.of, _ = digits(StreamConfig())
        self.groups = [k % hands for k in range(len(self.of))]  # the experience of each sample

    def __len__(self):
        return len(self.of)

    def __getitem__(self, k):
        image = self.of.read([k]).x[0]
        return torch.abs(self.groups[k] - image), int(self.of.labels[k])


def two_hands(hands=2):
    """Return the dataset; distcl holds out a share of it. Or a pair, (train, held-out)."""
    return Digits(hands)
