"""Families of equations with known solutions, for `benchmarks.fuzz`: fields, draws, solutions, and the list of all.

Solutions are closed forms where there are any, otherwise SciPy's with an error close to round-off. Families with
`well_posed=False` are those on which no solver that evaluates the field at some times can be sure of its answer.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from . import problems
from .fuzz_draws import Family, integrate


def _log_uniform(rng, low, high, size=None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _columns(*components):
    return np.stack(components, axis=-1)


# Fields, then draws, then solutions, in the order of the list below.


def decay(x, v, p):
    return -p * v


def oscillator(x, v, p):
    return p * jnp.stack([v[1], -v[0]])


def flame(x, v, p):
    return v**2 - v**3


def lorenz(x, v, p):
    return jnp.stack([p[0] * (v[1] - v[0]), v[0] * (p[1] - v[2]) - v[1], v[0] * v[1] - p[2] * v[2]])


def forced(x, v, p):
    return -p * (v - jnp.cos(x))


def unstable(x, v, p):
    return p * (v - jnp.cos(x)) - jnp.sin(x)


def polynomial(x, v, p):
    return jnp.polyval(p, x) + 0 * v


def constant(x, v, p):
    return p + 0 * v


def pulse(x, v, p):
    return jnp.exp(-(((x - p[0]) / p[1]) ** 2)) - 0.1 * v


def kinks(x, v, p):
    return jnp.sign(p - x) + 0 * v


def border(x, v, p):
    return -2 * jnp.sqrt(p * v)


def turning(x, v, p):
    return p * jnp.sqrt(1 - v**2)


def blow_up(x, v, p):
    return p * v**2


def robertson(x, v, p):
    return problems.robertson(x, v, (0.04, 1e4, 3e7))


def robertson_dae(x, v, dv, p):
    f = robertson(x, v, p)
    return jnp.stack([dv[0] - f[0], dv[1] - f[1], v[0] + v[1] + v[2] - 1])


def cubic_dae(x, v, dv, p):
    return jnp.stack([dv[0] + p[0] * v[1], v[1] + v[1] ** 3 - v[0]])


def spring(x, v, dv, p):
    return -(p**2) * v


def kepler(x, v, dv, p):
    return -v * (v[0] ** 2 + v[1] ** 2) ** -1.5


def _draw_dae(rng):
    v = rng.integers(2, 13) / 8  # so that v + v^3 is exact in single precision
    return [_log_uniform(rng, 0.1, 10)], [v + v**3, v], rng.uniform(0.5, 3)


def _draw_kepler(rng):
    e = rng.uniform(0, 0.9)
    return [0.0], [[1 - e, 0.0], [0.0, math.sqrt((1 + e) / (1 - e))]], 2 * math.pi * rng.uniform(0.1, 2)


def _draw_stiff_van_der_pol(rng):
    return _log_uniform(rng, 30, 3e3), [2.0, 0.0], rng.uniform(0.2, 2)


def _draw_kinks(rng):
    end = rng.uniform(0.5, 3)
    return end * rng.uniform(0.05, 0.95, 2), [0.0, 0.0], end


def _draw_constant(rng):
    return rng.choice([0.0, 1.0, -3.0, rng.normal()], 2), rng.choice([0.0, 1.0, rng.normal()], 2), rng.uniform(0.5, 5)


def _draw_unstable(rng):
    rate = rng.uniform(0.5, 8)
    return rate, [1.0], rng.uniform(1, 8) / rate


def _of_forced(p, start, x):
    homogeneous = (start[0] - p**2 / (p**2 + 1)) * np.exp(-p * x)
    return _columns((p**2 * np.cos(x) + p * np.sin(x)) / (p**2 + 1) + homogeneous)


def of_pulse(p, start, x):
    """The solution of `pulse` from `v(0) = 0`: the convolution of the pulse with the exponential decay."""
    shift, erf = 0.05 * p[1], np.vectorize(math.erf)
    total = erf((x - p[0]) / p[1] - shift) - erf(-p[0] / p[1] - shift)
    return _columns(p[1] * math.sqrt(math.pi) / 2 * np.exp(shift**2 - 0.1 * (x - p[0])) * total)


def _of_flame(p, start, x):
    from scipy.special import lambertw

    a = 1 / start[0, 0] - 1
    return _columns(1 / (lambertw(a * np.exp(a - x)).real + 1))


def _of_cubic_dae(p, start, x):
    from scipy.special import lambertw

    v = start[0, 1]
    second = np.sqrt(lambertw(3 * v**2 * np.exp(3 * v**2 - 2 * p[0] * x)).real / 3)
    return _columns(second + second**3, second)


def _of_kepler(p, start, x):
    """The orbit from its point closest to the centre, by Newton's method on Kepler's equation."""
    near, speed = start[0, 0], start[1, 1]
    axis = 1 / (2 / near - speed**2)
    e, mean = 1 - near / axis, x * axis**-1.5
    anomaly = mean + e * np.sin(mean)
    for _ in range(50):
        anomaly -= (anomaly - e * np.sin(anomaly) - mean) / (1 - e * np.cos(anomaly))
    return _columns(axis * (np.cos(anomaly) - e), axis * math.sqrt(1 - e**2) * np.sin(anomaly))


def _of_blow_up(p, start, x):
    return _columns(np.where(p * x < 1, 1 / np.where(p * x < 1, 1 - p * x, 1), np.inf))


def _of_polynomial(p, start, x):
    return _columns(np.polyval(np.polyint(p), x) + start[0, 0])


def _of_robertson(p, start, x):
    return integrate(robertson, p, start[0], x, stiff=True, atol=1e-20)


_FAMILIES = [
    Family(
        "decay",
        decay,
        lambda rng: (_log_uniform(rng, 0.1, 1e3, 2), [1.0, 1.0], rng.uniform(0.5, 5)),
        lambda p, start, x: np.exp(-p * x[:, None]),
    ),
    Family(
        "oscillator",
        oscillator,
        lambda rng: (_log_uniform(rng, 0.5, 50), [1.0, 0.0], rng.uniform(0.5, 5)),
        lambda p, start, x: _columns(np.cos(p * x), -np.sin(p * x)),
    ),
    Family(
        "logistic",
        problems.logistic,
        lambda rng: (rng.uniform(0.5, 2), [_log_uniform(rng, 1e-3, 0.5)], rng.uniform(0.5, 15)),
        lambda p, start, x: _columns(start[0, 0] / (start[0, 0] + (1 - start[0, 0]) * np.exp(-p * x))),
    ),
    Family(
        "flame",
        flame,
        lambda rng: ([0.0], [v := _log_uniform(rng, 0.02, 0.5)], rng.uniform(0.2, 2) / v),
        _of_flame,
    ),
    Family(
        "lotka_volterra",
        problems.lotka_volterra,
        lambda rng: (_log_uniform(rng, 0.3, 1.5, 4), _log_uniform(rng, 0.3, 3, 2), rng.uniform(1, 20)),
        accuracy=1e-12,
    ),
    Family(
        "van_der_pol",
        problems.van_der_pol,
        lambda rng: (_log_uniform(rng, 0.1, 10), [2.0, 0.0], rng.uniform(1, 10)),
        accuracy=1e-10,
    ),
    Family(
        "van_der_pol_stiff",
        problems.van_der_pol,
        _draw_stiff_van_der_pol,
        stiff=True,
        accuracy=1e-9,
    ),
    Family(
        "robertson",
        robertson,
        lambda rng: ([0.0], [1.0, 0.0, 0.0], _log_uniform(rng, 1, 1e6)),
        _of_robertson,
        stiff=True,
        small=1e-6,
        accuracy=1e-11,
    ),
    Family("forced", forced, lambda rng: (_log_uniform(rng, 1, 300), [0.0], rng.uniform(0.5, 10)), _of_forced),
    Family(
        "relaxation",
        forced,
        lambda rng: (_log_uniform(rng, 1e3, 1e6), [0.0], rng.uniform(0.5, 10)),
        _of_forced,
        stiff=True,
    ),
    Family("unstable", unstable, _draw_unstable, lambda p, start, x: _columns(np.cos(x)), accuracy=1e-13),
    Family("polynomial", polynomial, lambda rng: (rng.normal(size=7), [0.0], rng.uniform(0.5, 3)), _of_polynomial),
    Family("constant", constant, _draw_constant, lambda p, start, x: start[0] + p * x[:, None]),
    Family("kinks", kinks, _draw_kinks, lambda p, start, x: np.minimum(x[:, None], 2 * p - x[:, None])),
    Family(
        "pulses",
        pulse,
        lambda rng: ([rng.uniform(0, 10), _log_uniform(rng, 0.01, 1)], [0.0], 10.0),
        of_pulse,
        well_posed=False,
    ),
    Family(
        "border",
        border,
        lambda rng: (p := rng.uniform(0.5, 2), [1.0], (1 - 10 ** rng.uniform(-6, -0.5)) / math.sqrt(p)),
        lambda p, start, x: _columns((1 - np.sqrt(p) * x) ** 2),
    ),
    Family(
        "border_turning",
        turning,
        lambda rng: (rng.uniform(0.5, 2), [0.0], rng.uniform(1, 5)),
        lambda p, start, x: _columns(np.sin(np.minimum(p * x, math.pi / 2))),
        well_posed=False,
    ),
    Family(
        "blow_up_ahead",
        blow_up,
        lambda rng: (p := rng.uniform(0.5, 2), [1.0], rng.uniform(0.3, 0.99) / p),
        _of_blow_up,
        accuracy=1e-13,
    ),
    Family(
        "blow_up_passed",
        blow_up,
        lambda rng: (p := rng.uniform(0.5, 2), [1.0], rng.uniform(1.01, 5) / p),
        _of_blow_up,
        well_posed=False,
    ),
    Family(
        "lorenz",
        lorenz,
        lambda rng: ([10.0, 28.0, 8 / 3], rng.normal([1.0, 1.0, 20.0]), rng.uniform(0.5, 6)),
        accuracy=1e-10,
    ),
    Family("dae", cubic_dae, _draw_dae, _of_cubic_dae, residual=True, accuracy=1e-13),
    Family(
        "dae_robertson",
        robertson_dae,
        lambda rng: ([0.0], [1.0, 0.0, 0.0], _log_uniform(rng, 1, 1e6)),
        _of_robertson,
        residual=True,
        stiff=True,
        small=1e-6,
        accuracy=1e-11,
    ),
    Family(
        "spring",
        spring,
        lambda rng: (_log_uniform(rng, 0.5, 50), [[1.0], [0.0]], rng.uniform(0.5, 5)),
        lambda p, start, x: _columns(np.cos(p * x)),
        order=2,
    ),
    Family("kepler", kepler, _draw_kepler, _of_kepler, order=2, accuracy=1e-12),
]

FAMILIES = {family.name: family for family in _FAMILIES}
