"""What a person sees of a run: progress while it goes on, tables when it is done.

Nothing here decides anything; it reads ``types.Progress`` calls and the keys of ``summary.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from distcl.reporting.figures import (
    clock,
    figures_of,
    further_scores,
    row_names,
    stream_end,
    time_spent,
    untrained,
    words_in,
)

PLAIN_SECONDS = 5.0
"""Least time between two plain lines of one round."""

_CELL = 7  # characters of one column of the accuracy matrix
_NAMES = 12  # characters of its row names


@dataclass
class _Stage:
    """A part of the run in progress: a round, pretraining, or watching the stream."""

    title: str
    steps: int
    metric: str = "loss"
    done: int = 0
    value: float = float("nan")
    rate: float = 0.0
    first: tuple[int, float] | None = None
    left: float | None = None

    def update(self, done: int, value: float, rate: float, now: float) -> None:
        """Take a report; time left is judged by the pace since the first one of this stage."""
        self.done, self.value, self.rate = done, value, rate
        self.first = self.first or (done, now)
        since, begun = done - self.first[0], now - self.first[1]
        self.left = begun / since * (self.steps - done) if since > 0 and self.steps else None

    @property
    def complete(self) -> bool:
        return 0 < self.steps <= self.done

    @property
    def figures(self) -> str:
        text = f"{self.metric} {self.value:.4f}"
        if self.rate > 0:
            text += f"  {self.rate:,.0f} samples/s"
        if self.left is not None and not self.complete:
            text += f"  {clock(self.left)} left"
        return text

    def __str__(self) -> str:
        of = f"/{self.steps}" if self.steps else ""
        return f"{self.title}  {self.done}{of}  {self.figures}"


@contextmanager
def counting(what: str, quiet: bool, total: int = 0) -> Iterator[Callable[[str, int], None]]:
    """Show progress on stderr, if it is a terminal: call the result with (name, how many more)."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total or None)

        def tell(name: str, more: int) -> None:
            bar.update(task, advance=more, description=f"{what} {name}")

        yield tell


class PlainDisplay:
    """Lines for a pipe or a log: at most one each few seconds, and one at the end of a round."""

    def __init__(
        self,
        console: Console,
        every: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._every = every
        self._clock = clock
        self._stage = _Stage("", 0)
        self._shown = clock()

    def round_begins(self, title: str, steps: int, metric: str = "loss") -> None:
        """Begin a part of ``steps`` steps; nothing is printed yet."""
        self._stage = _Stage(title, steps, metric)

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        """Print a line if the part is complete or the last line is long enough ago."""
        now = self._clock()
        self._stage.update(done, value, samples_per_second, now)
        if self._stage.complete or now - self._shown >= self._every:
            self.message(str(self._stage))
            self._shown = now

    def message(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Do nothing: every line is out already."""


class LiveDisplay(PlainDisplay):
    """A progress bar on a terminal; rounds that are complete stay as lines above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, figures="", visible=False)
        self._bar.start()

    def round_begins(self, title: str, steps: int, metric: str = "loss") -> None:
        """Show an empty bar for a part of ``steps`` steps."""
        super().round_begins(title, steps, metric)
        self._bar.reset(
            self._task, total=steps or None, description=title, figures="", visible=True
        )

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        """Move the bar; a part that is complete becomes a line."""
        self._stage.update(done, value, samples_per_second, time.monotonic())
        self._bar.update(self._task, completed=done, figures=self._stage.figures)
        if self._stage.complete:
            self._bar.update(self._task, visible=False)
            self.message(str(self._stage))

    def close(self) -> None:
        """Take the bar away and give the cursor back. May be called twice."""
        self._bar.stop()


def open_display(console: Console) -> PlainDisplay:
    """Return a display that fits: a bar on a terminal, lines elsewhere."""
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console) if live else PlainDisplay(console)


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the tables of a finished run from the contents of ``summary.json``."""
    accuracy: Sequence[Sequence[float | None]] = summary.get("accuracy") or []
    console.print()
    if accuracy and accuracy[0]:
        words = words_in(summary)
        console.print(f"{words.label.replace(',', ' in')}; columns: experiences", highlight=False)
        fit = max((console.width - _NAMES) // _CELL, 1)
        first = max(0, len(accuracy[0]) - fit)  # the newest experiences, if not all fit
        marked = untrained(summary)
        table = Table(box=None, padding=(0, 0))
        table.add_column("", width=_NAMES)
        for column in range(first, len(accuracy[0])):
            mark = "*" if column in marked else ""
            table.add_column(f"{column + 1}{mark}", justify="right", width=_CELL)
        for name, row in zip(row_names(summary), accuracy, strict=True):
            table.add_row(name, *(words.number(value, unknown="-") for value in row[first:]))
        console.print(table)
        if first:
            console.print(f"experiences 1 to {first} are in summary.json", highlight=False)
        if marked:
            console.print("* never trained on: not in the averages", highlight=False)
    figures = Table.grid(padding=(0, 2))
    for name, *end in stream_end(summary):
        figures.add_row(name, " ".join(filter(None, end)))
    for name, value, unit, _ in figures_of(summary):
        figures.add_row(name, f"{value} {unit}".rstrip())
    for one in further_scores(summary):
        for name, value, unit, _ in figures_of(one)[:2]:  # its average, and what was forgotten
            of = "" if words_in(one).name in name else f" of {words_in(one).name}"
            figures.add_row(f"{name}{of}", f"{value} {unit}".rstrip())
    if drifts := summary.get("drifts"):
        figures.add_row("drifts at", ", ".join(map(str, drifts)))
    if spent := time_spent(summary):
        figures.add_row("time", spent)
    console.print(figures, highlight=False)
