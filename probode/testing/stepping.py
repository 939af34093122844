"""Conformance checks of error estimates, controllers, loops and progress meters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..algebra.factorisations import Dense, layout_of
from ..equations.problems import ODE
from ..information.constraints import TS0, TS1
from ..priors.iwp import IWP
from ..solver import Solver
from ..stepping.controllers import AbstractController
from ..stepping.error_estimates import AbstractErrorEstimate
from ..stepping.loops import AbstractLoop
from ..stepping.progress import AbstractProgress
from ..util.checks import as_triple
from .examples import U0, example_attempt, field
from .laws import equal, finite, has_dtype, hold, require_double, require_kind, survives, works


def check_error(error: AbstractErrorEstimate) -> None:
    """Raises ``LawBroken`` unless an error estimate returns errors of ``u`` that vanish with the step.

    - Errors have the shape ``(d,)``, or ``(k, d)`` for ``u, u', ...``, and the units of ``u``, so that they do not
      depend on the unit of time; they are not negative, and decrease faster than ``dt^1.5``; time may run backwards.
    - The norm is homogeneous, zero at zero alone, and at most 1/2 for errors of half the tolerance.
    - All this for ``TS1``; estimates are also finite for ``TS0``, and for ``TS0`` of a lifted equation, where
      ``innovation.inside`` and ``innovation.remainder`` may be ``None``.
    - Single precision is kept, and estimates work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(error, AbstractErrorEstimate)
    name = type(error).__name__
    x = jnp.array([0.3, -2.0, 1.0])
    equal(error.norm(3 * x), 3 * error.norm(x), f"{name}: the norm is homogeneous", 1e-12)
    hold(error.norm(x) > 0 and error.norm(0 * x) == 0, f"{name}: the norm is zero at zero alone")
    hold(error.norm(jnp.full(3, 0.5)) <= 0.5 + 1e-12, f"{name}: errors of half the tolerance are good enough")

    def estimate(error, dt, scale=1.0, time=1.0, dtype=float):
        layout, dt = layout_of(U0.astype(dtype), 2, Dense()), jnp.asarray(dt, dtype)
        attempt = example_attempt(dt, scale=scale, time=time, defects=error.needs_defects)
        return error.estimate(attempt, dt, layout)

    coarse = estimate(error, 0.2)
    _check_errors(f"{name}, dt=0.2", coarse)
    layout = layout_of(U0, 2, Dense())
    for constraint, words in ((TS0, "TS0"), (lambda ode: TS0(ode.lifted(1)), "TS0 of a lifted equation")):
        for defects in {False, error.needs_defects and words == "TS0"}:
            attempt = example_attempt(0.2, constraint=constraint, defects=defects)
            without = [x for x in ("inside", "remainder") if getattr(attempt.innovation, x) is None]
            law = f"{name}, dt=0.2, {words}, where {' and '.join(f'innovation.{x}' for x in without)} is None"
            estimated = functools.partial(error.estimate, attempt, jnp.asarray(0.2), layout)
            _check_errors(law, works(estimated, f"{law}: there is an error"))
    fine = estimate(error, 0.02)
    rate = float(jnp.log10(error.norm(coarse) / error.norm(fine)))
    law = f"{name}, dt=0.2 and 0.02: a step ten times shorter has a much smaller error"
    hold(rate > 1.5, law, f"order {rate:.1f}")
    law = f"{name}, dt=0.2: errors have the units of u"
    equal(estimate(error, 0.2, 8.0), 8 * coarse, law, 1e-8)
    # Rows are about u, u', ..., which have units of their own.
    units = 4.0 ** np.arange(coarse.shape[0])[:, None] if coarse.ndim == 2 else 1.0
    longer = estimate(error, 0.05, time=4.0) / units
    law = f"{law}, so that they do not depend on the unit of time"
    finite(longer, law)
    power = float(jnp.log(error.norm(longer) / error.norm(coarse)) / np.log(4))
    equal(longer, coarse, law, 1e-8, what=f"an error in units of u / time^{power:.2g}; multiply by |dt|^{power:.2g}")
    finite(estimate(error, 1e-9), f"{name}, dt=1e-9: errors are finite")
    hold(estimate(error, -0.02) > 0, f"{name}, dt=-0.02: time may run backwards")
    has_dtype(estimate(error, 0.1, dtype=jnp.float32), jnp.float32, f"{name} keeps single precision")
    survives(estimate, error, jnp.asarray(0.1), "an error estimate")


def _check_errors(law, errors):
    """Checks the errors of a step of two components, of which ``law`` says what it was."""
    shaped = errors.shape == (2,) or (errors.ndim == 2 and errors.shape[1] == 2)
    found = f"shape {errors.shape}, d=2"
    hold(shaped, f"{law}: an error for every component of u, (d,), or of u, u', ... row by row, (k, d)", found)
    finite(errors, f"{law}: errors are finite")
    hold(errors >= 0, f"{law}: errors are not negative", f"{errors}")


def check_controller(controller: AbstractController) -> None:
    """Raises ``LawBroken`` unless a controller accepts and proposes steps as the solvers need it.

    - Errors up to one are accepted, larger ones rejected; a rejection is followed by a shorter step.
    - Proposals are positive and finite, proportional to the step, and not longer for a larger error.
    - Its state has the same structure, shapes and dtypes after each attempt.
    - A simple solve reaches its end; single precision is kept; proposals work under the transformations of JAX.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(controller, AbstractController)
    name = type(controller).__name__
    start = controller.init(jnp.dtype(float))
    propose = lambda norm, state=start, dt=0.1: controller.propose(  # noqa: E731
        jnp.asarray(dt), jnp.asarray(norm, float), 4, state
    )
    state = start
    for norm in (0.5, 0.999, 1.001, 0.9, 1.0, 3.0, 0.2, 0.0, np.inf, 0.7):
        accept, dt, after = as_triple(propose(norm, state), f"{name}.propose", "accept, dt, state")
        hold(
            jnp.isfinite(dt) & (dt > 0), f"{name}: a proposal is positive and finite", f"{dt} after an error of {norm}"
        )
        hold(bool(accept) == (norm <= 1), f"{name}: errors up to one are accepted, larger ones are not", f"{norm}")
        hold(norm <= 1 or dt < 0.1, f"{name}: after a rejection the step gets shorter", f"{dt} after 0.1")
        hold(
            jax.tree.structure(after) == jax.tree.structure(start)
            and all(
                jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
                for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True)
            ),
            f"{name}: the state keeps structure, shapes and dtypes",
        )
        state = after
    lengths = [float(propose(norm)[1]) for norm in (1e-6, 1e-2, 0.5, 1.0, 2.0, 1e3)]
    hold(lengths == sorted(lengths, reverse=True), f"{name}: a larger error is not followed by a longer step")
    equal(propose(0.5, dt=0.2)[1], 2 * propose(0.5)[1], f"{name}: proposals are in units of the step", 1e-12)
    single = controller.propose(jnp.float32(0.1), jnp.float32(0.5), 4, controller.init(jnp.dtype("float32")))
    has_dtype(single[1:], jnp.float32, f"{name} keeps single precision, in its proposal and its state")
    solver = Solver(IWP(2), TS1(ODE(field)), controller=controller)
    survives(
        lambda c, x: jnp.atleast_1d(c.propose(x, jnp.asarray(0.5), 4, c.init(x.dtype))[1]),
        controller,
        jnp.asarray(0.1),
        "a proposal",
    )
    solution = solver.solve(U0, 0.0, 1.0, throw=False)
    found = f"it stopped at {solution.t[-1]:.3g} after {int(solution.stats['num_steps'])} attempts"
    hold(solution.t[-1] == 1.0, f"{name}: a simple solve arrives; rejected steps get shorter by enough", found)


def check_loop(loop: AbstractLoop) -> None:
    """Raises ``LawBroken`` unless a loop repeats its body while the condition holds, at most ``max_steps`` times.

    - The final carry, and what was written to buffers, are those of the iterations; of none where the condition is
      false from the start.
    - Under ``vmap`` a lane that has ended stays as it is while others go on.
    - It ends after ``max_steps`` iterations (tested up to 10000). ``checkpoints`` is ``None`` or positive.

    Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(loop, AbstractLoop)
    name = type(loop).__name__
    size = min(loop.max_steps, 8)

    def run(loop, x, until=5):
        def body(carry):
            i, x, buffer = carry
            return i + 1, jnp.sin(x), buffer.at[i % size].set(x, pred=i < size)

        init = jnp.zeros((), int), x, jnp.zeros(size)
        return loop.run(lambda carry: carry[0] < until, body, init, buffers=lambda carry: carry[2])

    steps = min(5, loop.max_steps)
    law = f"{name}: run hands its buffers on to a loop of equinox, where they are written with at[i].set(x, pred=...)"
    number, value, buffer = works(lambda: jax.jit(run)(loop, jnp.asarray(0.7)), law, TypeError)
    expected = [0.7]
    for _ in range(steps):
        expected.append(np.sin(expected[-1]))
    hold(number == steps, f"{name}: the body runs as long as the condition holds", f"{number} times, not {steps}")
    equal(value, expected[-1], f"{name}: what the body returns is passed on", 1e-12)
    equal(buffer[: min(steps, size)], expected[: min(steps, size)], f"{name}: buffers keep what is written", 1e-12)
    law = f"{name}: checkpoints is None, or a positive integer"
    kept: Any = loop.checkpoints
    hold(kept is None or kept >= 1, law, f"{kept!r}")
    until = jnp.asarray([0, 3, 5])
    numbers, values, buffers = jax.jit(jax.vmap(lambda until: run(loop, jnp.asarray(0.7), until)))(until)
    law = f"{name}: under vmap every lane runs as long as its own condition holds, and not at all where it is false"
    expected_numbers = np.minimum(until, loop.max_steps)
    hold(numbers == expected_numbers, law, f"{numbers} times, not {expected_numbers}")
    equal(values, np.asarray(expected)[expected_numbers], f"{law}; what the body returns is passed on", 1e-12)
    written = np.where(np.arange(size) < expected_numbers[:, None], np.resize(expected, size), 0)
    equal(buffers, written, f"{law}; buffers keep what is written", 1e-12)
    if loop.max_steps <= 10_000:
        number = jax.jit(lambda loop: run(loop, jnp.asarray(0.7), 10**6)[0])(loop)
        law = f"{name}: it ends after max_steps iterations at the latest"
        hold(number == loop.max_steps, law, f"{number}")


def check_progress(progress: AbstractProgress) -> None:
    """Raises ``LawBroken`` unless a progress meter has a positive number of ``marks`` and leaves solves unchanged.

    ``report`` is called with the fractions 0, 1/2 and 1. Raises ``TypeError`` for another kind of part.
    """
    require_double()
    require_kind(progress, AbstractProgress)
    name = type(progress).__name__
    hold(isinstance(progress.marks, int) and progress.marks > 0, f"{name}: marks is a positive integer")
    for fraction in (0.0, 0.5, 1.0):
        progress.report(fraction)
    solver = Solver(IWP(2), TS1(ODE(field)))
    told, alone = (solver.solve(U0, 0.0, 1.0, progress=meter).mean for meter in (progress, None))
    equal(told, alone, f"{name}: a solve is the same with it as without", 1e-12)
    jax.effects_barrier()
