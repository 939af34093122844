"""Step-size rules against their formulas in plain Python; what a controller must survive."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


CONTROLLERS = (po.IntegralController, po.PIController)
controllers = pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: c.__name__)

propose = jax.jit(
    lambda controller, dt, norm, order, state: controller.propose(dt, norm, order, state), static_argnums=3
)


def run(controller, norms, order, dt=1.0, dtype=jnp.float64):
    """The sequence of decisions and proposals from a sequence of error norms."""
    dt, state, out = jnp.asarray(dt, dtype), controller.init(dtype), []
    for norm in norms:
        accept, dt, state = propose(controller, dt, jnp.asarray(norm, dtype), order, state)
        out.append((bool(accept), float(dt)))
    return out


def clip(x, low, high):
    return min(max(x, low), high)


def integral_rule(norms, order, dt=1.0, safety=0.95, factor_min=0.2, factor_max=10.0):
    """After an accepted step the larger of the last two accepted errors counts."""
    out, previous = [], 0.0
    for norm in norms:
        counts = max(norm, previous) if norm <= 1 else norm
        dt *= clip(safety * counts ** (-1 / order), factor_min, factor_max)
        out.append((norm <= 1, dt))
        previous = norm if norm <= 1 else previous
    return out


def pi_rule(norms, order, integral, proportional, dt=1.0, safety=0.95, factor_min=0.2, factor_max=10.0):
    """Gustafsson's rule, in error norms: ``norm^(-(a + b) / order) previous^(b / order)``."""
    out, previous = [], 1.0
    for norm in norms:
        factor = safety * norm ** (-(integral + proportional) / order) * previous ** (proportional / order)
        dt *= clip(factor, factor_min, factor_max)
        out.append((norm <= 1, dt))
        previous = norm if norm <= 1 else previous
    return out


def assert_same(got, want, rtol=1e-12):
    assert [accept for accept, _ in got] == [accept for accept, _ in want]
    np.testing.assert_allclose([dt for _, dt in got], [dt for _, dt in want], rtol=rtol)


# Norms from far too good to far too bad, both sides of one.
sequences = st.lists(st.floats(-6, 4).map(lambda x: 10**x), min_size=1, max_size=5)
orders = st.sampled_from([2, 4, 9])


@hypothesis.given(sequences, orders)
def test_integral_rule(norms, order):
    assert_same(run(po.IntegralController(), norms, order), integral_rule(norms, order))


@hypothesis.given(sequences, orders, st.sampled_from([(0.3, 0.4), (0.7, 0.4), (1.0, 0.0), (0.0, 1.0)]))
def test_proportional_integral_rule(norms, order, exponents):
    integral, proportional = exponents
    controller = po.PIController(integral=integral, proportional=proportional)
    assert_same(run(controller, norms, order), pi_rule(norms, order, integral, proportional))


@hypothesis.given(sequences, orders)
def test_pi_without_proportional_part_is_integral_control_without_memory(norms, order):
    pi, integral = run(po.PIController(integral=1.0, proportional=0.0), norms, order), po.IntegralController()
    dt = 1.0
    for norm, (accept, after) in zip(norms, pi, strict=True):
        assert_same([(accept, after / dt)], run(integral, [norm], order))
        dt = after


def test_defaults_are_the_documented_ones():
    pi = po.PIController()
    assert (float(pi.integral), float(pi.proportional)) == (0.3, 0.4)
    for controller in (pi, po.IntegralController()):
        numbers = (controller.rtol, controller.atol, controller.safety, controller.factor_min, controller.factor_max)
        assert tuple(map(float, numbers)) == (1e-3, 1e-6, 0.95, 0.2, 10.0)
        limits = controller.limits
        assert (limits.shortest, limits.longest, limits.stops.size) == (0, np.inf, 0)


@controllers
def test_settings_are_used(controller):
    settings = {"safety": 0.5, "factor_min": 0.3, "factor_max": 2.0}
    norms = [0.9, 1e-9, 3.0, 1e9]
    want = integral_rule(norms, 4, **settings)
    if controller is po.PIController:
        want = pi_rule(norms, 4, 0.3, 0.4, **settings)
    assert_same(run(controller(**settings), norms, 4), want)


@controllers
@pytest.mark.parametrize("order", [2, 6, 12])
def test_the_factor_is_clipped(controller, order):
    (accept_good, grown), (accept_bad, shrunk) = (run(controller(), [norm], order)[0] for norm in (0.0, np.inf))
    assert accept_good and not accept_bad
    np.testing.assert_allclose([grown, shrunk], [10.0, 0.2], rtol=1e-12)


@controllers
def test_not_a_number_is_rejected_and_shrinks_the_step(controller):
    (accept, dt), (accept_after, dt_after) = run(controller(), [np.nan, 0.5], 4)
    assert not accept
    np.testing.assert_allclose(dt, 0.2, rtol=1e-12)
    # It leaves no trace.
    assert accept_after
    np.testing.assert_allclose(dt_after / dt, run(controller(), [0.5], 4)[0][1], rtol=1e-12)


@controllers
def test_the_border_belongs_to_the_accepted(controller):
    above = np.nextafter(1.0, 2.0)
    assert [accept for accept, _ in run(controller(), [1.0, above], 4)] == [True, False]


@controllers
@hypothesis.given(norm=st.floats(1.0, 1e6, exclude_min=True), previous=st.floats(1e-6, 1.0), order=orders)
def test_a_rejected_step_shrinks(controller, norm, previous, order):
    # Whatever was accepted before: otherwise the same attempt is made for ever.
    (_, before), (accept, after) = run(controller(), [previous, norm], order)
    assert not accept
    assert after < before


def test_one_small_error_is_no_reason_to_grow():
    (_, first), (_, second), (_, third) = run(po.IntegralController(), [0.9, 1e-4, 1e-4], 4)
    assert second < first and third > 5 * second


def test_only_accepted_steps_are_remembered():
    controller = po.PIController()
    order, accepted, rejected, last = 4, 0.2, 30.0, 0.5
    with_rejection = run(controller, [accepted, rejected, last], order)
    without = run(controller, [accepted, last], order)
    np.testing.assert_allclose(with_rejection[2][1] / with_rejection[1][1], without[1][1] / without[0][1], rtol=1e-12)
    # The memory matters: without it the factor is another one.
    alone = run(controller, [last], order)[0][1]
    assert abs(alone / (without[1][1] / without[0][1]) - 1) > 0.05


@controllers
def test_zero_residuals_one_after_the_other(controller):
    # A constant vector field: steps grow and stay finite.
    out = run(controller(), [0.0] * 4, 6)
    steps = [1.0] + [dt for _, dt in out]
    assert all(accept for accept, _ in out)
    assert all(math.isfinite(b) and b > a for a, b in itertools.pairwise(steps))


@controllers
@pytest.mark.parametrize("norm", [0.0, 0.3, 7.0, np.inf])
def test_single_precision_stays_single(controller, norm):
    c = controller()
    accept, dt, state = propose(
        c, jnp.asarray(0.1, jnp.float32), jnp.asarray(norm, jnp.float32), 5, c.init(jnp.float32)
    )
    assert dt.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    want_accept, want = run(c, [norm], 5, dt=0.1)[0]
    assert bool(accept) == want_accept
    np.testing.assert_allclose(dt, want, rtol=1e-6)


@controllers
def test_state_has_one_structure(controller):
    # A loop carries it.
    c = controller()
    state = c.init(jnp.float64)
    _, _, new = c.propose(jnp.asarray(0.1), jnp.asarray(0.5), 3, state)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape


@controllers
def test_values_are_leaves(controller):
    # Tolerances may be swept without a new compilation.
    one, two = controller(rtol=1e-3, safety=0.9), controller(rtol=1e-5, safety=0.8)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    out = jax.vmap(lambda rtol: controller(rtol=rtol).rtol * 2)(jnp.asarray([1e-3, 1e-4]))
    np.testing.assert_allclose(out, [2e-3, 2e-4])


WRONG = {
    "negative rtol": {"rtol": -1e-3},
    "negative atol": {"atol": -1e-3},
    "both zero": {"rtol": 0.0, "atol": 0.0},
    "nan": {"rtol": float("nan")},
    "infinite": {"atol": float("inf")},
    "no safety": {"safety": 0.0},
    "unsafe": {"safety": 1.1},
    "shrinking growth": {"factor_max": 1.0},
    "growing shrinkage": {"factor_min": 1.0},
    "no shrinkage": {"factor_min": 0.0},
    "dt_min": {"dt_min": 0.0},
    "dt_max": {"dt_max": -1.0},
    "dt_min above dt_max": {"dt_min": 1.0, "dt_max": 0.5},
    "scalar stop_at": {"stop_at": 1.0},
    "empty stop_at": {"stop_at": []},
    "infinite stop_at": {"stop_at": [0.5, float("inf")]},
    "one of several tolerances negative": {"rtol": [1e-3, -1e-4]},
}


@controllers
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_settings_are_refused(controller, kind):
    with pytest.raises(ValueError):
        controller(**WRONG[kind])


@pytest.mark.parametrize("exponents", [(-0.1, 0.4), (0.3, -0.4), (0.0, 0.0)])
def test_wrong_exponents_are_refused(exponents):
    with pytest.raises(ValueError, match="integral >= 0"):
        po.PIController(integral=exponents[0], proportional=exponents[1])


@controllers
def test_what_is_no_number_is_refused(controller):
    for bad in ("tight", 1j, object()):
        with pytest.raises(TypeError, match="rtol"):
            controller(rtol=bad)


@controllers
def test_edge_values_are_fine(controller):
    c = controller(rtol=0.0, atol=1, safety=1, dt_min=0.1, dt_max=0.1, stop_at=[1, 2])
    assert c.limits.stops.dtype == c.atol.dtype == c.safety.dtype == jnp.float64
    np.testing.assert_array_equal(c.limits.stops, [1.0, 2.0])
