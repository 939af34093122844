"""The README's code runs, and its commands are those of the continuous integration."""

import pathlib
import re
import subprocess
import sys


ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_tour_runs():
    assert len(blocks("python")) >= 6
    script = "\n".join(blocks("python"))
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=ROOT)


def test_there_are_two_commands_and_ci_runs_the_second():
    run, test = blocks("bash")
    assert "examples/quickstart.py" in run
    assert test.strip().split("&& ")[-1] in (ROOT / ".ci" / "run").read_text()


def test_examples_run(tmp_path):
    picture = tmp_path / "picture.png"
    quickstart = [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(picture)]
    table = subprocess.run(quickstart, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert len(re.findall(r"\+-", table)) == 14
    assert picture.stat().st_size > 10_000
    reverse_mode = [sys.executable, str(ROOT / "examples" / "reverse_mode.py")]
    out = subprocess.run(reverse_mode, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "BoundedLoop" in out
    value = float(re.search(r"bounded loop: ([\d.]+)", out)[1])
    gradient = [float(x) for x in re.search(r"mean of \(u, u'\): ([\d.]+), ([\d.]+)", out).groups()]
    assert abs(value - 0.023921324) < 1e-5
    assert abs(gradient[0] - 0.4402384) < 1e-5 and abs(gradient[1] - 0.02346068) < 1e-5
