"""The benchmarks' own arithmetic, and that the results that are kept are complete."""

import math

import pytest

from benchmarks import dimension, summary, tables


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


def test_the_tables_of_the_page_are_those_of_the_results():
    page = tables.PAGE.read_text()
    assert tables.renewed(page) == page, "python -m benchmarks.tables writes them anew"
    assert (summary.RESULTS / "summary.txt").read_text() == summary.report(summary.RESULTS) + "\n"


def test_what_was_changed_by_hand_is_found():
    page = tables.PAGE.read_text()
    emptied = tables.MARKED.sub(r"\1\2", page)
    assert len(emptied) < len(page)
    assert tables.renewed(emptied) == page
    first, *others = tables.quoted()
    assert tables.missing(" and\n".join(others)) == [first]


def test_phrases_with_figures_agree_with_the_results():
    assert tables.missing(tables.PAGE.read_text()) == []


def test_every_wrong_answer_has_a_cause():
    posed = [row for row in summary.read("fuzz") if row["well_posed"] == "yes"]
    causes = tables.wrong_by_cause(posed)
    assert "something else" not in causes
    assert sum(map(len, causes.values())) == sum(int(row["wrong"]) > 0 for row in posed)


def test_every_table_has_its_place():
    with pytest.raises(ValueError, match="must mark each of the tables"):
        tables.renewed("<!-- table: speed -->\n<!-- end -->\n")


def test_two_significant_digits():
    numbers = {1373.4: "1400", 39.9: "40", 9.96: "10", 2.96: "3.0", 0.0687: "0.069", 0.000044: "4.4e-5", 0.0: "0.0"}
    for number, text in numbers.items():
        assert tables.significant(number) == text


def test_runs_are_named_by_their_method():
    names = {
        "EK0 twice(5) state integral 0.95": "EK0(5) twice evaluated",
        "2nd EK0 twice(8) residual": "EK0(8) twice evaluated",
        "EK1(4) residual pi 0.9": "EK1(4)",
        "Kvaerno5 pi": "Kvaerno5",
    }
    for parts, name in names.items():
        assert tables.Run("", parts, 1.0, 0.0).name == name


def test_a_peer_that_misses_the_error_is_said_to():
    """Not left out, which would read as if it had not been tried."""
    runs = [tables.Run("probdiffeq", "TS1(5)", 3.0, 1e-6), tables.Run("probdiffeq", "TS1(7)", 1.0, 1e-3)]
    assert tables._ratio(runs, "probdiffeq", 1e-7, 2.0) == "1.5x, only to 1.0e-6"
    assert tables._ratio(runs, "scipy", 1e-7, 2.0) == ""
    assert tables.fastest(runs, "probdiffeq", math.inf).seconds == 1.0
