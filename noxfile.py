"""Sessions: ``nox -s lint tests tests_nohook tests_float32 examples``; ``nox --list`` names all of them."""

import pathlib
import re
import shutil

import nox


EXAMPLES = sorted(pathlib.Path("examples").glob("*.py"))
PYTHONS = ["3.11", "3.12", "3.13"]

nox.options.sessions = ["lint", "tests", "tests_nohook", "tests_float32", "examples"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session):
    """Style, formatting, and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session):
    """The test suite, with jaxtyping's import hook and beartype checking every annotation."""
    session.install("-e", ".[test,examples]")
    session.run("pytest", "-m", "", *session.posargs)


@nox.session
def tests_nohook(session):
    """The test suite as users run the package: without run-time type checks, compiled with all optimisations."""
    session.install("-e", ".[test,examples]")
    optimised = {"PROBODE_TEST_OPTIMISED": "1"}
    session.run("pytest", "-o", "addopts=-n 2 --dist worksteal", *session.posargs, env=optimised)


@nox.session
def tests_float32(session):
    """JAX's default precision: the tests written for it, with double precision switched off."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/test_float32.py", *session.posargs, env={"PROBODE_TEST_FLOAT32": "1"})


@nox.session(python=PYTHONS)
def wheel(session):
    """The test suite against the wheel that is built from the source distribution, away from the package's source."""
    session.install("build", "twine")
    here, there = pathlib.Path().resolve(), pathlib.Path(session.create_tmp()).resolve()
    shutil.rmtree(there)
    session.run("python", "-m", "build", "--outdir", str(there / "dist"), silent=True)
    session.run("twine", "check", "--strict", *map(str, (there / "dist").iterdir()))
    [built] = (there / "dist").glob("*.whl")
    session.install("--force-reinstall", "--no-deps", str(built))
    session.install(f"probode[test] @ {built.as_uri()}")

    # All that the tests look at but the package, in whose place a copy of the installed one stands.
    nothing = shutil.ignore_patterns(
        "probode", ".*cache", ".git", ".nox", ".venv", ".hypothesis", "site", "__pycache__"
    )
    shutil.copytree(here, there / "checkout", ignore=nothing)
    where = "import pathlib, probode; print(pathlib.Path(probode.__file__).parent)"
    installed = pathlib.Path(session.run("python", "-I", "-c", where, silent=True).strip().splitlines()[-1])
    assert here / "probode" != installed, "the package under test is that of the checkout"
    shutil.copytree(installed, there / "checkout" / "probode")
    with session.chdir(there / "checkout"):
        session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
@nox.parametrize("which", ["lowest", "newest"])
def versions(session, which):
    """The test suite with the lowest, and with the newest, versions of what the package needs."""
    needed = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    lowest = [re.sub(r">=([0-9.]+).*", r"==\1", requirement) for requirement in needed]
    session.install("-e", ".[test]", *(lowest if which == "lowest" else ["--upgrade", *needed]))
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *session.posargs)


@nox.session
def examples(session):
    """Every example runs."""
    session.install("-e", ".[examples]")
    for script in EXAMPLES:
        session.run("python", str(script), env={"MPLBACKEND": "agg"})


@nox.session
def notebooks(session):
    """Every example as a notebook, executed in a Jupyter kernel; the results are in the session's directory."""
    session.install("-e", ".[notebooks]")
    for script in EXAMPLES:
        notebook = pathlib.Path(session.create_tmp()) / f"{script.stem}.ipynb"
        session.run("jupytext", "--to", "ipynb", "-o", str(notebook), str(script))
        session.run("jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(notebook))


@nox.session
def benchmarks(session):
    """The quick benchmark against the peers."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["--quick"]))


@nox.session
def docs(session):
    """The site of the documentation, in `site/`; `nox -s docs -- --quick` does not execute the guides."""
    session.install("-e", ".[docs]")
    session.run("python", ".docs/build.py", *session.posargs)
