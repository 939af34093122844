"""Sessions: ``nox -s lint tests tests_nohook tests_float32 examples benchmarks``."""

import pathlib

import nox


EXAMPLES = sorted(pathlib.Path("examples").glob("*.py"))

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
