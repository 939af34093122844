"""Formulas that several tests compare with, in plain Python and NumPy, on full covariances.

States are ``(n d,)``, derivative by derivative; several of them stand one behind the other, ``(steps n d,)``.
"""

import math

import mpmath
import numpy as np


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


def iwp_transition(nu, dt, d=1):
    """``A`` and ``Q`` of ``d`` independent components: ``table (x) I``, ``(n d, n d)``."""
    return tuple(np.kron(table, np.eye(d)) for table in iwp(nu, dt))


def solve(a, b):
    """``a^-1 b`` for a positive-definite ``a`` ``(m, m)`` and ``b`` ``(m,)`` or ``(m, k)``, by Gaussian elimination.

    Of any numbers that NumPy multiplies, as are ``condition`` and ``rts_smoother``: floats, complex steps, mpmath's.
    """
    a, b = np.array(a), np.array(b)
    for i in range(len(a)):
        for j in range(i + 1, len(a)):
            ratio = a[j, i] / a[i, i]
            a[j], b[j] = a[j] - ratio * a[i], b[j] - ratio * b[i]
    for i in reversed(range(len(a))):
        b[i] = (b[i] - a[i, i + 1 :] @ b[i + 1 :]) / a[i, i]
    return b


def precise(a):
    """The array, of mpmath's numbers."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(a))


def log_density(value, mean, covariance):
    """``log N(value; mean, covariance)`` of a vector ``(m,)``."""
    deviation = value - mean
    return -(deviation @ solve(covariance, deviation) + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2


def condition(mean, covariance, h, z, noise=0):
    """Mean and covariance given that ``z + H (x - mean)`` is zero, up to noise of covariance ``R``.

    ``m - K z`` and ``(I - K H) P (I - K H)^T + K R K^T`` with ``K = P H^T (H P H^T + R)^-1``; ``H`` is ``(m, n d)``,
    ``z`` is ``(m,)``, or ``(m, cols)`` for a mean ``(n d, cols)``. Joseph's form: round-off does not grow over steps.
    """
    s = h @ covariance @ h.T
    noise = noise + np.zeros(s.shape)
    gain = solve(s + noise, h @ covariance).T
    rest = np.eye(len(covariance)) - gain @ h
    return mean - gain @ z, rest @ covariance @ rest.T + gain @ noise @ gain.T


def joint_gaussian(mean, covariance, transitions):
    """Mean and covariance of all states: ``x_0 ~ N(mean, covariance)``, then ``x_i ~ N(A x_(i-1), Q)`` for every pair.

    ``Cov(x_i, x_j)`` is ``A Cov(x_(i-1), x_j)`` for ``j < i``, and ``A Cov(x_(i-1), x_(i-1)) A^T + Q`` for ``j = i``.
    """
    size = len(mean)
    for a, q in transitions:
        cross = a @ covariance[-size:]
        mean = np.concatenate([mean, a @ mean[-size:]])
        covariance = np.block([[covariance, cross.T], [cross, cross[:, -size:] @ a.T + q]])
    return mean, covariance


def kalman_filter(mean, covariance, transitions, linearise, noise=0):
    """Mean and covariance of the last state given an equation at the end of every ``(A, Q)``, and the log evidence.

    Predicts ``A m`` and ``A P A^T + Q``, then ``condition``s on ``H, z = linearise(i, m)`` of step ``i = 1, 2, ...``.
    """
    evidence = 0.0
    for i, (a, q) in enumerate(transitions, 1):
        mean, covariance = a @ mean, a @ covariance @ a.T + q
        h, z = linearise(i, mean)
        evidence += log_density(z, 0, h @ covariance @ h.T + noise)
        mean, covariance = condition(mean, covariance, h, z, noise)
    return mean, covariance, evidence


def rts_smoother(earlier, cross, predicted, later):
    """Mean and covariance of an earlier state once a later one, ``predicted`` from it, is known to be as ``later``.

    Rauch, Tung, Striebel (1965): ``m_0 + G (m_s - m)`` and ``P_0 + G (P_s - P) G^T`` with ``G = C^T P^-1``, where
    ``cross`` is ``C``, the covariance of the later state with the earlier; the others are pairs of mean and covariance.
    """
    (mean_0, covariance_0), (mean, covariance), (mean_s, covariance_s) = earlier, predicted, later
    gain = solve(covariance, cross).T
    return mean_0 + gain @ (mean_s - mean), covariance_0 + gain @ (covariance_s - covariance) @ gain.T
