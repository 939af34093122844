"""What happens when the package is used wrongly: an error of the right kind that names the part and the remedy."""

import functools as ft
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po

from .helpers import logistic, pendulum


U = jnp.asarray([0.1, 0.2])
TRACED = (RuntimeError, ValueError)  # eqx.error_if, unless the value turned out to be known


def solver(f=logistic, *, order=1, nu=2, constraint=po.TS0, output_scale=1.0, **parts):
    prior = po.IWP(nu, output_scale=output_scale)
    return po.Solver(prior=prior, constraint=constraint(po.ODE(f, order=order)), **parts)


def solve(u0=U, t0=0.0, t1=1.0, *, f=logistic, order=1, save_at=None, dt0=None, **parts):
    return solver(f, order=order, **parts).solve(u0, t0, t1, save_at=save_at, dt0=dt0)


def second_order(u0):
    return solve(u0, f=pendulum, order=2)


def returning(output, u0=U):
    return solve(u0, f=lambda t, u, args: output(u))


class HasTolerances(po.AbstractController):
    tolerances: po.Tolerances
    limits: po.Limits = eqx.field(default_factory=po.Limits)

    def init(self, dtype):
        return None

    def propose(self, dt, error_norm, order, state):
        return error_norm <= 1, dt / 2, None


def control(**settings):
    return po.IntegralController(**settings)


def traced(fn, *values):
    """``fn`` where nobody knows its arguments before it runs."""
    return eqx.filter_jit(fn)(*(jnp.asarray(v, float) for v in values))


def initial_layout():
    return solver().init(U, 0.0).layout


def decay(t, u, args):
    return -u


def square(t, u, args):
    return u**2


@ft.cache
def solution():
    return solve()


@ft.cache
def initial():
    return solver().initialise(U, 0.0)


@ft.cache
def dense():
    return solve(save_at=po.SaveAt(dense=True), strategy=po.FixedIntervalSmoother(), loop=po.ForwardLoop(64))


@ft.cache
def fixed_points():
    return solve(save_at=[0.25, 0.5], strategy=po.FixedPointSmoother())


@ft.cache
def lanes():
    return jax.vmap(lambda u0: solve(u0, save_at=po.SaveAt(dense=True), loop=po.ForwardLoop(64)))(jnp.stack([U, 2 * U]))


@ft.cache
def lanes_with_events():
    return jax.vmap(lambda u0: with_events(event(terminal=False), u0).events)(jnp.stack([U, 2 * U]))


def exact(t):
    return np.ones((t.size, 2))


def ivp(field, u0=0.1, args=None):
    return po.solve_ivp(field, (0.0, 1.0), u0, args=args)


def residual(fn):
    return po.Solver(po.IWP(2), po.TS1(po.Residual(fn))).solve(0.1, 0.0, 1.0)


def in_place(t, u, args):
    u[0] = 1.0
    return u


def numpy_in_place(t, u, args):
    du = np.zeros(2)
    du[0], du[1] = u[1], -u[0]
    return du


def with_events(events, u0=U, t0=0.0, t1=1.0, *, max_events=64, **parts):
    return solver(**parts).solve(u0, t0, t1, events=events, max_events=max_events)


def event(g=lambda t, u, args: u[0] - 0.15, **options):
    return po.Event(g, **options)


KEY = jax.random.key(0)
# What the note on an error in a vector field begins with.
CALLED = r"vector field of an ODE of order 1 was called as f\(t, u, args\) with t=f.*"

# id, what the user does, the exceptions that may come, what the message must say (regular expression, over lines)
CASES = [
    # events
    ("event-no-function", lambda: po.Event("bounce"), TypeError, "Event.g. must be callable as g.*known times"),
    ("event-number", lambda: po.Event(1.0), ValueError, r"times of an Event .*shape \(times,\)"),
    ("event-infinite-time", lambda: po.Event([1.0, np.inf]), ValueError, "times of an Event must be finite"),
    ("event-direction", lambda: event(direction=2), ValueError, r"direction.* 1 \(upwards\), -1"),
    ("event-direction-bool", lambda: event(direction=True), ValueError, "direction"),
    ("event-terminal", lambda: event(terminal=0), ValueError, r"Event\(terminal\)"),
    ("event-reset", lambda: event(reset=0.0), TypeError, r"Event\(reset\) must be callable"),
    (
        "events-function",
        lambda: with_events(lambda t, u, args: u[0]),
        TypeError,
        r"events must be.*Wrap it: Event\(g\)",
    ),
    ("events-empty", lambda: with_events([]), ValueError, "events holds no Event"),
    ("events-max", lambda: with_events(event(), max_events=0), ValueError, "max_events"),
    (
        "event-boolean",
        lambda: with_events(event(lambda t, u, args: u[0] > 1)),
        TypeError,
        "True or False.*crosses zero",
    ),
    ("event-vector", lambda: with_events(event(lambda t, u, args: u)), ValueError, "one number.*several events"),
    ("event-integer", lambda: with_events(event(lambda t, u, args: 1)), TypeError, "real, floating-point"),
    ("event-signature", lambda: with_events(event(lambda t, u: u[0])), TypeError, r"called as g\(t, u, args\)"),
    (
        "event-reset-structure",
        lambda: with_events(event(reset=lambda t, u, args: u[0])),
        ValueError,
        "The value of the reset of the event must have the shape of u0",
    ),
    (
        "event-second-of-two",
        lambda: with_events([event(), event(lambda t, u, args: u)]),
        ValueError,
        "function of event 1 must return one number",
    ),
    ("event-time-is-t0", lambda: with_events(event([0.0, 0.5])), ValueError, "known time of an Event is t0.*into u0"),
    (
        "event-isotropic-reset",
        lambda: with_events(event(reset=lambda t, u, args: u), factorisation=po.Isotropic()),
        ValueError,
        r"Isotropic\(\) has one covariance.*a reset moves.*Use Dense",
    ),
    (
        "event-modal-reset",
        lambda: with_events(event(reset=lambda t, u, args: u), factorisation=po.Modal(), constraint=po.TS1),
        ValueError,
        r"A reset is not available under Modal\(\): use Dense",
    ),
    (
        "event-subspace",
        lambda: with_events(event(), factorisation=po.Subspace(jnp.eye(2)), constraint=po.TS1),
        ValueError,
        "An event is not available under Subspace",
    ),
    (
        "event-residual-reset",
        lambda: po.Solver(po.IWP(2), po.TS1(po.Residual(lambda t, u, du, args: du + u))).solve(
            U, 0.0, 1.0, events=event(reset=lambda t, u, args: u)
        ),
        ValueError,
        "solved for its highest derivative.*known times are possible",
    ),
    ("event-grid", lambda: solver().solve_grid(U, [0.0, 1.0], events=event()), TypeError, "solve_grid finds none"),
    ("event-cdf-of-lanes", lambda: lanes_with_events().cdf(0.5), ValueError, "single solution.*vmap"),
    ("event-cdf-time", lambda: with_events(event()).events.cdf("now"), TypeError, r"cdf\(t\)"),
    # the initial value
    ("u0-complex", lambda: solve(U + 1j), TypeError, "u0 is complex.*real and the imaginary part"),
    ("u0-integers", lambda: solve(jnp.array([1, 2])), TypeError, "u0 has dtype int.*floating point"),
    ("u0-python-int", lambda: solve(1), TypeError, "u0 has dtype int.*floating point"),
    ("u0-bool", lambda: solve(True), TypeError, "u0 has dtype bool.*floating point"),
    ("u0-int-inside", lambda: solve([0.5, 1]), TypeError, "u0 has dtype int.*floating point"),
    ("u0-no-leaves", lambda: solve(()), ValueError, "u0 has no numbers"),
    ("u0-none", lambda: solve(None), ValueError, "u0 has no numbers"),
    ("u0-size-zero", lambda: solve(jnp.zeros(0)), ValueError, "u0 .*nothing to solve"),
    ("u0-string", lambda: solve("0.1"), TypeError, "u0 "),
    ("u0-is-a-solution", lambda: solve(solution()), TypeError, r"Solution.*state"),
    ("order2-not-a-tuple", lambda: second_order(U), ValueError, "order 2 needs u0 = .*tuple of 2"),
    ("order2-a-list", lambda: second_order([U, U]), ValueError, "order 2 needs u0 = .*tuple of 2.*got list"),
    ("order2-three-entries", lambda: second_order((U, U, U)), ValueError, "order 2 needs u0 = .*length 3"),
    ("order2-structures", lambda: second_order((U, (U,))), ValueError, "entry 1 of u0 .*structure of entry 0"),
    (
        "order2-shapes",
        lambda: second_order((U, U[:1])),
        ValueError,
        r"entry 1 of u0 .*shape of entry 0.*\(2,\).*\(1,\)",
    ),
    ("order2-dtypes", lambda: second_order((U, U.astype(jnp.float32))), ValueError, "entry 1 of u0 .*dtype of entry 0"),
    (
        "init-at-another-time",
        lambda: solver().init(solve().state, 0.5),
        ValueError,
        "goes on from the time of its state",
    ),
    ("initialise-at-another-time", lambda: solver().initialise(solve().state, 0.5), ValueError, "time of its state"),
    ("u0-normal-init", lambda: solver().init(po.Normal(U, U), 0.0), TypeError, "u0 is a Normal.*InitialState"),
    # lifted equations
    (
        "lifted-beyond-the-prior",
        lambda: solver(nu=3, constraint=lambda ode: po.TS1(ode.lifted(3))),
        ValueError,
        "equation of order 4 needs a prior",
    ),
    ("lifted-negative", lambda: po.ODE(logistic).lifted(-1), ValueError, r"lifted\(levels\).*0"),
    (
        "lifted-residual-in-zeroth-order",
        lambda: po.TS0(po.Residual(lambda t, u, du, args: du + u).lifted(1)),
        TypeError,
        "TS0 linearises an ODE, not a Residual.*TS1",
    ),
    (
        "lifted-without-a-series",
        lambda: solve(f=lambda t, u, args: -jnp.sort(u), nu=10, constraint=lambda ode: po.TS0(ode.lifted(9))),
        ValueError,
        "`sort`.*at most 8.*fewer levels",
    ),
    (
        "lifted-residual-without-a-series",
        lambda: solve(nu=7, constraint=lambda _: po.TS1(po.Residual(lambda t, u, du, args: du + jnp.sort(u)))),
        ValueError,
        "7 exact derivatives.*residual uses `sort`.*at most 6",
    ),
    # times
    ("times-equal", lambda: solve(t0=1.0, t1=1.0), ValueError, "t0 and t1 are the same time.*t0=1.0"),
    ("times-equal-in-float32", lambda: solve(U.astype(jnp.float32), 1e9, 1e9 + 1), ValueError, "t0 and t1.*float32"),
    ("t0-nan", lambda: solve(t0=np.nan), ValueError, "t0 must be finite"),
    ("t1-inf", lambda: solve(t1=np.inf), ValueError, "t1 must be finite"),
    ("t1-array", lambda: solve(t1=np.ones(2)), ValueError, r"t1 must be a scalar.*\(2,\)"),
    ("t1-complex", lambda: solve(t1=1j), TypeError, "t1 must be real"),
    ("t1-string", lambda: solve(t1="1"), TypeError, "t1 must be"),
    ("dt0-negative", lambda: solve(dt0=-0.1), ValueError, "dt0 is negative.*t1 > t0"),
    ("dt0-zero", lambda: solve(dt0=0.0), ValueError, "dt0 must be finite and not zero"),
    ("dt0-nan", lambda: solve(dt0=np.nan), ValueError, "dt0 must be finite"),
    # what to keep
    ("save_at-unsorted", lambda: solve(save_at=[0.5, 0.2]), ValueError, "save_at must be sorted"),
    ("save_at-forwards", lambda: solve(t0=1.0, t1=0.0, save_at=[0.2, 0.5]), ValueError, "save_at must be sorted"),
    ("save_at-late", lambda: solve(save_at=[0.5, 1.2]), ValueError, r"save_at .*\[0.0, 1.0\].*1.2"),
    ("save_at-early", lambda: solve(save_at=[-0.5, 1.0]), ValueError, r"save_at .*\[0.0, 1.0\].*-0.5"),
    ("save_at-matrix", lambda: solve(save_at=np.ones((2, 2))), ValueError, r"save_at .*\(times,\).*\(2, 2\)"),
    ("save_at-scalar", lambda: solve(save_at=0.5), ValueError, r"save_at .*\(times,\).*\(\)"),
    ("save_at-empty", lambda: solve(save_at=[]), ValueError, "save_at must be a non-empty array"),
    ("save_at-nan", lambda: solve(save_at=[np.nan]), ValueError, "save_at .*nan"),
    ("save_at-nan-between", lambda: solve(save_at=[0.2, np.nan, 0.5]), ValueError, "save_at .*(nan|sorted)"),
    ("save_at-string", lambda: solve(save_at="steps"), TypeError, r"save_at|SaveAt\(ts\)"),
    ("SaveAt-nothing", lambda: po.SaveAt(), ValueError, r"SaveAt\(\) keeps nothing: set"),
    ("SaveAt-ts-and-steps", lambda: po.SaveAt(ts=[0.5], steps=True), ValueError, "ts.*steps.*not both"),
    ("SaveAt-t1-is-a-time", lambda: po.SaveAt(t0=0.0, t1=1.0), TypeError, "t[01]"),
    ("grid-one-point", lambda: solver().solve_grid(U, [0.0]), ValueError, "grid .*at least two times"),
    (
        "grid-unsorted",
        lambda: solver().solve_grid(U, [0.0, 1.0, 0.5]),
        ValueError,
        "grid .*increasing or in decreasing",
    ),
    ("grid-matrix", lambda: solver().solve_grid(U, np.ones((2, 2))), ValueError, r"grid .*\(2, 2\)"),
    ("grid-nan", lambda: solver().solve_grid(U, [0.0, np.nan]), ValueError, "grid must hold finite times"),
    (
        "derivative-above-the-prior",
        lambda: solution().derivative(3),
        ValueError,
        r"derivative\(k\).*<= 2, got 3",
    ),
    ("derivative-negative", lambda: solution().derivative(-1), ValueError, r"derivative\(k\).*>= 0.*got -1"),
    # tolerances and controllers
    ("rtol-negative", lambda: control(rtol=-1e-3), ValueError, "[Tt]olerances .*not negative.*rtol=-0.001"),
    ("atol-negative", lambda: control(atol=-1e-3), ValueError, "[Tt]olerances .*not negative.*atol=-0.001"),
    ("tolerances-zero", lambda: control(rtol=0, atol=0), ValueError, "rtol and atol are both zero.*at least one"),
    ("tolerances-zero-PI", lambda: po.PIController(rtol=0, atol=0), ValueError, "rtol and atol are both zero"),
    ("atol-nan", lambda: control(atol=np.nan), ValueError, "[Tt]olerances must be finite.*atol=nan"),
    (
        "atol-array",
        lambda: solve(U, controller=control(atol=np.full(7, 1e-3))),
        ValueError,
        r"atol must.*broadcast.*\(7,\)",
    ),
    ("rtol-string", lambda: control(rtol="1e-3"), TypeError, "rtol must be"),
    (
        "rtol-below-float32",
        lambda: solve(U.astype(jnp.float32), controller=control(rtol=1e-8)),
        ValueError,
        "rtol .*float32.*loosen.*float64.*rtol=1e-08",
    ),
    ("safety-above-one", lambda: control(safety=1.5), ValueError, "0 < safety <= 1.*1.5"),
    ("factor_min-above-one", lambda: control(factor_min=2.0), ValueError, "factor_min < 1 < factor_max"),
    ("factor_max-below-one", lambda: control(factor_max=0.5), ValueError, "factor_min < 1 < factor_max"),
    (
        "dt_min-above-dt_max",
        lambda: control(dt_min=1.0, dt_max=0.5),
        ValueError,
        "dt_min must not exceed dt_max, got dt_min=1.0, dt_max=0.5",
    ),
    ("dt_min-negative", lambda: control(dt_min=-1.0), ValueError, "dt_min must be positive"),
    ("stop_at-nan", lambda: control(stop_at=[np.nan]), ValueError, "stop_at must hold finite times"),
    ("stop_at-scalar", lambda: control(stop_at=0.5), ValueError, r"stop_at .*\(times,\)"),
    ("PI-gains-zero", lambda: po.PIController(integral=0, proportional=0), ValueError, "integral.*proportional.*zero"),
    ("max_steps-zero", lambda: po.BoundedLoop(0), ValueError, r"BoundedLoop\(max_steps\).*integer >= 1.*0"),
    ("max_steps-bool", lambda: po.ForwardLoop(True), ValueError, r"ForwardLoop\(max_steps\).*integer >= 1.*True"),
    ("max_steps-float", lambda: po.CheckpointedLoop(1e4), (TypeError, ValueError), "CheckpointedLoop.*max_steps"),
    ("max_steps-huge", lambda: solve(loop=po.ForwardLoop(2**40)), ValueError, "max_steps"),
    ("checkpoints-zero", lambda: po.CheckpointedLoop(checkpoints=0), ValueError, r"CheckpointedLoop\(checkpoints\)"),
    # the equation
    ("TS0-of-a-function", lambda: po.TS0(logistic), TypeError, "TS0.*ODE"),
    ("TS1-of-a-function", lambda: po.TS1(logistic), TypeError, "TS1.*ODE"),
    ("an-ODE-is-no-constraint", lambda: po.Solver(po.IWP(2), po.ODE(logistic)), TypeError, r"Linearise it: TS1\(ODE"),
    (
        "a-product-with-a-list",
        lambda: solve([0.1, 0.2], f=lambda t, u, args: 2 * u),
        ValueError,
        r"structure of u0.*A product with a list repeats it: make u0 one array, as jnp.asarray\(u0\)",
    ),
    (
        "args-in-a-tuple",
        lambda: po.solve_ivp(lambda t, u, rate: -rate * u, (0, 1), U, args=(0.5,)),
        TypeError,
        "unpack it, as in `rate, scale = args`",
    ),
    ("prior-of-relative-scale", lambda: po.RelativeScale(po.IWP(1)), ValueError, "u'' at least.*num_derivatives=1"),
    (
        "drift-is-a-number",
        lambda: po.linear_transition(-1.0, jnp.array(0.1), initial_layout()),
        TypeError,
        r"tuple of factors, as \(rate,\)",
    ),
    ("tolerances-are-a-number", lambda: HasTolerances(1e-3), TypeError, r"HasTolerances\(tolerances\).*Tolerances"),
    ("limits-are-none", lambda: HasTolerances(po.Tolerances(), None), TypeError, r"HasTolerances\(limits\).*Limits"),
    ("u0-normal-negative", lambda: solve(po.Normal(U, -U), constraint=po.TS1), ValueError, "not negative"),
    (
        "u0-normal-nan",
        lambda: solve(po.Normal(U, np.nan * U), constraint=po.TS1),
        ValueError,
        "finite and not negative",
    ),
    ("u0-normal-root-nan", lambda: solve(po.Normal(U, np.nan * np.eye(2)), constraint=po.TS1), ValueError, "finite"),
    ("ivp-order", lambda: po.solve_ivp(decay, (0, 1), U, order=2), TypeError, r"TS1\(ODE\(f, order=2\)\)"),
    (
        "ivp-stop-at",
        lambda: po.solve_ivp(decay, (0, 1), U, stop_at=[0.5]),
        TypeError,
        r"IntegralController\(rtol, atol",
    ),
    ("solve-jump-ts", lambda: solver().solve(U, 0.0, 1.0, jump_ts=[0.5]), TypeError, r"IntegralController\(stop_at"),
    (
        "lanes-in-a-list",
        lambda: po.solve_ensemble(solver(), U, 0.0, [1.0, 2.0], in_axes=(None, None, 0, None)),
        ValueError,
        r"write jnp.array\(\[...\]\)",
    ),
    ("ODE-of-a-number", lambda: po.ODE(3), TypeError, "ODE|vector_field"),
    ("ODE-order-zero", lambda: po.ODE(logistic, order=0), ValueError, r"ODE\(order\).*integer >= 1.*0"),
    ("ODE-order-bool", lambda: po.ODE(logistic, order=True), ValueError, r"ODE\(order\).*integer >= 1.*True"),
    ("ODE-order-above-prior", lambda: solver(order=3), ValueError, "order 3 needs a prior.*num_derivatives=2"),
    ("field-structure", lambda: returning(lambda u: (u,)), ValueError, "vector field.*structure of u0"),
    ("field-none", lambda: returning(lambda u: None), ValueError, "vector field.*structure of u0"),
    ("field-list", lambda: returning(lambda u: [u[0], u[1]]), ValueError, "vector field.*structure of u0"),
    ("field-shape", lambda: returning(lambda u: u[0]), ValueError, r"vector field.*shape of u0.*\(2,\).*\(\)"),
    (
        "field-dtype",
        lambda: returning(lambda u: u * np.ones(2), U.astype(jnp.float32)),
        ValueError,
        "vector field.*dtype of u0.*float32.*float64.*Cast",
    ),
    ("field-integer", lambda: returning(lambda u: 0, 0.1), ValueError, "vector field.*dtype of u0.*float.*int"),
    ("field-complex", lambda: returning(lambda u: 1j * u), ValueError, "vector field.*dtype of u0.*float.*complex"),
    ("field-two-arguments", lambda: solve(f=lambda t, u: u), TypeError, r"vector.field.*\(t, u, args\)"),
    # the parts
    ("IWP-0", lambda: po.IWP(0), ValueError, r"IWP\(num_derivatives\).*integer >= 1.*0"),
    ("IWP-2.5", lambda: po.IWP(2.5), (TypeError, ValueError), "IWP|num_derivatives"),
    ("IWP-True", lambda: po.IWP(True), ValueError, r"IWP\(num_derivatives\).*integer >= 1.*True"),
    ("output_scale-complex", lambda: po.IWP(2, output_scale=1j), TypeError, r"output_scale.*must be real"),
    ("output_scale-zero", lambda: po.IWP(2, output_scale=0.0), ValueError, "output_scale.*positive"),
    ("output_scale-nan", lambda: po.IWP(2, output_scale=np.nan), ValueError, "output_scale.*(positive|finite)"),
    ("output_scale-size", lambda: solve(output_scale=jnp.ones(3)), ValueError, "output_scale.*u"),
    (
        "output_scale-isotropic",
        lambda: solve(output_scale=jnp.ones(2), factorisation=po.Isotropic()),
        ValueError,
        r"Isotropic\(\) has one output scale.*(BlockDiagonal|Dense)",
    ),
    (
        "output_scale-modal",
        lambda: solve(output_scale=jnp.ones(2), constraint=po.TS1, factorisation=po.Modal()),
        ValueError,
        r"Modal\(\) has one output scale.*Dense",
    ),
    ("modal-TS0", lambda: solver(factorisation=po.Modal()), ValueError, r"Modal\(\).*Jacobian.*use TS1\(ODE\(f\)\)"),
    (
        "modal-residual",
        lambda: po.Solver(po.IWP(2), po.TS1(po.Residual(lambda t, u, du, args: du + u)), factorisation=po.Modal()),
        ValueError,
        r"Modal\(\).*explicit equation",
    ),
    *(
        (
            f"{type(coupled).__name__}-{label}",
            lambda coupled=coupled, parts=parts: solve(**{"constraint": po.TS1, "factorisation": coupled, **parts}),
            ValueError,
            rf"{type(coupled).__name__}\(\).*Dense\(\)",
        )
        for coupled in (po.Modal(), po.Blocks(1))
        for label, parts in {
            "leave-one-out": {"calibration": po.LeaveOneOutCalibration()},
            "stop_at": {"controller": control(stop_at=[0.5])},
            "Noisy": {"constraint": lambda ode: po.Noisy(po.TS1(ode), 0.1)},
            "Stack": {"constraint": lambda ode: po.Stack(po.TS1(ode), po.TS1(ode))},
        }.items()
    ),
    (
        "modal-uncertain",
        lambda: solve(po.Normal(U, U), constraint=po.TS1, factorisation=po.Modal()),
        ValueError,
        r"uncertain u0.*Modal\(\)",
    ),
    (
        "modal-data",
        lambda: solver(constraint=po.TS1, factorisation=po.Modal()).solve(
            U, 0.0, 1.0, data=po.Observations(jnp.array([0.5]), U[None], noise=0.1)
        ),
        ValueError,
        r"data.*Modal\(\)",
    ),
    (
        "modal-basis",
        lambda: solve(constraint=po.TS1, factorisation=po.Modal(jnp.eye(2))),
        ValueError,
        r"Modal\(\) finds its directions by itself",
    ),
    ("blocks-zero", lambda: po.Blocks(0), ValueError, r"Blocks\(partition\).*>= 1"),
    ("blocks-floats", lambda: po.Blocks([0.0, 1.0]), TypeError, r"Blocks\(partition\).*PyTree of integers"),
    (
        "blocks-other-labels",
        lambda: solve(constraint=po.TS1, factorisation=po.Blocks([0, 1, 1])),
        ValueError,
        r"Blocks\(partition\).*structure of u",
    ),
    (
        "blocks-residual",
        lambda: po.Solver(
            po.IWP(2), po.TS1(po.Residual(lambda t, u, du, args: du + u)), factorisation=po.Blocks(1)
        ).solve(U, 0.0, 1.0),
        ValueError,
        r"Blocks\(\) needs an explicit equation.*Dense",
    ),
    (
        "blocks-lifted",
        lambda: po.Solver(po.IWP(3), po.TS1(po.ODE(logistic).lifted(1)), factorisation=po.Blocks(1)).solve(U, 0.0, 1.0),
        ValueError,
        r"Blocks\(\).*not a lifted one.*Dense",
    ),
    (
        "resume-other-blocks",
        lambda: solve(
            solve(constraint=po.TS1, factorisation=po.Blocks(1)).state,
            1.0,
            2.0,
            constraint=po.TS1,
            factorisation=po.Blocks(2),
        ),
        ValueError,
        r"Blocks\(1\).*Blocks\(2\)",
    ),
    ("prior-a-class", lambda: po.Solver(po.IWP, po.TS0(po.ODE(logistic))), TypeError, r"Solver\(prior\).*IWP\(\)"),
    ("strategy-a-class", lambda: solver(strategy=po.Filter), TypeError, r"Solver\(strategy\).*Filter\(\)"),
    ("constraint-an-ODE", lambda: po.Solver(po.IWP(2), po.ODE(logistic)), TypeError, r"Solver\(constraint\)"),
    ("parts-swapped", lambda: po.Solver(po.TS0(po.ODE(logistic)), po.IWP(2)), TypeError, r"Solver\(prior\)"),
    ("loop-a-number", lambda: solver(loop=1000), TypeError, r"Solver\(loop\).*AbstractLoop.*1000"),
    ("calibration-a-string", lambda: solver(calibration="mle"), TypeError, r"Solver\(calibration\).*'mle'"),
    # going on
    ("InitialState-of-another-prior", lambda: solve(initial(), nu=3), ValueError, "InitialState.*3 derivatives.*has 2"),
    (
        "InitialState-of-another-factorisation",
        lambda: solve(initial(), factorisation=po.Isotropic()),
        ValueError,
        r"InitialState's factor.*Isotropic\(\)",
    ),
    (
        "resume-another-time",
        lambda: solve(solution().state, 0.5, 2.0),
        ValueError,
        "time of its state.*t0=0.5, state=1.0",
    ),
    ("resume-another-prior", lambda: solve(solution().state, 1.0, 2.0, nu=3), ValueError, "state.*derivatives"),
    (
        "resume-another-factorisation",
        lambda: solve(solution().state, 1.0, 2.0, factorisation=po.Isotropic()),
        ValueError,
        "state.*(Dense|Isotropic)",
    ),
    (
        "resume-another-calibration",
        lambda: solve(solution().state, 1.0, 2.0, calibration=po.MLECalibration()),
        ValueError,
        r"state.*made with DynamicCalibration.*another calibration, MLECalibration\(\)",
    ),
    (
        "resume-another-scale",
        lambda: solve(solution().state, 1.0, 2.0, calibration=po.NoCalibration()),
        ValueError,
        r"state.*made with DynamicCalibration.*another calibration, NoCalibration\(\)",
    ),
    ("solve-a-step-state", lambda: solve(solver().init(U, 0.0)), TypeError, "state of init or step.*Solution.state"),
    ("grid-from-a-running-solve", lambda: solver().solve_grid(solution().state, [1.0, 2.0]), ValueError, "solve_grid"),
    ("step-of-u0", lambda: solver().step(U, 0.1), TypeError, "init"),
    ("step-nan", lambda: solver().step(solver().init(U, 0.0), np.nan), ValueError, "dt must be finite"),
    # the one-liner
    ("ivp-method", lambda: po.solve_ivp(decay, (0, 1), U, method="RK45"), ValueError, "method.*'EK0', 'EK1'.*'RK45'"),
    ("ivp-span-number", lambda: po.solve_ivp(decay, 1.0, U), (TypeError, ValueError), "t_span"),
    ("ivp-span-three", lambda: po.solve_ivp(decay, (0, 1, 2), U), (TypeError, ValueError), "t_span"),
    # the posterior
    ("evaluate-not-kept", lambda: solution().evaluate(0.5), ValueError, r"evaluate needs the steps.*dense=True"),
    ("evaluate-of-fixed-points", lambda: fixed_points().evaluate(0.5), ValueError, "evaluate needs the steps"),
    ("evaluate-outside", lambda: dense().evaluate(1.2), ValueError, r"evaluate.*interval.*t=1.2.*\(0.0, 1.0\)"),
    ("evaluate-before", lambda: dense().evaluate([0.5, -0.1]), ValueError, "evaluate.*interval"),
    ("evaluate-nan", lambda: dense().evaluate(np.nan), ValueError, "evaluate.*interval"),
    ("evaluate-a-matrix", lambda: dense().evaluate(np.ones((2, 2))), ValueError, r"evaluate.*shape \(2, 2\)"),
    ("evaluate-a-string", lambda: dense().evaluate("0.5"), TypeError, "evaluate"),
    ("evaluate-derivative", lambda: dense().evaluate(0.5).derivative(3), ValueError, r"derivative\(k\)"),
    ("traced-evaluate-outside", lambda: traced(dense().evaluate, 1.2), TRACED, "evaluate.*interval"),
    ("evaluate-a-batch", lambda: lanes().evaluate(0.5), ValueError, "batch of solutions.*vmap"),
    ("sample-a-batch", lambda: lanes().sample(KEY), ValueError, "batch of solutions.*vmap"),
    (
        "sample-a-filter",
        lambda: solve(save_at=[0.5, 1.0]).sample(KEY),
        ValueError,
        "filter cannot be sampled.*Smoother",
    ),
    (
        "sample-a-dense-filter",
        lambda: solve(save_at=po.SaveAt(dense=True)).sample(KEY, ts=[0.5, 1.0]),
        ValueError,
        "filter cannot be sampled.*Smoother",
    ),
    ("sample-between-fixed-points", lambda: fixed_points().sample(KEY, ts=[0.3]), ValueError, "sample.ts.*steps"),
    ("sample-outside", lambda: dense().sample(KEY, ts=[0.3, 1.2]), ValueError, "sample.ts.*interval"),
    ("sample-at-a-scalar", lambda: dense().sample(KEY, ts=0.3), ValueError, r"sample.ts.*shape \(times,\)"),
    (
        "dense-fixed-points",
        lambda: solve(save_at=po.SaveAt(dense=True), strategy=po.FixedPointSmoother()),
        ValueError,
        r"dense=True.*FixedIntervalSmoother\(\)",
    ),
    ("report-of-a-number", lambda: po.calibration_report(3, exact), TypeError, "Solver or a Solution, got int"),
    ("report-without-u0", lambda: po.calibration_report(solver(), exact), ValueError, "needs u0, t0 and t1"),
    # stopped on the way
    (
        "blow-up",
        lambda: solve(1.0, 0.0, 2.0, f=square),
        RuntimeError,
        r"stopped.*It reached t = 1\.0\d* of \[0, 2\] in \d+ attempts.*shorten the interval, to a t1.*throw=False",
    ),
    (
        "max_steps-reached",
        lambda: solve(U, 0.0, 100.0, loop=po.BoundedLoop(2)),
        RuntimeError,
        r"max_steps attempts.*t = \d\S* of \[0, 100\] in 2 attempts.*BoundedLoop\(max_steps=4096\).*TS1.*throw=False",
    ),
    # derivatives
    (
        "reverse-mode-ForwardLoop",
        lambda: jax.grad(lambda u: solve(u, nu=1, loop=po.ForwardLoop()).mean.sum())(0.1),
        RuntimeError,
        r"ForwardLoop\(\) cannot be differentiated in reverse mode.*BoundedLoop",
    ),
    # the same where values are traced: a run-time error
    (
        "traced-t1-nan",
        lambda: traced(lambda t: solve(0.1, t1=t, nu=1), np.nan),
        TRACED,
        r"t1 must be finite(?!.*Tracer)",
    ),
    (
        "traced-unsorted",
        lambda: traced(lambda ts: solve(0.1, save_at=ts, nu=1), [0.5, 0.2]),
        TRACED,
        "save_at must be sorted",
    ),
    (
        "traced-outside",
        lambda: traced(lambda ts: solve(0.1, save_at=ts, nu=1), [0.5, 1.2]),
        TRACED,
        "save_at must lie between",
    ),
    ("traced-save_at-nan", lambda: traced(lambda ts: solve(0.1, save_at=ts, nu=1), [np.nan]), TRACED, "save_at must"),
    (
        "traced-rtol-negative",
        lambda: traced(lambda r: solve(0.1, nu=1, controller=control(rtol=r)), -1.0),
        TRACED,
        r"[Tt]olerances must be finite and not negative",
    ),
    (
        "traced-rtol-tiny",
        lambda: traced(lambda r: solve(jnp.float32(0.1), nu=1, controller=control(rtol=r)), 1e-9),
        TRACED,
        "rtol.*float32.*loosen",
    ),
    (
        "traced-grid-unsorted",
        lambda: traced(lambda g: solver(nu=1).solve_grid(0.1, g), [0.0, 1.0, 0.5]),
        TRACED,
        "grid must hold finite times in increasing",
    ),
    (
        "traced-resume-another-time",
        lambda: traced(lambda t: solver().solve(solution().state, t, 2.0), 0.5),
        TRACED,
        "goes on from the time of its state",
    ),
    (
        "traced-max_steps-reached",
        lambda: traced(lambda u: solve(u, 0.0, 100.0, nu=1, loop=po.BoundedLoop(2)), 0.1),
        TRACED,
        r"max_steps attempts were made before t1.*t = \d\S* of \[0, 100\] in 2 attempts.*BoundedLoop\(max_steps=4096\)",
    ),
    # mistakes inside of a vector field: JAX's own error, with a note
    ("field-if", lambda: ivp(lambda t, u, args: -u if u > 0 else u), jax.errors.JAXTypeError, CALLED + "jnp.where"),
    ("field-if-time", lambda: ivp(lambda t, u, args: u if t < 1 else -u), jax.errors.JAXTypeError, CALLED + "not `if`"),
    ("field-numpy", lambda: ivp(lambda t, u, args: np.sin(u)), jax.errors.JAXTypeError, CALLED + r"as jnp\.sin\(u\)"),
    (
        "field-np-array",
        lambda: ivp(lambda t, u, args: np.array([u[1], -u[0]]), U),
        jax.errors.JAXTypeError,
        CALLED + r"jnp\.array\(\[\.\.\.\]\) or jnp\.stack",
    ),
    ("field-np-zeros", lambda: ivp(numpy_in_place, U), ValueError, CALLED + r"jnp\.stack"),
    ("field-in-place", lambda: ivp(in_place, U), TypeError, r"x\.at\[idx\]\.set.*was called"),
    ("field-math", lambda: ivp(lambda t, u, args: math.sin(u)), jax.errors.JAXTypeError, CALLED + r"not math\.sin"),
    ("field-math-time", lambda: ivp(lambda t, u, args: u * math.cos(t)), jax.errors.JAXTypeError, CALLED + "math"),
    (
        "field-float",
        lambda: ivp(lambda t, u, args: -float(u)),
        jax.errors.JAXTypeError,
        CALLED + r"leave out float\(\)",
    ),
    ("field-item", lambda: ivp(lambda t, u, args: -u[0].item() * u, U), jax.errors.JAXTypeError, CALLED + "item"),
    ("field-int-of-time", lambda: ivp(lambda t, u, args: [1, 2][int(t)] * u), jax.errors.JAXTypeError, CALLED + "int"),
    ("field-range", lambda: ivp(lambda t, u, args: sum(u for _ in range(t))), TypeError, CALLED + "index or a length"),
    (
        "field-of-u-t",
        lambda: ivp(lambda u, t, args: jnp.stack([u[1], -u[0]]), U),
        IndexError,
        CALLED + "time comes first",
    ),
    (
        "field-of-u-t-shape",
        lambda: ivp(lambda u, t, args: -u, U),
        ValueError,
        "time is the first argument, u the second",
    ),
    ("field-without-args", lambda: ivp(lambda t, u: -u), TypeError, r"f\(t, u, args\).*args, which may stay unused"),
    (
        "field-SciPy-args",
        lambda: ivp(lambda t, u, a, b: -a * u),
        TypeError,
        "missing.*'b'.*Parameters are one argument",
    ),
    (
        "field-network",
        lambda: ivp(eqx.nn.MLP("scalar", "scalar", 2, 1, key=KEY)),
        TypeError,
        r"Wrap it: lambda t, u, args",
    ),
    (
        "args-missing",
        lambda: ivp(lambda t, u, args: -args[0] * u),
        TypeError,
        CALLED + r"args=None.*solve\(\.\.\., args=",
    ),
    (
        "args-missing-key",
        lambda: ivp(lambda t, u, args: -args["k"] * u),
        TypeError,
        CALLED + "Nothing was passed for args",
    ),
    (
        "args-wrong-key",
        lambda: ivp(lambda t, u, args: -args["k"] * u, args={"r": 1.0}),
        KeyError,
        r"args=\{'r': \w+\[\]\}",
    ),
    (
        "field-u0-a-list",
        lambda: ivp(lambda t, u, args: -u, [1.0, 2.0]),
        TypeError,
        CALLED + r"u=\[.*jnp\.asarray\(u0\)",
    ),
    ("field-u0-nested", lambda: ivp(lambda t, u, args: -u, [[1.0], [2.0]]), TypeError, CALLED + r"jnp\.asarray\(u0\)"),
    (
        "field-array-for-a-list",
        lambda: ivp(lambda t, u, args: jnp.array([u[1], -u[0]]), [1.0, 2.0]),
        ValueError,
        r"structure of u0: expected \[f\d+\[\], f\d+\[\]\], got f\d+\[2\].*jnp\.asarray\(u0\)",
    ),
    ("field-list-stack", lambda: returning(lambda u: [u[1], u[0]]), ValueError, r"Return one array, as jnp\.stack"),
    ("field-no-return", lambda: returning(lambda u: None), ValueError, "got None.*Does the function return anything"),
    ("field-integers", lambda: returning(lambda u: jnp.array([1, 2])), ValueError, "dtype of u0.*int.*Cast constants"),
    (
        "field-larger",
        lambda: returning(lambda u: jnp.append(u, u)),
        ValueError,
        r"shape of u0: expected \(2,\), got \(4,\)",
    ),
    ("field-row", lambda: returning(lambda u: u[None]), ValueError, r"shape of u0: expected \(2,\), got \(1, 2\)"),
    ("field-string", lambda: returning(lambda u: "u"), TypeError, "vector field.*must return arrays, got 'u'"),
    ("field-own-error", lambda: ivp(lambda t, u, args: u @ jnp.ones((3, 3)), U), TypeError, r"contracting.*" + CALLED),
    (
        "residual-if",
        lambda: residual(lambda t, u, du, args: du if u > 0 else u),
        jax.errors.JAXTypeError,
        r"r\(t, u, du, args\).*jnp\.where",
    ),
    ("field-order-two", lambda: solve((U, U), f=logistic, order=2), TypeError, r"called as f\(t, u, du, args\)"),
    # words of other packages
    ("solve-saveat", lambda: solver().solve(U, 0.0, 1.0, saveat=[0.5]), TypeError, r"Solver\.solve.*'saveat'.*save_at"),
    ("solve-t_eval", lambda: solver().solve(U, 0.0, 1.0, t_eval=[0.5]), TypeError, r"'t_eval'.*save_at"),
    ("solve-y0", lambda: solver().solve(y0=U, t0=0.0, t1=1.0), TypeError, "'y0'.*the initial value is u0"),
    (
        "solve-rtol",
        lambda: solver().solve(U, 0.0, 1.0, rtol=1e-3),
        TypeError,
        r"'rtol'.*controller=IntegralController\(rtol",
    ),
    (
        "solve-max_steps",
        lambda: solver().solve(U, 0.0, 1.0, max_steps=99),
        TypeError,
        r"'max_steps'.*loop=BoundedLoop\(max",
    ),
    ("solve-dt", lambda: solver().solve(U, 0.0, 1.0, dt=0.1), TypeError, "'dt'.*dt0"),
    ("solve-adjoint", lambda: solver().solve(U, 0.0, 1.0, adjoint=None), TypeError, r"'adjoint'.*loop=BoundedLoop\(\)"),
    (
        "solve-method",
        lambda: solver().solve(U, 0.0, 1.0, method="RK45"),
        TypeError,
        r"'method'.*parts of a solver.*solve_ivp",
    ),
    ("solve-unknown", lambda: solver().solve(U, 0.0, 1.0, foo=1), TypeError, "'foo': it has args, data, dt0"),
    (
        "solve-a-span",
        lambda: solver().solve(U, (0.0, 1.0)),
        TypeError,
        r"Solver\.solve\(u0, t0, t1, \.\.\.\) needs t1.*two arguments, not a pair",
    ),
    ("solve-times-first", lambda: solver().solve(0.0, 1.0, U), ValueError, r"t1 must be a scalar.*u0, then the times"),
    (
        "ivp-swapped",
        lambda: po.solve_ivp(decay, 1.0, (0.0, 1.0)),
        ValueError,
        r"The order is solve_ivp\(f, t_span, u0\)",
    ),
    (
        "ivp-t_eval",
        lambda: po.solve_ivp(decay, (0.0, 1.0), U, t_eval=[2.0]),
        ValueError,
        r"save_at must lie.*\(t_eval of",
    ),
    (
        "ivp-isotropic",
        lambda: po.solve_ivp(decay, (0.0, 1.0), po.Normal(U, U), method="EK0"),
        ValueError,
        "in solve_ivp also method='EK1'",
    ),
    (
        "normal-one-deviation",
        lambda: po.solve_ivp(lambda t, u, args: u, (0.0, 1.0), po.Normal({"a": 1.0, "b": 2.0}, 0.1)),
        ValueError,
        r"The same for all: jax\.tree\.map",
    ),
    (
        "evaluate-in-one-line",
        lambda: po.solve_ivp(decay, (0.0, 1.0), U).evaluate(0.5),
        ValueError,
        r"\(solve_ivp: dense_output=True\)",
    ),
    ("solve-as-diffrax", lambda: solver().solve(logistic, 0.0, 1.0, 0.1, U), TypeError, "takes 3 positional.*by name"),
    (
        "solve-a-field",
        lambda: solver().solve(logistic, 0.0, 1.0),
        TypeError,
        "u0 must hold real arrays.*vector field belongs",
    ),
    ("solve-throw-a-string", lambda: solver().solve(U, 0.0, 1.0, throw="no"), TypeError, "throw must be True or False"),
    (
        "solve-throw-traced",
        lambda: jax.jit(solver().solve)(U, 0.0, 1.0, throw=False),
        TypeError,
        "throw.*static_argnames",
    ),
    (
        "solve_grid-ts",
        lambda: solver().solve_grid(U, ts=[0.0, 1.0]),
        TypeError,
        r"Solver\.solve_grid has no argument 'ts'",
    ),
    (
        "solver-rtol",
        lambda: solver(rtol=1e-3),
        TypeError,
        r"Solver has no argument 'rtol'.*controller=IntegralController",
    ),
    ("solver-adjoint", lambda: solver(adjoint=None), TypeError, r"Solver has no argument 'adjoint'.*loop="),
    (
        "solver-stepsize",
        lambda: solver(stepsize_controller=control()),
        TypeError,
        r"'stepsize_controller'.*controller=",
    ),
    ("solver-terms", lambda: po.Solver(po.IWP(2), terms=logistic), TypeError, r"'terms'.*TS1\(ODE\(vector_field\)\)"),
    (
        "solver-one-part",
        lambda: po.Solver(po.TS0(po.ODE(logistic))),
        TypeError,
        r"Solver\(prior, constraint, \.\.\.\) needs constr",
    ),
    ("solution-y", lambda: solution().y, AttributeError, r"'y': the solution is \.mean"),
    ("solution-ys", lambda: solution().ys, AttributeError, r"'ys': the solution is \.mean"),
    ("solution-ts", lambda: solution().ts, AttributeError, r"'ts': the times are \.t"),
    ("solution-success", lambda: solution().success, AttributeError, r"\.result == Result\.successful"),
    ("solution-message", lambda: solution().message, AttributeError, r"\.result, in words summary\(\)"),
    ("solution-sol", lambda: dense().sol(0.5), AttributeError, r"'sol': any time is evaluate\(t\)"),
    ("solution-nfev", lambda: solution().nfev, AttributeError, r"\.stats\[\"num_steps\"\]"),
    ("solution-t_events", lambda: solution().t_events, AttributeError, r"'t_events': .*\.events\.t"),
    ("solution-unknown", lambda: solution().foo, AttributeError, "'Solution' object has no attribute 'foo'"),
    ("sample-a-seed", lambda: dense().sample(0), TypeError, r"sample\(key\).*jax\.random\.key\(0\), got 0"),
    (
        "sample-a-number",
        lambda: dense().sample(KEY, 10),
        TypeError,
        r"sample\(shape\) must be a tuple.*\(10,\), got 10",
    ),
    ("save_at-a-number", lambda: solve(save_at=100), ValueError, r"save_at .*\(times,\), got shape \(\)"),
    (
        "traced-evaluate-outside-says-where",
        lambda: traced(dense().evaluate, 1.2),
        RuntimeError,
        r"\nValueError: evaluate\(t\) must lie in the interval that was solved, got t=1\.2\d*, interval=\(0\.0, 1\.0\)",
    ),
    (
        "vmapped-evaluate-outside",
        lambda: jax.vmap(dense().evaluate)(jnp.array([0.5, 1.5])),
        ValueError,
        r"^evaluate\(t\) must lie.*got t=1\.5, interval=\(0\.0, 1\.0\)\. \(In lane 1; 1 of 2 lanes failed\.\)",
    ),
]


@pytest.mark.parametrize(("use", "errors", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_use_is_an_error_in_words(use, errors, message):
    with pytest.raises(errors) as caught:
        jax.block_until_ready(eqx.filter(use(), eqx.is_array))
    words = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(message, words, re.DOTALL), words[:1000]
