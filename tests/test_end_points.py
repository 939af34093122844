"""Real problems to tight tolerances: end points from two independent high-order integrators."""

import jax.numpy as jnp
import pytest

import probode as po
from benchmarks.problems import PROBLEMS

from .helpers import name


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


@pytest.mark.parametrize(("problem", "constraint", "factorisation", "nu"), CASES, ids=[case[0] for case in CASES])
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
