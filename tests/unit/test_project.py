"""The project's outer shell: README, constraints and CI say the same."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from distcl import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def command(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```bash\n(.*)\n```\n<!-- end -->", README)
    assert found, f"README.md has no single-line {name}"
    return found[1]


def test_the_readme_commands_install_with_the_constraints():
    for name in ("main job command", "test command"):
        assert command(name).startswith("python3 -m venv .venv && ")
        assert " -c constraints.txt -e " in command(name)


def test_the_ci_script_runs_the_readme_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for name in ("main job command", "test command"):
        assert name in script
        assert command(name) not in script


def test_constraints_pin_all_that_is_required():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.]+", version), line
            pins[canonicalize_name(name)] = version
    todo = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name.startswith("nvidia-") or name == "triton":
            continue  # a CUDA build of torch pins them itself
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), requirement
        for extra in requirement.extras or {""}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                inside = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # not in this environment; .ci/run runs this test in one with all of them
            for inner in inside:
                marker = Requirement(inner).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    todo.append(inner)


@pytest.mark.parametrize(
    "kind", ["updater", "signal", "detector", "drift", "metric", "model", "loss"]
)
def test_every_part_is_described_among_the_methods(kind):
    text = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    for part in registry.parts(kind):
        if (kind, part.name) != ("drift", "none"):
            assert re.search(rf"^(#+ |\| `|- \*\*).*\b{part.name}\b", text, re.MULTILINE), part.name


def test_documents_link_to_files_that_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.timeout(60)
def test_the_look_around_commands_of_the_readme_work(tmp_path):
    """The first block of the quick tour, as written, from a copy of the configs."""
    block = re.search(r"```bash\nsource .venv/bin/activate\n(.*?)```", README, re.DOTALL)
    assert block
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = f'set -e\ndistcl() {{ "{sys.executable}" -m distcl "$@"; }}\n{block[1]}'
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my.toml").exists()


def test_every_promise_of_reliability_names_a_test_that_exists() -> None:
    from tests.faults.campaign import FAULTS

    text = (ROOT / "docs" / "RELIABILITY.md").read_text()
    named = re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?(?:\[([^\]]+)\])?`", text)
    assert len(named) > 20
    for file, function, fault in named:
        path = ROOT / (file if "/" in file else f"tests/faults/{file}")
        assert path.is_file(), file
        assert f"def {function}(" in path.read_text() or not function, function
        assert fault in FAULTS or not fault, fault
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and "promise" not in line
    ]
    assert all(".py" in line for line in promises)
