"""Every fault of the campaign, on 2 ranks and on 3; benchmarks/fault_campaign.py tries more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.campaign import FAULTS, Campaign, attempt

CLEAN = ("read-only folder", "every checkpoint damaged")
"""Faults after which nothing can go on: a stop that names the cause is all there is."""


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> list[Campaign]:
    return [Campaign(tmp_path_factory.mktemp("campaign"), world) for world in (2, 3)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_try_on_2_ranks_and_two_on_3(fault: str, campaigns: list[Campaign]) -> None:
    two, three = campaigns
    tries = ((two, 0), (three, 1), (three, 2))
    with ThreadPoolExecutor(3) as pool:  # much of a try is waiting
        results = list(pool.map(lambda chosen: attempt(chosen[0], fault, 0, chosen[1]), tries))
    if results[0].startswith("not possible"):
        pytest.skip(results[0])
    expected = {"clean stop"} if fault in CLEAN else {"recovered"}
    if fault == "checkpoint of an older version":  # the newest only, or all
        expected = {"recovered", "clean stop"}
    assert set(results) <= expected, results
