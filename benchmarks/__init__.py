"""Benchmarks of probode and its peers: run `python -m benchmarks`.

They measure the time to reach an error, gradients, smoothing, ensembles, growth with the dimension, and how well the
reported uncertainty fits the error. The peers `probdiffeq`, `diffrax` and `scipy` come with the extra `bench`.
`work_precision` and `lanes` skip those that are not installed; the other comparisons need them.
"""
