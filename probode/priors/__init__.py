"""Gauss-Markov priors and their transitions over a time step."""
