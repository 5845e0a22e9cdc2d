"""When does sampling by priority help? Trains the studies and writes docs/RESULTS.md from them.

    python benchmarks/quality/run.py                 all studies, two hours on two cores
    python benchmarks/quality/run.py --only headline one of them
    python benchmarks/quality/run.py --only breadth --study 'permuted*'   a part of one
    python benchmarks/quality/run.py --quick         a small one on scikit-learn's digits, a minute
    python benchmarks/quality/run.py --tables        only write the tables anew

Half of the two hours is ``papers`` and ``rates_papers``, tasks of 60,000 images.
Each study is a ``distcl compare``: paired seeds, every arm at equal compute. Its result is a file
of ``benchmarks/quality/results/``; runs are kept in ``--work``, so what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.quality import data, tables  # noqa: E402
from benchmarks.quality.grid import Grid  # noqa: E402
from benchmarks.quality.suites import QUICK, SUITES, Study, Suite  # noqa: E402
from distcl.reporting.comparison import Plan, Variant, run_plan  # noqa: E402
from distcl.reporting.verdict import as_json, conclude  # noqa: E402
from tests.forked import start  # noqa: E402

HERE = Path(__file__).parent
KEPT = (
    *("seed", "diverged", "average_accuracy", "average_forgetting", "average_anytime_accuracy"),
    *("units", "steps", "seconds"),
)
"""Of each run, in the results."""
NAMES = [*SUITES, *tables.OTHERS]


def main() -> None:
    """Do what the options say."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after the run in progress
    if options.tables:
        tables.write(HERE / "results", ROOT / "docs" / "RESULTS.md")
        return
    if options.quick:
        folder = options.work / "quick"
        run_suite("quick", QUICK, HERE / "digits.toml", (), folder, folder, options.jobs)
        tables.write(folder, folder / "RESULTS.md", {"quick": QUICK})
        print(f"wrote {folder / 'RESULTS.md'}")
        return
    if not options.data.exists():
        print(f"skipped: there is no MNIST at {options.data}; give its .npz by --data")
        return
    path = data.prepare(options.data, options.work)
    given = (f"stream.path={path}",)
    config, results = HERE / "mnist.toml", HERE / "results"
    for name in options.only or NAMES:
        work = options.work / name
        if name in tables.OTHERS:
            grid = Grid(start, config, given, work, print, {"OMP_NUM_THREADS": "1"})
            _write(tables.OTHERS[name].measure(grid), results / f"{name}.json")
        else:
            run_suite(name, SUITES[name], config, given, work, results, options.jobs, options.study)
        tables.write(results, ROOT / "docs" / "RESULTS.md")


def run_suite(
    name: str,
    suite: Suite,
    config: Path,
    given: tuple[str, ...],
    work: Path,
    results: Path,
    jobs: int,
    only: str = "*",
) -> None:
    """Run the studies of a suite whose names fit ``only``; write ``NAME.json`` after each.

    Results of the others stay in it. ``given``: overrides that hold on this machine only, and are
    not told in the results.
    """
    names = [study.name for study in suite.studies]
    if not fnmatch.filter(names, only):
        sys.exit(f"no study of {name} is called '{only}'; there are: {'; '.join(names)}")
    path, found = results / f"{name}.json", dict[str, Any]()
    if only != "*" and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["studies"]
        found = {study["name"]: study for study in before}
    for study in suite.studies:
        if not fnmatch.fnmatchcase(study.name, only):
            continue
        result = run_study(study, config, given, work / study.name, jobs)
        found[study.name] = _told(study, result)
        in_order = [found[study.name] for study in suite.studies if study.name in found]
        _write({"suite": name, "studies": in_order}, path)
        print(f"{name}: {study.name}: {result['verdict']}", flush=True)


def run_study(
    study: Study, config: Path, given: tuple[str, ...], work: Path, jobs: int
) -> dict[str, Any]:
    """Return what ``distcl compare`` finds of a study, as in its compare.json."""
    plan = Plan(
        config=config,
        variants=tuple(Variant(name, keys) for name, keys in study.arms.items()),
        seeds=study.seeds,
        out=work,
        overrides=(*given, *study.overrides),
        jobs=jobs,
    )
    say = lambda text: print(f"  {study.name}: {text}", flush=True)  # noqa: E731
    return as_json(conclude(plan, run_plan(plan, say, start)))


def _write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _told(study: Study, result: dict[str, Any]) -> dict[str, Any]:
    arms = [
        {
            "name": arm["name"],
            "overrides": arm["overrides"],
            "step_factor": arm["step_factor"],
            "runs": [{key: run[key] for key in KEPT} for run in arm["runs"]],
        }
        for arm in result["arms"]
    ]
    return {
        "name": study.name,
        "overrides": list(study.overrides),
        "seeds": list(study.seeds),
        "equal": result["equal"],
        "metric": result["metric"],
        "arms": arms,
        "differences": result["differences"],
        "verdict": result["verdict"],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute, on digits")
    parser.add_argument("--only", action="append", choices=NAMES, help="a study; repeatable")
    parser.add_argument("--study", default="*", help="of a study, the parts of this name")
    parser.add_argument("--tables", action="store_true", help="write docs/RESULTS.md, run nothing")
    parser.add_argument("--data", type=Path, default=data.USUAL, help="MNIST as an .npz")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="run folders")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: as cores allow")
    return parser.parse_args()


if __name__ == "__main__":
    main()
