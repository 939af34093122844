"""Likelihoods of data under a solution, tempering of these, and the iterated smoother."""
