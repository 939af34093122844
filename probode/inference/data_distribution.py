"""Data given parameters as a distribution of NumPyro (the extra ``numpyro``), for NUTS and its other algorithms."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..estimation.strategies import FixedIntervalSmoother
from ..information.observations import Observations
from ..solver import Solver
from .likelihoods import fenrir_log_likelihood


def data_distribution(
    solver: Solver,
    u0: PyTree,
    t0: Any,
    t1: Any,
    ts: Any,
    noise: Any,
    *,
    args: PyTree = None,
    observe: Callable | None = None,
    likelihood: Callable = fenrir_log_likelihood,
) -> Any:
    """The distribution of noisy observations of a solution, a ``numpyro.distributions.Distribution``.

    In a model ``numpyro.sample("data", probode.data_distribution(...), obs=values)``. Its log density is one of the
    likelihoods, with the uncertainty of the solver in it; where the solve fails it is minus infinity, which a sampler
    rejects. Without ``obs`` it draws data: a joint sample of the solution, and noise.

    - ``solver``, ``u0``, ``t0``, ``t1``, ``args``: as in ``fenrir_log_likelihood``; parameters of the model go into
      ``u0`` and ``args``.
    - ``ts``, ``noise``, ``observe``: as in ``Observations``; ``noise`` is one standard deviation.
    - ``likelihood``: ``fenrir_log_likelihood``, ``dalton_log_likelihood`` or ``filtering_log_likelihood``.

    Values are arrays with a leading axis of times. Raises ``ImportError`` without NumPyro, otherwise as ``likelihood``.

    >>> import jax.numpy as jnp, probode
    >>> solver = probode.Solver(probode.IWP(2), probode.TS1(probode.ODE(lambda t, u, args: -args * u)))
    >>> distribution = probode.data_distribution(solver, 1.0, 0.0, 1.0, jnp.array([0.5, 1.0]), 0.1, args=1.0)
    >>> distribution.event_shape
    (2,)
    """
    try:
        import numpyro.distributions as dist
    except ImportError as error:
        raise ImportError("data_distribution needs NumPyro: pip install 'probode[numpyro]'.") from error

    start, ts = jax.tree.map(jnp.asarray, (u0, ts))
    look = observe or (lambda t, u, args: u)
    is_pair = solver.constraint.problem.num_initial_values > 1
    seen = jax.eval_shape(lambda t, u: look(t, u[0] if is_pair else u, args), ts[0], start)

    class Data(dist.Distribution):
        support = dist.constraints.independent(dist.constraints.real, 1 + len(seen.shape))

        def __init__(self) -> None:
            super().__init__(batch_shape=(), event_shape=(*ts.shape, *seen.shape))

        def log_prob(self, value: Any) -> Any:
            data = Observations(ts, value, noise, observe=observe)
            return likelihood(solver, start, t0, t1, data, args=args)

        def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
            smoother = dataclasses.replace(solver, strategy=FixedIntervalSmoother())
            solution = smoother.solve(start, t0, t1, args=args, save_at=ts, throw=False)
            path, noisy = jax.random.split(key)
            draws = solution.sample(path, sample_shape)
            values = jax.vmap(lambda t, u: look(t, u, args))
            for _ in sample_shape:
                values = jax.vmap(values, in_axes=(None, 0))
            values = values(ts, draws)
            return values + noise * jax.random.normal(noisy, values.shape, values.dtype)

    return Data()
