"""What people see: pictures, progress, objects in a terminal and in a notebook."""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

import probode as po
from probode import plots

from .helpers import first_of, left_to_nox, lotka_volterra


matplotlib.use("Agg")

U0 = jnp.array([20.0, 20.0])


def field(t, u, args):
    flat = lotka_volterra(t, jnp.stack([u["prey"], u["predators"]]), args)
    return {"prey": flat[0], "predators": flat[1]}


SMOOTHER = po.Solver(po.IWP(2), po.TS1(po.ODE(field)), strategy=po.FixedIntervalSmoother(), loop=po.BoundedLoop(256))
FILTER = po.Solver(po.IWP(2), po.TS0(po.ODE(lotka_volterra)), factorisation=po.BlockDiagonal())


@pytest.fixture(scope="module")
def smoothed():
    return SMOOTHER.solve({"prey": 20.0, "predators": 20.0}, 0.0, 5.0)


@pytest.fixture(scope="module")
def filtered():
    return FILTER.solve(U0, 0.0, 5.0, save_at=np.linspace(0.0, 5.0, 6))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_bands_are_what_they_say(smoothed):
    # the PyTree's leaves come in the order of their names: predators, prey
    ax = smoothed.plot(std=3.0, ts=[1.0, 2.0, 4.0], samples=4, components=[1])
    lines = ax.get_lines()
    posterior = smoothed.evaluate([1.0, 2.0, 4.0])
    np.testing.assert_array_equal(lines[0].get_ydata(), posterior.mean["prey"])
    draws = smoothed.sample(jax.random.key(0), (4,), ts=np.array([1.0, 2.0, 4.0]))["prey"]
    np.testing.assert_array_equal([line.get_ydata() for line in lines[1:]], draws)
    (band,) = ax.collections
    top = np.max(band.get_paths()[0].vertices[:, 1])
    assert abs(top - np.max(posterior.mean["prey"] + 3 * posterior.std["prey"])) < 1e-12
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["prey"]


def test_a_solution_that_has_kept_its_steps_is_drawn_from_the_start(smoothed):
    assert smoothed.t.size == 1
    t = smoothed.plot().get_lines()[0].get_xdata()
    assert t[0] == 0.0 and t[-1] == 5.0 and t.size == 400


EVERY = po.Solver(po.IWP(2), po.TS1(po.ODE(field)), loop=po.BoundedLoop(256))


def notes(ax):
    return "\n".join(text.get_text() for text in ax.texts)


def test_a_filter_is_drawn_at_its_steps_and_smoothly_between():
    solution = EVERY.solve({"prey": 20.0, "predators": 20.0}, 0.0, 5.0, save_at=po.SaveAt(t0=True, steps=True))
    rows = slice(int(solution.stats["num_accepted_steps"]) + 1)
    known = po.Posterior(solution.t[rows], jax.tree.map(lambda x: x[rows], solution.marginals), solution.layout)
    u, du, std = known.mean["prey"], known.derivative(1).mean["prey"], known.std["prey"]
    ax = solution.plot()
    line, band = ax.get_lines()[1], ax.collections[1]
    t, drawn = line.get_data()
    assert 200 < t.size < 800 and line.get_marker() == "."
    np.testing.assert_allclose(t[:: line.get_markevery()], known.t, rtol=1e-12)
    np.testing.assert_allclose(drawn, CubicHermiteSpline(known.t, u, du)(t), rtol=1e-9)
    edges = band.get_paths()[0].vertices[:, 1]
    for edge in (drawn + 2 * np.interp(t, known.t, std), drawn - 2 * np.interp(t, known.t, std)):
        assert np.max(np.min(abs(edges - edge[:, None]), axis=1)) < 1e-9
    assert "predictions" not in notes(ax)
    ts = np.linspace(0.0, 5.0, 7)
    asked = solution.plot(ts=ts)
    np.testing.assert_array_equal(asked.get_lines()[1].get_ydata(), solution.evaluate(ts).mean["prey"])
    assert "predictions" in notes(asked)


def test_predictions_that_were_saved_are_called_so(filtered):
    ax = filtered.plot()
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), filtered.mean[:, 0])
    assert "predictions" in notes(ax)


def there_and_back(t, u, jump):
    return jnp.where(jnp.abs(t) < jnp.abs(jump), 1.0, -1.0) * u


@pytest.mark.parametrize("jump", first_of(1.7, -1.7))
def test_a_filter_is_drawn_around_a_jump_of_the_equation(jump):
    controller = po.IntegralController(1e-4, 1e-4, stop_at=jnp.array([jump]))
    solver = po.Solver(po.IWP(3), po.TS1(po.ODE(there_and_back)), controller=controller)
    solution = solver.solve(1.0, 0.0, 2 * jump, args=jump, save_at=po.SaveAt(dense=True))
    t, drawn = solution.plot().get_lines()[0].get_data()
    np.testing.assert_allclose(drawn, np.exp(np.where(abs(t) < abs(jump), t, 2 * jump - t)), rtol=1e-3)
    assert t[-1] == 2 * jump and np.all(np.diff(t) * jump >= 0)


def test_a_band_that_cannot_be_seen_is_told_and_can_be_magnified(smoothed):
    assert notes(smoothed.plot(std=300.0)) == "band: 300 std"
    ax = smoothed.plot(std=1e-3)
    assert notes(ax).startswith("band: 0.001 std, thinner than the line (magnify=1e")
    factor = float(notes(ax).split("magnify=")[1].split(" ")[0])
    seen = smoothed.plot(std=1e-3, magnify=factor)
    assert notes(seen) == f"band: 0.001 std, magnified {factor:g} times"
    assert "thinner" in notes(smoothed.plot(std=1e-3, magnify=factor / 100))
    line, band = seen.get_lines()[0], seen.collections[0]
    t, mean = line.get_data()
    spread = smoothed.evaluate(t).std["predators"]
    i = int(np.argmax(spread))
    edges = band.get_paths()[0].vertices
    heights = np.ptp(edges[edges[:, 0] == t[i], 1])
    np.testing.assert_allclose(heights, 2e-3 * factor * spread[i], rtol=1e-9)
    draws = smoothed.sample(jax.random.key(0), (2,), ts=t)["predators"]
    lines = smoothed.plot(magnify=10.0, samples=2).get_lines()[1:3]
    np.testing.assert_allclose([line.get_ydata() for line in lines], mean + 10 * (draws - mean), rtol=1e-12)
    # the note follows the limits of the axes
    t, mean = ax.get_lines()[0].get_data()
    ax.set_ylim(mean[200] - 1e-5, mean[200] + 1e-5)
    assert notes(ax) == "band: 0.001 std"
    with pytest.raises(ValueError, match="magnify"):
        smoothed.plot(magnify=0.0)


def test_axes_say_what_is_drawn(smoothed):
    ax = smoothed.plot(derivative=1, std=400.0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time", "u'")
    assert smoothed.plot(components=[1]).get_ylabel() == "prey"
    # a second solution in the same picture leaves the label, and adds to the note
    smoothed.plot(ax, derivative=1, std=300.0)
    assert ax.get_ylabel() == "u'" and notes(ax) == "band: 400 std\nband: 300 std"
    names = plots._labels(({"x": np.ones((3, 1, 2))}, np.ones(3)), range(3), None)
    assert list(names.values()) == ["u[0].x[0, 0]", "u[0].x[0, 1]", "u[1]"]


@pytest.mark.thorough
def test_ellipses_of_a_subspace_are_those_of_its_components():
    """With as many columns as components, which are none."""
    linear = po.TS1(po.ODE(lambda t, u, args: jnp.array([1.0, 10.0, 100.0]) * -u))
    parts = {"factorisation": po.Subspace(jnp.eye(3)[:, :2]), "loop": po.BoundedLoop(256)}
    solution = po.Solver(po.IWP(2), linear, **parts).solve(jnp.ones(3), 0.0, 0.1)
    (ellipse,) = plots.plot_phase(solution, components=(0, 2), std=1.0).patches
    expected = sorted(2 * np.asarray(solution.std[0])[[0, 2]])
    np.testing.assert_allclose(sorted([ellipse.width, ellipse.height]), expected, rtol=1e-12)


@pytest.mark.thorough
def test_ellipses_are_covariances(smoothed):
    # without correlations their half axes are standard deviations
    plain = FILTER.solve(U0, 0.0, 5.0, save_at=[5.0])
    ax = plots.plot_phase(plain, std=1.0)
    (ellipse,) = ax.patches
    expected = sorted(2 * np.asarray(plain.std[0]))
    np.testing.assert_allclose(sorted([ellipse.width, ellipse.height]), expected, rtol=1e-12)
    # with them the ellipse is tangent to the box of standard deviations
    patch = plots.plot_phase(smoothed, std=1.0, ellipses=5).patches[-1]
    angle, axes = np.radians(patch.angle), np.array([patch.width, patch.height]) / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = rotation @ np.diag(axes**2) @ rotation.T
    here = smoothed.evaluate(np.linspace(0.0, 5.0, 400)[4 * 80])
    np.testing.assert_allclose(
        np.sqrt(np.diag(covariance)), [here.std["predators"], here.std["prey"]], rtol=1e-6, atol=1e-12
    )


def test_other_pictures(smoothed, filtered):
    given = plt.figure().add_subplot()
    assert filtered.plot(given, derivative=1, labels=["a", "b"]) is given
    lengths = plots.plot_steps(smoothed).get_lines()[0].get_ydata()
    np.testing.assert_allclose(np.sum(lengths), 5.0, rtol=1e-12)
    assert lengths.size == smoothed.stats["num_accepted_steps"]
    assert np.all(plots.plot_scale(filtered).get_lines()[1].get_ydata() == filtered.output_scale[:, 1])
    assert np.all(plots.plot_local_error(smoothed).get_lines()[0].get_ydata() > 0)
    residual = plots.plot_residual(smoothed, SMOOTHER.constraint.problem).get_lines()[0].get_ydata()
    assert 0 < np.max(residual) < 1
    other = po.Residual(lambda t, u, du, args: du["prey"] - field(t, u, args)["prey"])
    component = plots.plot_residual(smoothed, other).get_lines()[0].get_ydata()
    assert np.all(component <= residual + 1e-12)
    errors = plots.plot_errors(filtered, lambda t: filtered.mean + 0.5)
    np.testing.assert_allclose(errors.get_lines()[0].get_ydata(), 0.5)
    plots.plot_work_precision({"EK0": ([1.0, 2.0], [0.1, 0.01])}, work="steps")


def test_pictures_that_cannot_be_drawn(filtered, monkeypatch):
    with pytest.raises(ValueError, match="no component 2"):
        filtered.plot(components=[2])
    with pytest.raises(ValueError, match="FixedIntervalSmoother"):
        plots.plot_steps(filtered)
    with pytest.raises(ValueError, match="derivative"):
        filtered.plot(derivative=1, samples=3)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"probode\[plot\]"):
        filtered.plot()


HEARD: list[float] = []


class Recorder(po.AbstractProgress):
    marks: int = 10

    def report(self, fraction):
        HEARD.append(fraction)


def run(rate):
    solver = po.Solver(po.IWP(1), po.TS0(po.ODE(lambda t, u, args: -args * u)), loop=po.BoundedLoop(256))
    return solver.solve(jnp.ones(1), 1.0, -2.0, args=rate, progress=Recorder(), throw=False).mean[-1, 0]


@pytest.mark.parametrize(
    "transformed",
    [*left_to_nox(run, lambda x: jax.vmap(run)(jnp.stack([x, 3 * x])), jax.grad(run)), jax.jit(run)],
    ids=["plain", "vmap", "grad", "jit"],
)
def test_progress_is_reported_up_to_the_end(transformed):
    HEARD.clear()
    jax.block_until_ready(transformed(1.0))
    jax.effects_barrier()
    done = HEARD[: HEARD.index(1.0) + 1]
    assert 3 < len(done) <= 10 and done == sorted(done)


def test_progress_costs_nothing_when_it_is_off():
    def program(**options):
        solve = lambda u0: FILTER.solve(u0, 0.0, 1.0, **options).mean  # noqa: E731
        return str(jax.make_jaxpr(solve)(U0))

    assert "debug_callback" not in program() and "debug_callback" in program(progress=po.TextProgress())


def test_meters(capsys):
    po.TextProgress(marks=4).report(0.5)
    po.TextProgress(marks=4).report(1.0)
    assert capsys.readouterr().err == "\r[##..]  50 %\r[####] 100 %\n"
    with pytest.raises(TypeError, match="TextProgress"):
        FILTER.solve(U0, 0.0, 1.0, progress=True)
    with pytest.raises(ValueError, match="marks"):
        po.TextProgress(marks=0)


def test_a_bar_of_tqdm(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    bar = po.TqdmProgress()
    for fraction in (0.2, 0.1, 1.0):
        bar.report(fraction)
    assert "100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="TextProgress"):
        po.TqdmProgress()


def test_objects_are_readable(smoothed, filtered):
    assert repr(smoothed) == (
        "Solution(t=f64[1], u={'predators': f64[], 'prey': f64[]}, num_derivatives=2, smoothed, dense)"
    )
    assert repr(filtered) == "Solution(t=f64[6], u=f64[2], num_derivatives=2, filtered)"
    assert repr(filtered.state).startswith("AdaptiveState(current=State(t=5, u=f64[2], layout=Layout(BlockDiagonal()")
    assert repr(smoothed.evaluate(1.0)).startswith("Posterior(t=1, u={'predators': f64[]")
    text = repr(po.Solver(po.IWP(2), po.TS1(po.ODE(lotka_volterra)), controller=po.PIController(1e-5, 1e-7)))
    for words in ("TS1(problem=ODE(vector_field=lotka_volterra))", "rtol=1e-05", "Dense()", "BoundedLoop()"):
        assert words in text
    assert len(text.splitlines()) == 11
    for owner in (SMOOTHER, smoothed):
        assert owner._repr_html_().startswith("<table>") and "<script" not in owner._repr_html_()


@pytest.mark.thorough
def test_summaries(smoothed, filtered):
    accepted, rejected = (int(filtered.stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected"))
    text = filtered.summary()
    assert f"{accepted} accepted, {rejected} rejected, at most 4096" in text
    assert "successful" in text and "filtered" in text and "smoothed, at any time" in smoothed.summary()
    largest = max(float(jnp.max(x)) for x in jax.tree.leaves(smoothed.std))
    assert f"at most {largest:.3g}" in smoothed.summary()
    assert "; times saved: 6, from 0" in text and "; times saved: 1, from 5" in smoothed.summary()
    steps = FILTER.solve(U0, 0.0, 1.0, save_at=po.SaveAt(t0=True, steps=True))
    assert f"; times saved: {int(steps.stats['num_accepted_steps']) + 1}, from 0" in steps.summary()  # of 4097 rows
    batch = jax.vmap(lambda u0: FILTER.solve(u0, 0.0, 1.0))(jnp.stack([U0, 2 * U0]))
    assert "2 solves, of which 2 successful" in batch.summary()
    failed = FILTER.solve(jnp.array([jnp.nan, 1.0]), 0.0, 1.0, throw=False)
    assert "did not start" in failed.summary()

    def traced(u0):
        solution = FILTER.solve(u0, 0.0, 1.0)
        assert "f64[2]" in repr(solution) and "f64[2]" in solution.summary()
        return solution.mean

    jax.make_jaxpr(traced)(U0)
