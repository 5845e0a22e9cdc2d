"""docs/RESULTS.md and its plots, from the results of the studies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality import detection, triggered
from benchmarks.quality.suites import SUITES, Suite
from distcl.reporting import plots
from distcl.reporting.figures import spread
from distcl.reporting.verdict import Paired, holm, paired

OTHERS = {"detection": detection, "triggered": triggered}
"""Studies that are not comparisons of arms at equal compute: name -> module."""

COMMAND = "python benchmarks/quality/run.py"
FOLDER = "benchmarks/quality/results"
LEVEL, NEEDED, WORSE = 0.01, 3, 0.3
"""The headline's target: better with a corrected p below this, on so many of the streams, and on
none worse by more than so many points."""

BEGIN, END = "<!-- differences -->", "<!-- end -->"

_HEAD = f"""\
# Results

Written by `{COMMAND} --tables` from the JSON files in
`{FOLDER}/`; do not edit. What they mean is in [METHOD.md](METHOD.md).

MNIST, 5 tasks of 10,000 training images where nothing else is said; 4,000 test images under the
drift of every task; a perceptron of two hidden layers of 100; plain SGD, 200 steps a task. Every
arm of a study has the same seeds, streams and first weights, and the same compute: a forward of a
sample is one unit, forward and backward three, scoring included; who needs less gets more steps.
Accuracy: percent, mean ± standard deviation over seeds of the mean over all tasks after the last.
Differences, from the first arm where no other is named, are paired by seed, in points, with 95 %
intervals and the p of Student's t-test.
Forgetting: points lost since a task's best; less is better. *seconds*: wall time of a run, on a
machine that did other things too.
"""


def write(results: Path, out: Path, suites: Mapping[str, Suite] = SUITES) -> None:
    """Write the document, its plots, and the table of METHOD.md beside it. Local."""
    out.write_text(render(results, suites), encoding="utf-8")
    method = out.parent / "METHOD.md"
    if method.exists():
        text = method.read_text(encoding="utf-8")
        method.write_text(filled(text, results, suites), encoding="utf-8")
    for name, suite in suites.items():
        path = results / f"{name}.json"
        if suite.tested and path.exists():
            figure = plots.differences(_pairs(_read(path)), "points")
            plot = plots.svg(figure, name)
            (out.parent / "plots").mkdir(exist_ok=True)
            (out.parent / "plots" / f"{name}.svg").write_text(plot, encoding="utf-8")


def render(results: Path, suites: Mapping[str, Suite] = SUITES) -> str:
    """Return the document, made of the files that there are. Local."""
    blocks = [_HEAD]
    missing = []
    for name, suite in suites.items():
        path = results / f"{name}.json"
        if not path.exists():
            missing.append(f"{suite.title} (`--only {name}`)")
            continue
        studies = _read(path)
        shown = [
            f"## {suite.title}",
            suite.text,
            f"`{COMMAND} --only {name}` → `{FOLDER}/{name}.json`",
        ]
        lacking = [s.name for s in suite.studies if s.name not in {f["name"] for f in studies}]
        if lacking:
            shown.append(f"Not run yet: {'; '.join(lacking)}.")
        if suite.tested:
            plot = f"![{suite.title}](plots/{name}.svg)"
            shown += [headline(studies), target(studies), halves(studies), plot]
        shown.append(arms(studies, suite))
        blocks.append("\n\n".join(shown) + "\n")
    for name, study in OTHERS.items() if suites is SUITES else ():
        path = results / f"{name}.json"
        if path.exists():
            blocks.append(f"## {study.TITLE}\n\n{study.table(json.loads(path.read_text()))}\n")
        else:
            missing.append(f"{study.TITLE} (`--only {name}`)")
    if missing:
        blocks.append("## Not measured yet\n\n" + "".join(f"- {line}\n" for line in missing))
    return "\n".join(blocks)


def filled(text: str, results: Path, suites: Mapping[str, Suite] = SUITES) -> str:
    """Return METHOD.md with the table of differences put between its marks, as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(results, suites)}\n{END}{after}"


def summary(results: Path, suites: Mapping[str, Suite] = SUITES) -> str:
    """Return a table of all differences in accuracy against the first arm of their study."""
    rows = [["suite", "study", "arm", "against", "n", "difference, points"]]
    for name in suites:
        path = results / f"{name}.json"
        if name.startswith("rates") or not path.exists():
            continue
        for study in _read(path):
            for arm in study["arms"][1:]:
                first, d = _difference(study, arm, suites[name])
                rows.append([name, study["name"], arm["name"], first, str(d.n), _interval(d)])
    return markdown(rows)


def headline(studies: list[dict[str, Any]]) -> str:
    """Return the table of tests: a row per study, p corrected for their number."""
    rows = [["stream", "n", "uniform", "recommended", "difference", "p", "p (Holm)", "better in"]]
    found = [_against(*study["arms"][:2]) for study in studies]
    corrected = holm([d.p for d in found])
    for study, d, p in zip(studies, found, corrected, strict=True):
        theirs, ours = (_accuracies(arm) for arm in study["arms"])
        wins = sum(b > a for a, b in zip(theirs, ours, strict=True))
        rows.append(
            [
                study["name"],
                str(d.n),
                spread(theirs, 2, 100),
                spread(ours, 2, 100),
                _interval(d),
                f"{d.p:.2g}",
                f"{p:.2g}",
                f"{wins} of {len(ours)}",
            ]
        )
    return markdown(rows)


def halves(studies: list[dict[str, Any]]) -> str:
    """Return a table of the differences over the first and the second half of the seeds."""
    rows = [["seeds", *(study["name"] for study in studies)]]
    number = len(studies[0]["seeds"])
    for part in (slice(0, number // 2), slice(number // 2, number)):
        cells = []
        for study in studies:
            cut = [{**arm, "runs": arm["runs"][part]} for arm in study["arms"][:2]]
            d = _against(*cut)
            cells.append(f"{_interval(d)}, p {_p(d)}")
        seeds = studies[0]["seeds"][part]
        rows.append([f"{seeds[0]} to {seeds[-1]}", *cells])
    return markdown(rows)


def target(studies: list[dict[str, Any]]) -> str:
    """Return in words whether the target is met."""
    found = [_against(*study["arms"][:2]) for study in studies]
    corrected = holm([d.p for d in found])
    better = sum(d.mean > 0 and p < LEVEL for d, p in zip(found, corrected, strict=True))
    worse = sum(100 * d.mean < -WORSE for d in found)
    met = better >= NEEDED and not worse
    return (
        f"Target: better with p < {LEVEL} (Holm) on at least {NEEDED} of the streams, worse by "
        f"more than {WORSE} points on none. Found: better on {better} of {len(studies)}, worse on "
        f"{worse}. The target is {'met' if met else 'not met'}."
    )


def arms(studies: list[dict[str, Any]], suite: Suite) -> str:
    """Return a table with a row per arm of every study."""
    rows = [
        ["study", "arm", "n", "accuracy", "forgetting", "difference", "p", "steps", "seconds"],
    ]
    for study in studies:
        for k, arm in enumerate(study["arms"]):
            first, d = _difference(study, arm, suite)
            other = "" if first == study["arms"][0]["name"] else f", against {first}"
            good = [run for run in arm["runs"] if not run["diverged"]]
            lost = len(arm["runs"]) - len(good)
            forgotten = [
                r["average_forgetting"] for r in good if r["average_forgetting"] is not None
            ]
            rows.append(
                [
                    study["name"] if k == 0 else "",
                    arm["name"],
                    str(len(good)) + (f" ({lost} diverged)" if lost else ""),
                    spread(_accuracies(arm), 2, 100),
                    spread(forgotten, 2, 100),
                    _interval(d) + other if k else "",
                    _p(d) if k else "",
                    f"{fmean(r['steps'] for r in good):,.0f}" if good else "–",
                    f"{fmean(r['seconds'] for r in good):.0f}" if good else "–",
                ]
            )
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Return rows, the first the header, as a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _read(path: Path) -> list[dict[str, Any]]:
    studies: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["studies"]
    return studies


def _difference(study: dict[str, Any], arm: dict[str, Any], suite: Suite) -> tuple[str, Paired]:
    """Return the name of the arm that this one is held against, and how it differs."""
    against = next((s.against for s in suite.studies if s.name == study["name"]), {})
    name = against.get(arm["name"], study["arms"][0]["name"])
    return name, _against(next(a for a in study["arms"] if a["name"] == name), arm)


def _against(first: dict[str, Any], arm: dict[str, Any]) -> Paired:
    both = zip(first["runs"], arm["runs"], strict=True)
    pairs = [(a, b) for a, b in both if not (a["diverged"] or b["diverged"])]
    theirs, ours = ([pair[k]["average_accuracy"] for pair in pairs] for k in (0, 1))
    return paired(ours, theirs)


def _accuracies(arm: dict[str, Any]) -> list[float]:
    return [run["average_accuracy"] for run in arm["runs"] if not run["diverged"]]


def _interval(d: Paired) -> str:
    if d.n < 3:
        return "–" if not d.n else f"{100 * d.mean:+.2f}"
    return f"{100 * d.mean:+.2f} ({100 * d.low:+.2f}…{100 * d.high:+.2f})"


def _p(d: Paired) -> str:
    return "–" if d.n < 3 else f"{d.p:.2g}"


def _pairs(studies: list[dict[str, Any]]) -> dict[str, tuple[list[float], float, float]]:
    found = {}
    for study in studies:
        first, second = (arm["runs"] for arm in study["arms"][:2])
        d = _against(*study["arms"][:2])
        values = [
            100 * (b["average_accuracy"] - a["average_accuracy"])
            for a, b in zip(first, second, strict=True)
            if not (a["diverged"] or b["diverged"])
        ]
        found[study["name"]] = values, 100 * d.low, 100 * d.high
    return found
