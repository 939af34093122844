"""Formulas from papers that several tests compare with, in plain Python."""

import math


def iwp(nu, dt):
    """``A`` and ``Q`` of the ``nu`` times integrated Wiener process over ``dt``, as tables of numbers like ``dt``.

    Kersting, Sullivan, Hennig (2020), "Convergence rates of Gaussian ODE filters", eq. (A.1), for a step of either
    sign; a ``Fraction`` makes them exact.
    """
    n, size, sign = nu + 1, abs(dt), 1 if dt > 0 else -1
    a = [[dt ** (j - i) / math.factorial(j - i) if j >= i else 0 * dt for j in range(n)] for i in range(n)]

    def q(i, j):
        power = 2 * nu + 1 - i - j
        return sign ** (i + j) * size**power / (power * math.factorial(nu - i) * math.factorial(nu - j))

    return a, [[q(i, j) for j in range(n)] for i in range(n)]
