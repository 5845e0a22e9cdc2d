"""Faults at random, for as long as wanted: does every run recover, or stop with its cause?

    python benchmarks/fault_campaign.py [--seed 1] [--minutes 20] [--at-once 3]
                                        [--ranks 2] [--json FILE]

The faults are those of tests/faults/campaign.py, on ``--ranks`` processes. After each, the run goes
on with ``--resume auto`` and must have the draws, weights and accuracies of one that nobody
disturbed, bit for bit. One after another all faults are tried, SIGKILL and SIGTERM most often,
until the time is over. Prints fault × tries × recovered × clean stop × wrong × hung; exits with 1
unless wrong and hung are 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.campaign import FAULTS, Campaign, attempt

OFTEN = {"kill -9 in step": 6, "SIGTERM anywhere": 6}
"""Faults that are tried several times in a pass over all."""
COLUMNS = ("recovered", "clean stop", "wrong", "hung", "not possible")


def campaign(seed: int, minutes: float, at_once: int, ranks: int) -> dict[str, Counter[str]]:
    """Try faults until the time is over; say of each try that goes wrong what happened."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    begun = time.monotonic()
    field, tries = Campaign(folder / "campaign", ranks), {fault: Counter[str]() for fault in FAULTS}
    turn = [fault for fault in FAULTS for _ in range(OFTEN.get(fault, 1))]
    numbers = itertools.count()

    def work() -> None:
        while time.monotonic() - begun < minutes * 60:
            number = next(numbers)
            fault = turn[number % len(turn)]
            result = attempt(field, fault, seed, number)
            column = result.partition(":")[0]
            tries[fault][column] += 1
            if column in ("wrong", "hung"):
                print(f"{fault}, try {number}: {result}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:  # much of a try is waiting
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()
    shutil.rmtree(folder)
    return tries


def table(first: str, columns: Sequence[str], tries: dict[str, Counter[str]]) -> str:
    """Return a table as text: ``first`` × tries × columns, and their sums."""
    rows = [(first, "tries", *columns)]
    for name, found in [*tries.items(), ("all", sum(tries.values(), Counter[str]()))]:
        rows.append((name, str(found.total()), *(str(found[c]) for c in columns)))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults at random, and what came of them.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--at-once", type=int, default=3, help="tries at the same time")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run, 2 or more")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    begun = time.monotonic()
    tries = campaign(args.seed, args.minutes, args.at_once, args.ranks)
    print(table("fault", COLUMNS, tries))
    print(f"seed {args.seed}, {(time.monotonic() - begun) / 60:.1f} minutes")
    if args.json:
        args.json.write_text(json.dumps(tries, indent=1))
    sys.exit(any(found["wrong"] or found["hung"] for found in tries.values()))


if __name__ == "__main__":
    main()
