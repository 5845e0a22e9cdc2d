import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from distcl.errors import UsageError
from distcl.reporting import run_reader
from distcl.reporting.page import write_report
from tests.folders import run_folder
from tests.forked import distcl

PLOTS = ["accuracy", "forgetting", "watched", "loss", "weights-cur", "most-drawn", "time"]


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_a_report_has_every_plot_as_svg_and_as_png(tmp_path):
    folder = run_folder(tmp_path / "a")
    pictures = write_report([folder], tmp_path / "out" / "r.html", tmp_path / "png")
    page = (tmp_path / "out" / "r.html").read_text()
    names = [f"01-a-{name}" for name in PLOTS]
    assert re.findall(r'<figure class="card" id="([^"]*)"', page) == names
    assert page.count("<svg") == len(names)
    assert [path.name for path in pictures] == [f"{name}.png" for name in names]
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 500 and (pixels < 200).mean() > 0.005, path.name
    text = text_of(page)
    for shown in ("73.3 %", "7.5 points", "drift at 400", "2 drifts detected", "×20"):
        assert shown in text, shown


def test_a_report_asks_nothing_of_the_network(tmp_path):
    write_report([run_folder(tmp_path / "a")], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    addresses = set(re.findall(r"https?://[^\"'\s)]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    sources = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page)
    assert sources == [] and "<script" not in page and "url(http" not in page


def test_colours_of_plots_are_left_to_the_page(tmp_path):
    from distcl.reporting.plots import COLORS

    write_report([run_folder(tmp_path / "a")], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    drawn = page[page.index("<body>") :]
    assert not any(light in drawn for light, _ in COLORS.values())
    assert "var(--ink)" in drawn and "prefers-color-scheme: dark" in page


def test_ids_of_the_page_are_unique(tmp_path):
    write_report([run_folder(tmp_path / "a"), run_folder(tmp_path / "b")], tmp_path / "r.html")
    ids = re.findall(r'\bid="([^"]*)"', (tmp_path / "r.html").read_text())
    assert len(ids) == len(set(ids))


def test_names_from_folders_and_configs_are_text_not_markup(tmp_path):
    folder = run_folder(tmp_path / "<script>alert(1)<b")
    write_report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page and 'id="01--script-alert-1-b-accuracy"' in page


def test_runs_are_grouped_by_what_differs_besides_the_seed(tmp_path):
    folders = [
        run_folder(tmp_path / f"{alpha}-{seed}", seed=seed, alpha=alpha, shift=shift)
        for alpha, seed, shift in ((0.0, 0, 0.0), (0.0, 1, 0.02), (1.0, 0, 0.1), (1.0, 1, 0.12))
    ]
    found = run_reader.variants([run_reader.read_run(folder) for folder in folders])
    assert {name: [r.name for r in group] for name, group in found.items()} == {
        "importance_alpha = 0.0": ["0.0-0", "0.0-1"],
        "importance_alpha = 1.0": ["1.0-0", "1.0-1"],
    }
    write_report(folders, tmp_path / "r.html")
    text = text_of((tmp_path / "r.html").read_text())
    assert "importance_alpha = 0.0 2 74.3 ± 1.4" in text  # 73.3 and 75.3
    assert "importance_alpha = 1.0 2 84.3 ± 1.4" in text


def test_runs_that_differ_in_many_keys_are_named_by_their_folders(tmp_path):
    folders = [run_folder(tmp_path / name / "same") for name in ("a", "b")]
    folders.append(run_folder(tmp_path / "other"))
    for k, folder in enumerate(folders):
        keys = "".join(f"key_of_a_long_name_{n} = {k}\n" for n in range(6))
        with (folder / "config.toml").open("a") as config:
            config.write(f"[more]\n{keys}")
    found = run_reader.variants([run_reader.read_run(folder) for folder in folders])
    assert list(found) == ["same", str(folders[1]), "other"]


def test_a_run_that_is_not_over_is_shown_as_far_as_it_went(tmp_path):
    folder = run_folder(tmp_path / "a", state="running")
    write_report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert 'id="01-a-accuracy"' in page and 'id="01-a-time"' not in page
    done = run_reader.read_run(run_folder(tmp_path / "b"))
    assert run_reader.read_run(folder).accuracy == done.accuracy
    assert (
        run_reader.read_run(folder).row_names
        == done.row_names
        == ["pretrained", "round 1", "round 2"]
    )
    write_report([folder, tmp_path / "b"], tmp_path / "r.html")
    assert "Not over, so not counted: a (running)" in text_of((tmp_path / "r.html").read_text())


def test_many_rounds_and_experiences_fit(tmp_path):
    folder = run_folder(tmp_path / "a", rounds=40)
    summary = json.loads((folder / "summary.json").read_text())
    summary["accuracy"] = np.random.default_rng(0).random((41, 40)).tolist()
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report([folder], tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b"[1]", r"summary\.json' is not a JSON object"),
        ("config.toml", b"= 1", r"config\.toml' cannot be read"),
        ("draws/round-0001.npz", b"PK\x03\x04", r"round-0001\.npz' cannot be read"),
        ("metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl' cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    folder = run_folder(tmp_path / "a")
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        write_report([folder], tmp_path / "r.html")


def test_pickled_arrays_are_refused(tmp_path):
    folder = run_folder(tmp_path / "a")
    arrays = {name: np.array([{}], dtype=object) for name in ("ids", "counts")}
    np.savez(folder / "draws" / "round-0001.npz", **arrays)
    with pytest.raises(UsageError, match=r"round-0001\.npz' cannot be read: Object arrays"):
        write_report([folder], tmp_path / "r.html")


def test_the_commands_say_what_they_wrote_and_what_is_wrong(tmp_path):
    folder = run_folder(tmp_path / "a")
    done = distcl("report", str(folder), "--png", str(tmp_path / "png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {folder}/report.html and 7 PNG files in {tmp_path}/png\n"
    missing = distcl("report", str(tmp_path / "absent"))
    assert missing.returncode == 2 and "is not a run folder" in missing.stderr
    status = distcl("status", str(folder), "--json")
    assert status.returncode == 0 and json.loads(status.stdout)["state"] == "done"


def test_status_and_help_need_neither_torch_nor_matplotlib(tmp_path):
    folder = run_folder(tmp_path / "a")
    code = (
        "import sys; from distcl.cli import app as cli; sys.argv = ['distcl', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    for arguments in (["--help"], ["status", str(folder)], ["report", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_r2_is_no_percentage_in_the_report_of_several_runs(tmp_path):
    folders = []
    for seed in (0, 1):
        folders.append(run_folder(tmp_path / f"r{seed}", seed=seed))
        found = json.loads((folders[-1] / "summary.json").read_text())
        (folders[-1] / "summary.json").write_text(json.dumps(found | {"metric": "r2"}))
    write_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "accuracy" not in re.sub(r'(id|aria-label|href|clip-path)="[^"]*"', "", text).lower()
    assert "points" not in text and "average R²" in text and "R² forgotten" in text


def test_the_words_of_the_guard_are_in_the_report(tmp_path):
    folder = run_folder(tmp_path / "a")
    found = json.loads((folder / "summary.json").read_text())
    words = "sampling by priority is likely to hurt: <aim>"
    found["rounds"][1]["guard"] = {"uniform": False, "words": words}
    (folder / "summary.json").write_text(json.dumps(found))
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Guard, round 2: sampling by priority is likely to hurt: &lt;aim&gt;." in page
