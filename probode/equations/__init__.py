"""Differential equations: problems, Jacobians, Taylor coefficients of solutions."""
