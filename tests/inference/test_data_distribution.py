"""Data as a distribution of NumPyro: densities, draws, and NUTS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probode as po


numpyro = pytest.importorskip("numpyro")
TS = jnp.array([0.5, 1.0, 2.0])
SOLVER = po.Solver(
    po.IWP(3), po.TS1(po.ODE(lambda t, u, args: -args * u)), controller=po.IntegralController(1e-6, 1e-8)
)


def distribution(rate, **options):
    return po.data_distribution(SOLVER, 2.0, 0.0, 2.0, TS, 0.1, args=rate, **options)


@pytest.mark.thorough
def test_the_density_is_the_likelihood_and_draws_have_its_moments():
    values = jnp.array([1.0, 0.7, 0.3])
    expected = po.fenrir_log_likelihood(SOLVER, 2.0, 0.0, 2.0, po.Observations(TS, values, 0.1), args=1.0)
    np.testing.assert_allclose(distribution(1.0).log_prob(values), expected, rtol=1e-12)
    draws = distribution(1.0).sample(jax.random.key(0), (2000,))
    assert draws.shape == (2000, 3)
    np.testing.assert_allclose(np.mean(draws, axis=0), 2 * np.exp(-TS), atol=0.01)
    np.testing.assert_allclose(np.std(draws, axis=0), 0.1, rtol=0.05)
    doubled = distribution(1.0, observe=lambda t, u, args: jnp.stack([u, 2 * u]))
    assert doubled.event_shape == (3, 2)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_nuts_finds_the_posterior():
    """Against the posterior on a grid, with the exact solution."""
    values = 2 * np.exp(-1.3 * TS) + 0.1 * np.array([0.4, -0.6, 0.5])

    def model():
        rate = numpyro.sample("rate", numpyro.distributions.LogNormal(0.0, 0.5))
        numpyro.sample("data", distribution(rate), obs=values)

    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), num_warmup=200, num_samples=600, progress_bar=False)
    mcmc.run(jax.random.key(0))
    rates = np.linspace(0.3, 4.0, 4001)
    log_density = -0.5 * np.sum((values - 2 * np.exp(-rates[:, None] * TS)) ** 2, axis=1) / 0.01
    log_density += -0.5 * (np.log(rates) / 0.5) ** 2 - np.log(rates)
    weights = np.exp(log_density - log_density.max())
    mean = np.average(rates, weights=weights)
    std = np.sqrt(np.average((rates - mean) ** 2, weights=weights))
    draws = np.asarray(mcmc.get_samples()["rate"])
    assert abs(draws.mean() - mean) < 0.25 * std and 0.8 < draws.std() / std < 1.25
