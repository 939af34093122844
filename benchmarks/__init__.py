"""Benchmarks of probode and its peers: run `python -m benchmarks`.

Work-precision tables (time to reach an error) and end points of standard problems.
The peers are optional: `probdiffeq`, `diffrax` and `scipy` of the extra `bench`; missing ones are skipped.
"""
