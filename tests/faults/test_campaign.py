"""Every fault of the campaign, three times; benchmarks/fault_campaign.py tries them for longer."""

from __future__ import annotations

import pytest

from tests.faults.campaign import FAULTS, Campaign, attempt

CLEAN = ("read-only folder", "every checkpoint damaged")
"""Faults after which nothing can go on: a stop that names the cause is all there is."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("campaign")
    for parent in list(folder.parents)[:3]:  # a rank without root's power must reach it
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    return Campaign(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_three_tries(fault: str, campaign: Campaign) -> None:
    for number in range(3):
        result = attempt(campaign, fault, 0, number)
        if result.startswith("not possible"):
            pytest.skip(result)
        expected = ("clean stop",) if fault in CLEAN else ("recovered",)
        if fault == "checkpoint of an older version":  # the newest only, or all
            expected = ("recovered", "clean stop")
        assert result in expected
