"""Time of first calls, which compile: `python -m benchmarks.first_calls`.

Each feature is called in a process of its own, twice: the first call compiles. A second process finds what the first
has compiled in JAX's cache on disk (`jax_compilation_cache_dir`). Lotka-Volterra on [0, 10] at the default tolerances;
imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from .timing import parse, result_file, small_loops, timed, versions, write_rows


U0, SPAN, RATES = (20.0, 20.0), (0.0, 10.0), (0.5, 0.05, 0.5, 0.05)
TIMES = np.linspace(*SPAN, 20)


def _field(t, u, args):
    birth, hunt, death, feed = args
    return jnp.stack([birth * u[0] - hunt * u[0] * u[1], -death * u[1] + feed * u[0] * u[1]])


def _solved(method="EK1", **options):
    import probode as po

    return po.solve_ivp(_field, SPAN, jnp.asarray(U0), args=jnp.asarray(RATES), method=method, **options)


def _end(birth, method="EK1"):
    import probode as po

    rates = jnp.asarray(RATES).at[0].set(birth)
    return jnp.sum(po.solve_ivp(_field, SPAN, jnp.asarray(U0), args=rates, method=method).mean)


def _smoothed(birth):
    import probode as po

    rates = jnp.asarray(RATES).at[0].set(birth)
    solved = po.solve_ivp(
        _field, SPAN, jnp.asarray(U0), args=rates, dense_output=True, num_derivatives=5, max_steps=256
    )
    return jnp.sum(solved.mean)


def _likelihood(birth):
    import probode as po

    solver = po.Solver(po.IWP(3), po.TS0(po.ODE(_field)), factorisation=po.BlockDiagonal(), loop=po.BoundedLoop(256))
    data = po.Observations(jnp.asarray(TIMES[1:]), jnp.full((len(TIMES) - 1, 2), 15.0), 1.0)
    rates = jnp.asarray(RATES).at[0].set(birth)
    return po.fenrir_log_likelihood(solver, jnp.asarray(U0), *SPAN, data, args=rates)


def _step():
    import probode as po

    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(_field)))
    return solver.step(solver.init(jnp.asarray(U0), 0.0, args=jnp.asarray(RATES)), 0.1, args=jnp.asarray(RATES))


def _uncertain():
    import probode as po

    start = po.Normal(jnp.asarray(U0), jnp.ones(2))
    return po.solve_ivp(_field, SPAN, start, args=jnp.asarray(RATES))


def _diffrax(name, differentiate=False):
    import diffrax

    def end(birth):
        rates = jnp.asarray(RATES).at[0].set(birth)
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-6)
        term, method = diffrax.ODETerm(_field), getattr(diffrax, name)()
        parts = {"args": rates, "stepsize_controller": controller}
        return jnp.sum(diffrax.diffeqsolve(term, method, *SPAN, None, jnp.asarray(U0), **parts).ys)

    return (jax.value_and_grad(end) if differentiate else end)(0.5)


CASES = {
    "EK1, end": lambda: _solved(),
    "EK0, end": lambda: _solved("EK0"),
    "Taylor, end": lambda: _solved("Taylor"),
    "EK1, smoothed at 20 times": lambda: _solved(t_eval=TIMES),
    "EK1, dense": lambda: _solved(dense_output=True),
    "EK1, dense, evaluated": lambda: _solved(dense_output=True).evaluate(TIMES).mean,
    "EK1, dense, ten samples": lambda: _solved(dense_output=True).sample(jax.random.key(0), (10,), ts=TIMES),
    "EK1, uncertain start": _uncertain,
    "init and step": _step,
    "EK1, value and gradient": lambda: jax.value_and_grad(_end)(0.5),
    "EK1, smoothed, Hessian": lambda: jax.hessian(_smoothed)(0.5),
    "EK0, value and gradient": lambda: jax.value_and_grad(lambda birth: _end(birth, "EK0"))(0.5),
    "Taylor, value and gradient": lambda: jax.value_and_grad(lambda birth: _end(birth, "Taylor"))(0.5),
    "Fenrir's likelihood, value and gradient": lambda: jax.value_and_grad(_likelihood)(0.5),
    "diffrax Tsit5, end": lambda: _diffrax("Tsit5"),
    "diffrax Tsit5, value and gradient": lambda: _diffrax("Tsit5", differentiate=True),
    "diffrax Kvaerno5, end": lambda: _diffrax("Kvaerno5"),
    "diffrax Kvaerno5, value and gradient": lambda: _diffrax("Kvaerno5", differentiate=True),
}


def measure(case: str) -> dict:
    """The seconds of the first and of the second call of a case, in this process."""
    import probode  # noqa: F401

    jnp.ones(2).block_until_ready()
    first, _ = timed(CASES[case])
    again, _ = timed(CASES[case])
    return {"first": first, "again": again}


def _in_a_process(case, cache):
    code = (
        "import jax, json; jax.config.update('jax_enable_x64', True); "
        f"jax.config.update('jax_compilation_cache_dir', {cache!r}); "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0); "
        f"from benchmarks.first_calls import measure; print(json.dumps(measure({case!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all cases, print them and write the table."""
    options = parse(argparse.ArgumentParser(prog="python -m benchmarks.first_calls", description=__doc__))
    small_loops()  # asked for before JAX has a backend, after which it cannot be had
    rows = []
    print(f"{'':<42}{'first s':>9}{'from disk':>11}{'again ms':>10}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as cache:
            fresh, cached = _in_a_process(case, cache), _in_a_process(case, cache)
        row = {"case": case, "first_seconds": fresh["first"], "from_disk_seconds": cached["first"]}
        rows.append({**row, "again_seconds": fresh["again"], **versions()})
        print(f"{case:<42}{fresh['first']:>9.2f}{cached['first']:>11.2f}{1e3 * fresh['again']:>10.2f}", flush=True)
    write_rows(result_file("first_calls", options.output), rows)


if __name__ == "__main__":
    main()
