"""Derivatives of solutions in time, of any order."""
