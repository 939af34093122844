"""A little of the fuzz: the default method on equations whose solutions are known, at random tolerances and scales."""

import pytest

from benchmarks.fuzz import attempt, configurations
from benchmarks.fuzz_families import FAMILIES

from .helpers import left_to_nox


NUMBER = 12


@pytest.mark.parametrize(
    "family", ["decay", "unstable", "blow_up_ahead", *left_to_nox("oscillator", "constant", "spring")]
)
def test_the_default_is_never_wrong(family):
    default, family = configurations()["default"], FAMILIES[family]
    outcomes = [attempt(default, family, draw) for draw in family.draws(NUMBER, seed=0)]
    assert not [outcome.words or outcome.result for outcome in outcomes if outcome.flagged]
    assert sum(outcome.result == "successful" for outcome in outcomes) > NUMBER // 2


def test_no_default_solve_passes_a_singularity():
    default, family = configurations()["default"], FAMILIES["blow_up_passed"]
    outcomes = [attempt(default, family, draw) for draw in family.draws(NUMBER, seed=0)]
    assert not any(outcome.result == "successful" for outcome in outcomes)


def test_draws_are_reproducible_and_the_same_for_all_configurations():
    for family in FAMILIES.values():
        (first, second), (again, *_) = family.draws(2, seed=3), family.draws(1, seed=3)
        assert first.rtol == again.rtol != second.rtol
        assert (first.times == again.times).all()
        assert (family.draws(1, seed=3, single=True)[0].times == first.times).all()


def test_every_family_meets_several_configurations():
    met = [family.name for configuration in configurations().values() for family in configuration.families(6)]
    assert min(met.count(name) for name in FAMILIES) >= 4
