"""Every public name has an example in its docstring, and it does what it says."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import pytest

import probode

from .helpers import left_to_nox
from .test_architecture import public_names


# Examples that take long to compile.
LONG = {"AbstractController", "Attempt", "CheckReport", "Finding", "Fit", "Modal", "Occurrences"}
LONG |= {"dalton_log_likelihood", "data_distribution", "fit", "marginalise", "solve_bvp", "solve_periodic"}


@pytest.mark.parametrize("name", [*sorted(set(public_names()) - LONG), *left_to_nox(*sorted(LONG))])
def test_the_example_runs(name):
    value = getattr(probode, name)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(value, name, module=False, globs={"jax": jax, "jnp": jnp, "probode": probode})
    assert test.examples, f"{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    out = []
    assert runner.run(test, out=out.append).failed == 0, "".join(out)


def test_the_kit_has_one_too():
    (test,) = doctest.DocTestFinder(recurse=False).find(probode.testing, "testing", globs={})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
    assert jax.config.jax_enable_x64 and inspect.ismodule(probode.testing)
