"""Combinations at random, on 1, 2 and 3 ranks: are they the same run, whatever goes together?

    python benchmarks/combinations.py [--seed 1] [--minutes 20] [--count N] [--ranks 1 2 3]
                                      [--only K …] [--at-once 2] [--work DIR] [--json FILE]

What is combined, and what must be equal, is told in tests/combinations.py. Prints a line for each
combination, with its configuration and how to run it again where it failed, then a table: source ×
tried × equal × refused × wrong × hung × crashed, and the reasons of refusals. Exits with 1 unless
wrong, hung and crashed are 0. ``--work`` keeps the data and runs of what failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.fault_campaign import table
from tests.combinations import SOURCES, Combination, Result, attempt, draw, kind_of, make_data

COLUMNS = ("equal", "refused", "wrong", "hung", "crashed")
FAILED = COLUMNS[2:]


class Tries:
    """Tries combinations and remembers what came of them."""

    def __init__(self, seed: int, ranks: list[int], work: Path) -> None:
        self._seed, self._ranks, self._work = seed, ranks, work
        self._lock = threading.Lock()
        self.found = {source: Counter[str]() for source in SOURCES}
        self.reasons = Counter[str]()
        make_data(work / "data")

    def __call__(self, number: int) -> None:
        """Try the combination of this number; keep its folder if it fails."""
        begun = time.monotonic()
        what = draw(self._seed, number, self._work / "data", self._ranks)
        folder = self._work / f"{self._seed}-{number}"
        result = attempt(what, folder, self._ranks)
        if result.kind not in FAILED:
            shutil.rmtree(folder)
        with self._lock:
            self.found[what.source][result.kind] += 1
            if result.kind == "refused":
                self.reasons[kind_of(result.why)] += 1
            print(
                f"{number}: {result.kind} in {time.monotonic() - begun:.1f} s: {what}", flush=True
            )
            if result.kind in FAILED:
                self._tell(number, what, result)

    def _tell(self, number: int, what: Combination, result: Result) -> None:
        again = f"python benchmarks/combinations.py --seed {self._seed} --only {number}"
        if self._ranks != [1, 2, 3]:
            again += f" --ranks {' '.join(map(str, self._ranks))}"
        text = f"{result.why}\n{what.toml.strip()}\nagain: {again}"
        print("".join(f"    {line}\n" for line in text.splitlines()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Combinations at random, on 1, 2 and 3 ranks.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--count", type=int, help="combinations, whatever time they take")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of combinations to try")
    parser.add_argument("--at-once", type=int, default=2, help="combinations at the same time")
    parser.add_argument("--work", type=Path, help="folder for data and runs; kept")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    begun = time.monotonic()
    work = args.work or Path(tempfile.mkdtemp(prefix="combinations-"))
    tries = Tries(args.seed, args.ranks, work.resolve())
    limit = float("inf") if args.count or args.only else args.minutes * 60
    chosen = args.only or (range(args.count) if args.count else itertools.count())
    numbers, turn = iter(chosen), threading.Lock()

    def next_number() -> int | None:
        with turn:
            return next(numbers, None) if time.monotonic() - begun < limit else None

    def work_on() -> None:
        while (number := next_number()) is not None:
            tries(number)

    with ThreadPoolExecutor(args.at_once) as pool:
        for worker in [pool.submit(work_on) for _ in range(args.at_once)]:
            worker.result()
    if not args.work:
        shutil.rmtree(work)
    print(table("source", COLUMNS, tries.found))
    for reason, count in tries.reasons.most_common():
        print(f"refused {count}: {reason}")
    print(f"seed {args.seed}, {(time.monotonic() - begun) / 60:.1f} minutes")
    if args.json:
        args.json.write_text(json.dumps(tries.found, indent=1))
    sys.exit(any(found[kind] for found in tries.found.values() for kind in FAILED))


if __name__ == "__main__":
    main()
