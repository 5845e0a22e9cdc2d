import io
import re

from rich.console import Console

from distcl.cli.display import LiveDisplay, PlainDisplay, open_display, show_summary


def console(width=80, terminal=False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system=None), file


def test_plain_lines_are_rare_and_one_ends_each_round():
    target, file = console()
    now = 0.0
    display = PlainDisplay(target, every=5.0, clock=lambda: now)
    for title in ("round 1", "round 2"):
        display.round_begins(title, 100)
        for done in range(1, 101):
            now += 0.125
            display.step(done, 0.5, 1234.5)
    assert file.getvalue().splitlines() == [
        f"round {number}  {done}/100  loss 0.5000  1,234 samples/s{left}"
        for number in (1, 2)
        for done, left in ((40, "  0:08 left"), (80, "  0:02 left"), (100, ""))
    ]


def test_time_left_counts_from_the_first_report():
    target, file = console()
    now = 0.0
    display = PlainDisplay(target, every=0.0, clock=lambda: now)
    display.round_begins("watching", 1000)
    now = 100.0
    display.step(500, 0.1, 0.0)
    now = 110.0
    display.step(600, 0.1, 0.0)
    assert file.getvalue().splitlines()[1] == "watching  600/1000  loss 0.1000  0:40 left"


def test_messages_are_printed_as_they_are():
    text = "[priority/cur] n=1437 min=0 [bold]" + "x" * 200
    for terminal in (False, True):
        target, file = console(terminal=terminal)
        display = open_display(target)
        display.message(text)
        display.close()
        assert text in file.getvalue()


def test_the_bar_shows_the_round_and_leaves_a_line_when_it_is_complete():
    target, file = console(width=100, terminal=True)
    display = open_display(target)
    assert isinstance(display, LiveDisplay)
    display.round_begins("round 3", 40)
    display.step(20, 0.25, 100.0)
    display._bar.refresh()
    display.step(40, 0.125, 100.0)
    display.close()
    display.close()
    shown = file.getvalue()
    assert re.search(r"round 3 .*20/40 +loss 0\.2500 +100 samples/s", shown)
    assert "round 3  40/40  loss 0.1250  100 samples/s" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


SUMMARY = {
    "seconds": 20.0,
    "accuracy": [[0.95, 0.5, None], [0.9, 0.96, 0.4], [0.85, 0.9, 0.975]],
    "average_accuracy": 0.9083,
    "average_forgetting": 0.08,
    "backward_transfer": -0.08,
    "forward_transfer": None,
    "drifts": [1437, 2874],
    "evaluate_seconds": 1.0,
    "pretrain": {"train_seconds": 4.0},
    "rounds": [
        {"round": 1, "train_seconds": 4.0, "priority_seconds": 2.5},
        {"round": 2, "train_seconds": 4.0, "priority_seconds": 2.5},
    ],
}


def test_the_summary_shows_matrix_metrics_drifts_and_times():
    target, file = console()
    show_summary(target, SUMMARY)
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ["pretrained", "95.0", "50.0", "-"] in lines
    assert ["round", "2", "85.0", "90.0", "97.5"] in lines
    text = " ".join(file.getvalue().split())
    assert "average accuracy 90.8 %" in text
    assert "backward transfer -8.0 points" in text
    assert "forward transfer" not in text
    assert "drifts at 1437, 2874" in text
    assert (
        "20.0 s: training 12.0 s (60%), priorities 5.0 s (25%), evaluation 1.0 s (5%), "
        "the rest 2.0 s (10%)" in text
    )


def test_a_regression_shows_r2_not_percent():
    target, file = console()
    rows = [[0.9, -0.25], [0.85, -1234.5]]
    show_summary(target, {**SUMMARY, "metric": "r2", "accuracy": rows, "rounds": [{"round": 1}]})
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ["R²;", "columns:", "experiences"] in lines
    assert ["pretrained", "0.900", "-0.250"] in lines
    assert ["round", "1", "0.850", "-1234"] in lines
    text = " ".join(file.getvalue().split())
    assert "average R² 0.908" in text and "backward transfer -0.080" in text
    assert "%" not in text.partition("time")[0] and "points" not in text


def test_a_wide_matrix_keeps_its_newest_columns():
    target, file = console(width=40)
    row = [j / 100 for j in range(20)]
    show_summary(target, {"accuracy": [row], "rounds": [{"round": 1}]})
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ["17", "18", "19", "20"] in lines
    assert ["round", "1", "16.0", "17.0", "18.0", "19.0"] in lines


def test_a_summary_of_detection_alone_is_shown():
    target, file = console()
    show_summary(target, {"accuracy": [], "rounds": [], "drifts": [5], "seconds": 1.0})
    assert "drifts at" in file.getvalue()
