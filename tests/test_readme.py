"""The README's code runs, and its commands are those of the continuous integration."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from .helpers import left_to_nox


ROOT = pathlib.Path(__file__).parent.parent
READMES = sorted(
    path
    for folder in (".", ".github", "benchmarks", "examples", "probode", "tests")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def blocks(language, readme=ROOT / "README.md"):
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), re.DOTALL)


def run(command, **settings):
    """What a script prints; compiled quickly and drawn nowhere."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "MPLBACKEND": "agg"} | settings
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITH_CODE = [path for path in READMES if blocks("python", path)]
SHORT = [ROOT / "README.md"]


@pytest.mark.parametrize(
    "path",
    [*SHORT, *left_to_nox(*(path for path in WITH_CODE if path not in SHORT))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_code_runs(path):
    run(["-W", "error", "-c", "\n".join(blocks("python", path))])


def test_the_front_door_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            titles = [
                re.sub(r"[^\w -]", "", t).strip().lower() for t in re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            ]
            assert anchor in [title.replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_text_of_an_example_is_in_cells(path):
    # What stands behind the marker is not shown in a notebook, and titles are lines of their own.
    cells = [line for line in path.read_text().splitlines() if line.startswith("# %%")]
    assert cells and set(cells) <= {"# %%", "# %% [markdown]"}


def test_there_are_two_commands_and_ci_runs_the_second():
    run, test = blocks("bash")
    assert "examples/quickstart.py" in run
    assert test.strip().split("&& ")[-1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.thorough
def test_the_main_job(tmp_path):
    picture = tmp_path / "picture.png"
    table = run(["examples/quickstart.py", str(picture)])
    assert len(re.findall(r"\+-", table)) == 14
    assert picture.stat().st_size > 10_000


@pytest.mark.thorough
def test_reverse_mode():
    out = run(["examples/reverse_mode.py"])
    assert "BoundedLoop" in out
    value = float(re.search(r"bounded loop: ([\d.]+)", out)[1])
    gradient = [float(x) for x in re.search(r"mean of \(u, u'\): ([\d.]+), ([\d.]+)", out).groups()]
    assert abs(value - 0.023921324) < 1e-5
    assert abs(gradient[0] - 0.4402384) < 1e-5 and abs(gradient[1] - 0.02346068) < 1e-5


EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"quickstart", "reverse_mode"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_run_at_small_size(name):
    """At full size: `nox -s examples`."""
    assert run([f"examples/{name}.py"], PROBODE_SMALL="1")
