"""Real problems to tight tolerances: end points from two independent high-order integrators."""

import jax.numpy as jnp
import pytest

import probode as po
from benchmarks.problems import PROBLEMS

from .helpers import first_of, name


# (problem, method, factorisation, num_derivatives): what compiles and runs in seconds; all of them are in
# `python -m benchmarks.end_points`.
CASES = [
    ("logistic", po.TS1, po.Dense(), 5),
    ("lotka_volterra", po.TS0, po.Isotropic(), 5),
    ("fitzhugh_nagumo", po.TS0, po.BlockDiagonal(), 5),
    ("van_der_pol_1", po.TS0, po.Dense(), 5),
    ("van_der_pol_1e3", po.TS1, po.Dense(), 5),
    ("robertson", po.TS1, po.Dense(), 4),
    ("rigid_body", po.TS1, po.Dense(), 5),
    ("arenstorf_three_body", po.TS0, po.Isotropic(), 5),
    ("pleiades", po.TS0, po.Isotropic(), 5),
]


@pytest.mark.parametrize(
    ("problem", "constraint", "factorisation", "nu"),
    [pytest.param(*case, id=case[0], marks=pytest.mark.thorough if i % 2 else ()) for i, case in enumerate(CASES)],
)
def test_end_points(problem, constraint, factorisation, nu):
    problem = PROBLEMS[problem]
    solver = po.Solver(
        po.IWP(nu),
        constraint(po.ODE(problem.vector_field)),
        factorisation=factorisation,
        controller=po.IntegralController(rtol=1e-9, atol=1e-12),
        loop=po.ForwardLoop(65536),
    )
    solution = solver.solve(jnp.asarray(problem.u0), problem.t0, problem.t1, args=problem.args)
    bound = 1e-3 if problem.name == "arenstorf_three_body" else 1e-6
    assert solution.result == po.Result.successful
    assert problem.error(solution.mean[-1]) < bound, name(constraint)


def arenstorf_acceleration(t, x, dx, args):
    return PROBLEMS["arenstorf_three_body"].vector_field(t, jnp.concatenate([x, dx]), args)[2:]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("problem", "acceleration", "rtols"),
    first_of(
        ("arenstorf_three_body", arenstorf_acceleration, (3e-6, 3e-8)),
        ("pleiades", PROBLEMS["pleiades"].acceleration, (1e-6, 3e-8)),
    ),
)
def test_equations_of_second_order_need_fewer_steps_as_they_are(problem, acceleration, rtols):
    # Both forms know as many derivatives of the velocity, at the tolerance with which each has an error below 1e-6.
    problem = PROBLEMS[problem]
    d = problem.dim // 2
    u0 = jnp.asarray(problem.u0)
    steps = []
    for order, field, start in ((1, problem.vector_field, u0), (2, acceleration, (u0[:d], u0[d:]))):
        solver = po.Solver(
            po.IWP(4 + order),
            po.TS0(po.ODE(field, order=order), evaluations=2),
            factorisation=po.Isotropic(),
            controller=po.IntegralController(rtols[order - 1], 1e-2 * rtols[order - 1]),
            loop=po.ForwardLoop(4096),
        )
        solution = solver.solve(start, problem.t0, problem.t1, args=problem.args)
        assert jnp.max(jnp.abs(solution.mean[-1, :d] - problem.u1[:d])) < 1e-6
        steps.append(solution.stats["num_accepted_steps"])
    assert steps[1] < steps[0]
