"""What is said when a solve fails: why, how far it came, and remedies, of which each is tried."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from ..helpers import first_of, left_to_nox


U = jnp.array([1.0, 0.0])


def oscillator(t, u, args):
    return jnp.stack([u[1], -u[0]])


def robertson(t, u, args):
    slow, fast, back = 0.04 * u[0], 3e7 * u[1] ** 2, 1e4 * u[1] * u[2]
    return jnp.stack([back - slow, slow - back - fast, fast])


def stiff(t, u, args):
    return -1e5 * (u - jnp.cos(t))


def jump(t, u, args):
    return jnp.where(t < 0.25, 0.0, 1000.0)


def rough_start(t, u, args):
    return 1 + jnp.sqrt(jnp.abs(u))


def square(t, u, args):
    return u**2


def solver(f, nu=2, *, constraint=po.TS0, prior=None, steps=200, **parts):
    parts = {"loop": po.ForwardLoop(steps), **parts}
    return po.Solver(po.IWP(nu) if prior is None else prior, constraint(po.ODE(f)), **parts)


def control(*tolerances, **limits):
    return po.IntegralController(*tolerances, **limits)


# what fails, what must be said, and the same with the remedy
CASES = {
    "another-method": (
        lambda: solver(stiff).solve(0.0, 0.0, 10.0),
        r"It reached t = 0\.000\d+ of \[0, 10\] in 200 attempts, \d+ of them rejected\. At this pace t1 is 3e\+06 "
        r'attempts away.*TS1 in place of TS0 \(method="EK1"\)',
        lambda: solver(stiff, constraint=po.TS1).solve(0.0, 0.0, 10.0),
    ),
    "more-derivatives": (
        lambda: solver(oscillator, 1, constraint=po.TS1, controller=control(1e-6, 1e-6)).solve(U, 0.0, 5.0),
        r"rtol=1e-06 is tight for num_derivatives=1: 3 makes the steps longer",
        lambda: solver(oscillator, 3, constraint=po.TS1, controller=control(1e-6, 1e-6)).solve(U, 0.0, 5.0),
    ),
    "a-scale-for-each": (
        lambda: solver(robertson, 4, constraint=po.TS1, steps=300).solve(jnp.array([1.0, 0, 0]), 0.0, 1e11),
        r"differ in size by orders of magnitude: prior=RelativeScale\(IWP\(4\)\)",
        lambda: solver(robertson, constraint=po.TS1, prior=po.RelativeScale(po.IWP(4)), steps=300).solve(
            jnp.array([1.0, 0, 0]), 0.0, 1e11
        ),
    ),
    "the-longest-step": (
        lambda: solver(oscillator, controller=control(dt_max=1e-3)).solve(U, 0.0, 5.0),
        r"as long as dt_max=0\.001 allows: raise it",
        lambda: solver(oscillator, controller=control(dt_max=1.0)).solve(U, 0.0, 5.0),
    ),
    "the-shortest-step": (
        lambda: solver(oscillator, controller=control(1e-5, 1e-5, dt_min=0.5)).solve(U, 0.0, 1.0),
        r"allowed is dt_min=0\.5: lower it\. throw=False",
        lambda: solver(oscillator, controller=control(1e-5, 1e-5, dt_min=1e-5)).solve(U, 0.0, 1.0),
    ),
    "another-error-estimate": (
        lambda: solver(oscillator, error=po.ResidualError(), steps=120, controller=control(1e-3, 1e-3)).solve(
            U, 0.0, 20.0
        ),
        r"error=ResidualError\(\) is stricter than the tolerance: error=StateError\(\) makes",
        lambda: solver(oscillator, error=po.StateError(), steps=120, controller=control(1e-3, 1e-3)).solve(
            U, 0.0, 20.0
        ),
    ),
    "an-unknown-derivative": (
        # An equation that gives its derivatives needs them at the start.
        lambda: solver(rough_start, constraint=lambda ode: po.TS1(ode.lifted(1))).solve(0.0, 0.0, 3.0),
        r"did not start.*no derivative of order 1 at \(t0, u0\)\. initialisation=Diffuse\(1\)(?!.*It reached)",
        lambda: solver(rough_start, constraint=lambda ode: po.TS1(ode.lifted(1)), initialisation=po.Diffuse(1)).solve(
            0.0, 0.0, 3.0
        ),
    ),
    "a-field-that-is-infinite": (
        lambda: solver(lambda t, u, args: u / t).solve(1.0, 0.0, 1.0),
        r"The vector field is infinite or NaN at \(t0, u0\): start where it is finite",
        lambda: solver(lambda t, u, args: u / t).solve(1.0, 0.5, 1.0),
    ),
    "u0-nan": (
        lambda: solver(oscillator).solve(U.at[1].set(jnp.nan), 0.0, 1.0),
        r"u0 itself is infinite or NaN, in the component 1",
        lambda: solver(oscillator).solve(U, 0.0, 1.0),
    ),
    "a-blow-up": (
        lambda: solver(square, steps=2000).solve(1.0, 0.0, 2.0),
        r"u has grown to \d\.\de\+1\d, and seems to blow up there: shorten the interval, to a t1 clearly before 1\.000",
        lambda: solver(square, steps=2000).solve(1.0, 0.0, 0.99),
    ),
    "a-domain": (
        lambda: solver(lambda t, u, args: -jnp.sqrt(u)).solve(1.0, 0.0, 3.0),
        r"to a t1 clearly before 2\.00\d*\. Or it leaves the domain of the vector field: guard that with jnp\.where",
        lambda: solver(lambda t, u, args: -jnp.sqrt(u)).solve(1.0, 0.0, 1.9),
    ),
    "a-scale-that-follows": (
        lambda: solver(jump, 4, constraint=po.TS1, calibration=po.MLECalibration()).solve(0.0, 0.0, 1.0),
        r"scale does not explain.*calibration=DynamicCalibration\(\).*in place of MLECalibration\(\)",
        lambda: solver(jump, 4, constraint=po.TS1).solve(0.0, 0.0, 1.0),
    ),
    "a-jump-that-is-named": (
        lambda: solver(jump, 4, constraint=po.TS1, calibration=po.NoCalibration()).solve(0.0, 0.0, 1.0),
        r"name the times of jumps with controller=IntegralController\(stop_at=\[\.\.\.\]\)",
        lambda: solver(
            jump, 4, constraint=po.TS1, calibration=po.NoCalibration(), controller=control(stop_at=[0.25])
        ).solve(0.0, 0.0, 1.0),
    ),
    "a-larger-tolerance": (
        lambda: solver(oscillator, controller=control(1e-3, 0.0)).solve(1e-150 * U, 0.0, 1.0),
        r"units of u, or a larger atol: controller=IntegralController\(atol=\.\.\.\)",
        lambda: solver(oscillator, controller=control(1e-3, 1e-6)).solve(1e-150 * U, 0.0, 1.0),
    ),
}


@pytest.mark.parametrize("case", first_of(*CASES))
def test_what_is_said_helps(case):
    if jnp.zeros(()).dtype == jnp.float32 and case in ("a-scale-for-each", "a-larger-tolerance", "a-blow-up"):
        pytest.skip("numbers of double precision")
    fails, message, helped = CASES[case]
    with pytest.raises(RuntimeError) as caught:
        fails()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "throw=False returns what was reached." in str(caught.value) and "\n" not in str(caught.value)
    assert helped().result == po.Result.successful


@pytest.mark.parametrize(("steps", "span"), first_of((120, (30.0, 0.0)), (2, (0.0, 10.0)), (60, (0.0, 10.0))))
def test_the_number_of_steps_that_is_named_is_enough(steps, span):
    with pytest.raises(RuntimeError) as caught:
        solver(oscillator, steps=steps).solve(U, *span)
    said = re.search(r"loop=ForwardLoop\(max_steps=(\d+)\)", str(caught.value))
    assert said is not None, str(caught.value)
    solution = solver(oscillator, steps=int(said[1])).solve(U, *span)
    assert steps < solution.stats["num_steps"] <= int(said[1])
    assert int(said[1]) <= max(4096, 8 * int(solution.stats["num_steps"])), "not many times too many"


def failing(u0):
    return solver(square).solve(u0, 0.0, 2.0).mean


REASON = r"max_steps attempts were made before t1\. It reached t = 1\.0\d* of \[0, 2\] in 200 attempts"


@pytest.mark.parametrize("compiled", [jax.jit, eqx.filter_jit], ids=["jit", "filter_jit"])
def test_a_compiled_program_says_why_in_three_lines(compiled):
    with pytest.raises((RuntimeError, ValueError)) as caught:  # the second one where JAX has run it beside Python
        jax.block_until_ready(compiled(failing)(jnp.asarray(1.0)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[-1].startswith("RuntimeError: The solve stopped because")
    assert re.search(REASON, lines[-1])
    for junk in ("JAX_DISABLE_JIT", "EQX_ON_ERROR", __file__):
        assert junk not in str(caught.value)


@pytest.mark.parametrize(
    ("transformed", "lane"),
    [
        (jax.vmap(failing), r"\(In lane 1; 1 of 2 lanes failed\.\)$"),
        (lambda u0s: jax.jit(jax.vmap(failing))(u0s), r"\(In lane 1; 1 of 2 lanes failed\.\)$"),
        *left_to_nox(
            (lambda u0s: jax.vmap(jax.vmap(failing))(u0s[None]), r"\(In lane \(0, 1\); 1 of 2 lanes failed\.\)$"),
            (lambda u0s: jax.jvp(failing, (u0s[1],), (1.0,)), r"what was reached\.$"),
            (lambda u0s: jax.vmap(jax.jacfwd(failing))(u0s), r"\(In lane 1; 1 of 2 lanes failed\.\)$"),
        ),
    ],
    ids=["vmap", "jit-vmap", "vmap-vmap", "jvp", "vmap-jacfwd"],
)
def test_transformations_say_which_lane_and_why(transformed, lane):
    with pytest.raises((RuntimeError, ValueError)) as caught:  # the second one where JAX has run it beside Python
        jax.block_until_ready(transformed(jnp.array([0.1, 1.0])))
    said = str(caught.value)
    assert re.search(REASON, said) and re.search(lane, said), said
    # Outside of a compiled program there is nothing else.
    assert said.startswith("The solve stopped because") or len(said.splitlines()) == 3


@pytest.mark.thorough
def test_nothing_is_said_of_a_solve_that_succeeds():
    u0s = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(jax.jit(jax.vmap(failing))(u0s)[:, 0], u0s / (1 - 2 * u0s), rtol=1e-2)
    slope = jax.jit(jax.jacfwd(failing))(0.1)
    np.testing.assert_allclose(slope, 1 / 0.8**2, rtol=1e-2)


def test_equinox_decides_what_errors_are_where_it_was_told_to(monkeypatch):
    monkeypatch.setenv("EQX_ON_ERROR", "off")  # what equinox itself does was read when it was imported
    with pytest.raises((RuntimeError, ValueError), match="EQX_ON_ERROR"):
        jax.block_until_ready(eqx.filter_jit(lambda u0: failing(u0))(jnp.asarray(1.0)))
