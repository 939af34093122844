"""Differential equations: problems, their Jacobians, Taylor coefficients of their solutions."""
