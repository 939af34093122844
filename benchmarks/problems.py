"""Twelve standard initial value problems with reference end points.

A problem is data plus one vector field `f(t, u, args)` on flat float64 arrays; `args` holds its parameters.
Every `u1` was computed by two independent high-order integrators; each problem names where its equations are from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An initial value problem `u' = f(t, u, args)` on `[t0, t1]` and its solution `u1` at `t1`.

    `acceleration`: called as `(t, x, x', args)`, the vector field of the same problem as an equation of second order,
    where it is one; `u` is then `x` followed by `x'`.
    """

    name: str
    vector_field: Callable
    u0: np.ndarray
    t0: float
    t1: float
    u1: np.ndarray
    stiff: bool
    source: str
    args: Any = None
    acceleration: Callable | None = None

    @property
    def dim(self) -> int:
        """Number of components of `u`."""
        return self.u0.size

    def until(self, t1: float) -> Problem:
        """The same problem on an interval that ends at `t1`, where the solution is not known: `u1` is NaN."""
        return dataclasses.replace(self, t1=t1, u1=np.full_like(self.u1, np.nan))

    def error(self, u: Any) -> float:
        """Largest deviation from `u1`, relative to the largest component of `u1`."""
        return float(np.max(np.abs(np.asarray(u, float).ravel() - self.u1)) / np.max(np.abs(self.u1)))


def logistic(t, u, args):
    """Growth at rate `args` towards the capacity one."""
    return args * u * (1.0 - u)


def lotka_volterra(t, u, args):
    """Prey and predator; `args` holds the rates of birth, predation, death, and reproduction."""
    birth, predation, death, reproduction = args
    prey, predator = u[0], u[1]
    return jnp.stack([(birth - predation * predator) * prey, (reproduction * prey - death) * predator])


def fitzhugh_nagumo(t, u, args):
    """Voltage and recovery of a neuron; `args = (a, b, c)`."""
    a, b, c = args
    v, r = u[0], u[1]
    return jnp.stack([c * (v - v * v * v / 3.0 + r), -(v - a + b * r) / c])


def van_der_pol(t, u, args):
    """Van der Pol's oscillator in the time scale of the slow phase; `args` is the stiffness `mu`."""
    x, v = u[0], u[1]
    return jnp.stack([v, args * ((1.0 - x * x) * v - x)])


def hires(t, u, args):
    """High irradiance response: eight species of a plant's photo-morphogenesis."""
    a, b, c, d, e, f, g, h = (u[i] for i in range(8))
    exchange = 280.0 * f * h - 1.81 * g
    return jnp.stack([
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * (f + g),
        -280.0 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        exchange,
        -exchange,
    ])  # fmt: skip


def robertson(t, u, args):
    """Three species reacting at the rates `args = (slow, fast, fastest)`."""
    slow, fast, fastest = args
    a, b, c = u[0], u[1], u[2]
    back, forth, square = fast * b * c, slow * a, fastest * b * b
    return jnp.stack([back - forth, forth - back - square, square])


def pleiades(t, u, args):
    """Seven stars of masses 1 to 7 in a plane; `u` stacks positions x, y and velocities x', y'."""
    return jnp.concatenate([u[14:], pleiades_acceleration(t, u[:14], u[14:], args)])


def pleiades_acceleration(t, positions, velocities, args):
    """The accelerations of the stars: the same problem as an equation of second order."""
    x, y = positions[:7], positions[7:]
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    # without the ones on the diagonal the distance of a star to itself would be a division by zero
    pull = (dx * dx + dy * dy + jnp.eye(7)) ** -1.5 * jnp.arange(1.0, 8.0)
    return jnp.concatenate([jnp.sum(pull * dx, axis=1), jnp.sum(pull * dy, axis=1)])


def rigid_body(t, u, args):
    """Euler's equations of a body that turns freely; `args` holds the three inertia factors."""
    a, b, c = args
    x, y, z = u[0], u[1], u[2]
    return jnp.stack([a * y * z, b * x * z, c * x * y])


def arenstorf(t, u, args):
    """A satellite near earth and moon in rotating coordinates; `args` is the moon's share of the mass."""
    x, y, dx, dy = u[0], u[1], u[2], u[3]
    moon, earth = args, 1.0 - args
    near_earth = earth * ((x + moon) * (x + moon) + y * y) ** -1.5
    near_moon = moon * ((x - earth) * (x - earth) + y * y) ** -1.5
    return jnp.stack([
        dx,
        dy,
        x + 2.0 * dy - near_earth * (x + moon) - near_moon * (x - earth),
        y - 2.0 * dx - near_earth * y - near_moon * y,
    ])  # fmt: skip


def brusselator(t, u, args):
    """Reaction and diffusion on a line between the boundary values 1 and 3; `args` is the diffusivity."""
    x, y = jnp.split(u, 2)
    reaction = x * x * y
    rate = args * (x.size + 1) ** 2
    return jnp.concatenate([
        1.0 + reaction - 4.0 * x + rate * _second_difference(x, 1.0),
        3.0 * x - reaction + rate * _second_difference(y, 3.0),
    ])  # fmt: skip


def _second_difference(x, boundary):
    ends = jnp.full(1, boundary, x.dtype)
    padded = jnp.concatenate([ends, x, ends])
    return padded[:-2] - 2.0 * x + padded[2:]


def _brusselator_start(cells: int) -> np.ndarray:
    x = np.arange(1, cells + 1) / (cells + 1)
    return np.concatenate([1.0 + np.sin(2.0 * math.pi * x), np.full(cells, 3.0)])


_PROBLEMS = [
    Problem(
        name="logistic",
        vector_field=logistic,
        args=0.5,
        u0=np.array([0.1]),
        t0=0.0,
        t1=1.0,
        u1=np.array([0.1548280989602547]),
        stiff=False,
        source="Verhulst (1838); u1 has the closed form 1 / (1 + 9 exp(-t / 2))",
    ),
    Problem(
        name="lotka_volterra",
        vector_field=lotka_volterra,
        args=(0.5, 0.05, 0.5, 0.05),
        u0=np.array([20.0, 20.0]),
        t0=0.0,
        t1=50.0,
        u1=np.array([6.479896814873224, 2.883884183537968]),
        stiff=False,
        source="Lotka (1925), Volterra (1926); the rates usual in probabilistic numerics",
    ),
    Problem(
        name="fitzhugh_nagumo",
        vector_field=fitzhugh_nagumo,
        args=(0.2, 0.2, 3.0),
        u0=np.array([-1.0, 1.0]),
        t0=0.0,
        t1=20.0,
        u1=np.array([1.8969418010146941, 0.3044810368949059]),
        stiff=False,
        source="FitzHugh (1961), Nagumo et al. (1962); the form of Ramsay et al. (2007)",
    ),
    Problem(
        name="van_der_pol_1",
        vector_field=van_der_pol,
        args=1.0,
        u0=np.array([2.0, 0.0]),
        t0=0.0,
        t1=10.0,
        u1=np.array([-2.008340782579711, 0.03290706586332746]),
        stiff=False,
        source="Hairer, Norsett, Wanner: Solving ODEs I (1993), I.16",
    ),
    Problem(
        name="van_der_pol_1e3",
        vector_field=van_der_pol,
        args=1e3,
        u0=np.array([2.0, 0.0]),
        t0=0.0,
        t1=2.1,
        u1=np.array([1.6753725648592301, -0.9266258013200526]),
        stiff=True,
        source="Hairer, Wanner: Solving ODEs II (1996), IV.1, with 1 / epsilon = mu",
    ),
    Problem(
        name="van_der_pol_1e5",
        vector_field=van_der_pol,
        args=1e5,
        u0=np.array([2.0, 0.0]),
        t0=0.0,
        t1=2.1,
        u1=np.array([1.6139849844938, -1.0056222280815]),
        stiff=True,
        source="as above; SciPy's Radau and EK1 of order 8 at 1e-12 agree to thirteen digits",
    ),
    Problem(
        name="hires",
        vector_field=hires,
        args=None,
        u0=np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057]),
        t0=0.0,
        t1=321.8122,
        u1=np.array([
            0.0007371312573325371, 0.0001442485726316126, 5.888729740967029e-05, 0.0011756513432830931,
            0.0023863561988304678, 0.006238968252740135, 0.002849998395185143, 0.002850001604814863,
        ]),
        stiff=True,
        source="Schaefer (1975); Hairer, Wanner: Solving ODEs II (1996), IV.10",
    ),
    Problem(
        name="robertson",
        vector_field=robertson,
        args=(0.04, 1e4, 3e7),
        u0=np.array([1.0, 0.0, 0.0]),
        t0=0.0,
        t1=100000.0,
        u1=np.array([0.01786592114227774, 7.274751468510205e-08, 0.9821340061102087]),
        stiff=True,
        source="Robertson (1966); Hairer, Wanner: Solving ODEs II (1996), IV.1",
    ),
    Problem(
        name="pleiades",
        vector_field=pleiades,
        acceleration=pleiades_acceleration,
        args=None,
        u0=np.array([
            3.0, 3.0, -1.0, -3.0,
            2.0, -2.0, 2.0, 3.0,
            -3.0, 2.0, 0.0, 0.0,
            -4.0, 4.0, 0.0, 0.0,
            0.0, 0.0, 0.0, 1.75,
            -1.5, 0.0, 0.0, 0.0,
            -1.25, 1.0, 0.0, 0.0,
        ]),
        t0=0.0,
        t1=3.0,
        u1=np.array([
            0.3706139143976375, 3.2372840920573096, -3.222559032418447, 0.6597091455776384,
            0.3425581707160134, 1.5621721014006236, -0.7003092922216128, -3.94343758551555,
            -3.2713809739724224, 5.225081843453887, -2.590612434977465, 1.19821369339259,
            -0.24296823449365368, 1.091449240429642, 3.4170038063166475, 1.3545845016255333,
            -2.5900655978102245, 2.025053734713938, -1.1558151001581365, -0.8072988170222076,
            0.5952396354187369, -3.7412449612323093, 0.3773459685752229, 0.9386858869526613,
            0.3667922227200645, -0.34740463537958344, 2.3449154481807892, -1.9470204342633146,
        ]),
        stiff=False,
        source="Hairer, Norsett, Wanner: Solving ODEs I (1993), II.10",
    ),
    Problem(
        name="rigid_body",
        vector_field=rigid_body,
        args=(-2.0, 1.25, -0.5),
        u0=np.array([1.0, 0.0, 0.9]),
        t0=0.0,
        t1=20.0,
        u1=np.array([0.6062038539648165, 0.6287472104501689, 0.8073851485756036]),
        stiff=False,
        source="Krogh (1973); Hairer, Norsett, Wanner: Solving ODEs I (1993), II.10 gives Euler's equations",
    ),
    Problem(
        name="arenstorf_three_body",
        vector_field=arenstorf,
        args=0.012277471,
        u0=np.array([0.994, 0.0, 0.0, -2.0015851063790824]),
        t0=0.0,
        t1=17.065216560157964,
        u1=np.array([
            0.9939999999995497, -1.1160584717680166e-12, -1.8349820274377038e-10, -2.00158510644912,
        ]),
        stiff=False,
        source="Arenstorf (1963); Hairer, Norsett, Wanner: Solving ODEs I (1993), II.0",
    ),
    Problem(
        name="brusselator_1d_32",
        vector_field=brusselator,
        args=0.02,
        u0=_brusselator_start(32),
        t0=0.0,
        t1=10.0,
        u1=np.array([
            0.9217199975633992, 0.8463139328060012, 0.7760884584320077, 0.7126245833454966,
            0.6567646173590751, 0.6087103613515626, 0.5681813381090334, 0.534585507550632,
            0.5071702627614062, 0.4851386575670072, 0.4677288604249563, 0.4542622109893825,
            0.44416799865079415, 0.43699297631975836, 0.43240220526988365, 0.4301760751475366,
            0.4302067358516402, 0.43249586336958573, 0.4371546276488167, 0.44440582164612497,
            0.45458720182276735, 0.46815403871754285, 0.485677573349428, 0.5078345020817477,
            0.5353809377040563, 0.5691030203416695, 0.6097364714537274, 0.6578504156924184,
            0.7136984311221057, 0.7770528426052784, 0.8470549064182016, 0.9221276459425181,
            3.098815870984646, 3.193898201877583, 3.282182758672304, 3.3615077890740204,
            3.4306678723533994, 3.4893233402152775, 3.5378227443531833, 3.576994750327554,
            3.6079505350920877, 3.631919070043205, 3.650122435190812, 3.6636887721864833,
            3.673595993642647, 3.680638257926913, 3.685407929150049, 3.6882872010332974,
            3.6894451831908177, 3.6888377808748958, 3.686209093676819, 3.681094362526823,
            3.6728257929038195, 3.660543958897375, 3.6432189891220235, 3.619687289671481,
            3.5887109069069423, 3.549067168902016, 3.4996748928844954, 3.4397586781529403,
            3.36904306988675, 3.287953254224044, 3.197780959158612, 3.100760404502044,
        ]),
        stiff=True,
        source="Lefever, Nicolis (1971); Hairer, Wanner: Solving ODEs II (1996), IV.1, with 32 inner points",
    ),
]  # fmt: skip

PROBLEMS = {problem.name: problem for problem in _PROBLEMS}
