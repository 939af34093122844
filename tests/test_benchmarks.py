"""The benchmarks' own arithmetic, and that the results that are kept are complete."""

import math

import pytest

from benchmarks import dimension, summary


def test_every_target_has_been_measured():
    table = summary.targets()
    assert len(table) >= 20
    for work, peer, _, ratio, _ in table:
        assert ratio > 0, (work, peer)  # infinite where a peer never gets to the error


def test_the_fastest_row_that_is_good_enough():
    rows = [
        {"error": e, "run_seconds_min": s} for e, s in (("1e-3", "1"), ("1e-8", "3"), ("1e-7", "2"), ("nan", "0.1"))
    ]
    assert summary.fastest(rows, lambda row: True, 1e-7) == 2
    assert math.isnan(summary.fastest(rows, lambda row: False, 1))
    assert summary.fastest(rows, lambda row: True, 1e-9) == math.inf


def test_growth_is_the_exponent():
    assert dimension.slope({10: 3.0, 100: 30.0 * 10**0.5, 1000: 3.0 * 10**3}) == pytest.approx(1.5)
