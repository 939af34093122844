"""The benchmarks' own arithmetic, and that the results that are kept are complete."""

import math

import pytest

from benchmarks import dimension, summary


def test_every_target_has_been_measured_and_every_miss_is_explained():
    table = summary.targets(summary.Results())
    assert len(table) >= 20
    for target in table:
        assert target.measured > 0, target.work  # infinite where a peer never gets to the error
        assert target.met or target.why, target.work
    text = summary.report(summary.RESULTS)
    assert text.count("missed [") == sum(not target.met for target in table)


def test_the_fastest_row_that_is_good_enough():
    rows = [
        {"error": e, "run_seconds_min": s} for e, s in (("1e-3", "1"), ("1e-8", "3"), ("1e-7", "2"), ("nan", "0.1"))
    ]
    assert summary.fastest(rows, lambda row: True, 1e-7, "run_seconds_min") == 2
    assert math.isnan(summary.fastest(rows, lambda row: False, 1, "run_seconds_min"))
    assert summary.fastest(rows, lambda row: True, 1e-9, "run_seconds_min") == math.inf


def test_growth_is_the_exponent():
    assert dimension.slope({10: 3.0, 100: 30.0 * 10**0.5, 1000: 3.0 * 10**3}) == pytest.approx(1.5)
