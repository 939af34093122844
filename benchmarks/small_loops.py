"""Effects of XLA's options for small loops, which act on a whole process, on results and on run times.

    python -m benchmarks.small_loops [--fields 40] [--no-workloads]

Every comparison is between processes that differ in these options alone. Results: random vector fields with branches,
loops, scatters, sorts and linear solves inside are integrated on a grid and adaptively, and differentiated; the answers
must agree but for round-off. Run times: loops of other libraries, which must not become slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

from probode.util.xla import OPTION, SUMS


BATCH = 10  # fields per process: after many compiled programs XLA runs out of memory maps


def random_field(seed: int):
    """A bounded vector field made of a few random operations, control flow among them, and an initial value."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 7))
    chosen = [int(i) for i in rng.integers(0, 14, size=int(rng.integers(2, 6)))]
    matrices = [jnp.asarray(rng.normal(size=(d, d)) / d) for _ in chosen]
    shifts = [jnp.asarray(rng.normal(size=d)) for _ in chosen]

    def operation(i, t, u, a, b):
        return [
            lambda: a @ u,
            lambda: jnp.tanh(u) * b,
            lambda: lax.cond(u[0] * b[0] > 0, lambda u: jnp.sin(u) + b, lambda u: jnp.cos(a @ u), u),
            lambda: lax.switch(
                jnp.asarray(jnp.floor(2 * (1 + jnp.tanh(u[1]))), int),
                [jnp.sin, jnp.cos, jnp.tanh, lambda u: 0.1 * u],
                u,
            ),
            lambda: lax.fori_loop(0, 3, lambda k, u: jnp.sin(a @ u + k), u),
            lambda: lax.scan(lambda c, row: (jnp.tanh(c + row), c[0]), u, a)[0],
            lambda: u.at[0].set(jnp.sin(u[1])).at[jnp.array([1, 0])].add(0.1 * b[:2]),
            lambda: jnp.sort(u) * b,
            lambda: jnp.cumsum(jnp.sin(u)) / d,
            lambda: jnp.linalg.solve(jnp.eye(d) * 3 + a, jnp.cos(u)),
            lambda: jnp.where(u > b, jnp.clip(u, -1, 1), jax.nn.softplus(u) * 0.1),
            lambda: jnp.roll(u, 1) * jnp.exp(-(u**2)) + jnp.cos(t),
            lambda: jnp.interp(u, jnp.linspace(-3, 3, 7), jnp.sin(jnp.arange(7.0))),
            lambda: jax.nn.relu(jax.nn.gelu(a @ u + b)),
        ][i]()

    def field(t, u, args):
        x = u
        for i, a, b in zip(chosen, matrices, shifts, strict=True):
            x = operation(i, t, x, args * a, b)
        return jnp.tanh(x) - 0.3 * u

    return field, jnp.asarray(rng.normal(size=d))


def fuzz(first: int, last: int) -> dict:
    """End points, standard deviations and gradients of the fields with the seeds from `first` to `last - 1`."""
    import jax
    import jax.numpy as jnp

    import probode

    results = {}
    for seed in range(first, last):
        field, u0 = random_field(seed)
        constraint = [probode.TS0, probode.TS1][seed % 2](probode.ODE(field))
        layout = [probode.Isotropic(), probode.BlockDiagonal(), probode.Dense()][seed % 3]
        controller = probode.IntegralController(rtol=1e-4, atol=1e-6)
        solver = probode.Solver(probode.IWP(3), constraint, factorisation=layout, controller=controller)

        @jax.jit
        def on_a_grid(u0, a, solver=solver):
            solution = solver.solve_grid(u0, jnp.linspace(0, 1, 11), args=a)
            return solution.mean[-1], solution.std[-1]

        @jax.jit
        def adaptive(u0, a, solver=solver):
            def loss(u0):
                solution = solver.solve(u0, 0.0, 1.0, args=a, throw=False)
                return jnp.sum(jnp.sin(solution.mean[-1])), solution.mean[-1]

            (_, mean), gradient = jax.value_and_grad(loss, has_aux=True)(u0)
            return mean, gradient

        results[str(seed)] = [np.asarray(x).tolist() for x in (*on_a_grid(u0, 1.0), *adaptive(u0, 1.0))]
        jax.clear_caches()
    return results


def workloads() -> dict:
    """Loops of other libraries by name: seconds per run, seconds of compilation, and the sum of the result."""
    import blackjax
    import diffrax
    import jax
    import jax.numpy as jnp
    import optax
    from jax import lax

    def lotka_volterra(t, u, args):
        return jnp.stack([0.5 * u[0] - 0.05 * u[0] * u[1], -0.5 * u[1] + 0.05 * u[0] * u[1]])

    def stiff(t, u, args):
        return jnp.stack([u[1], 1e3 * ((1 - u[0] ** 2) * u[1] - u[0])])

    def solve(method, field, t1):
        control, term = diffrax.PIDController(rtol=1e-6, atol=1e-8), diffrax.ODETerm(field)
        return lambda u0: (
            diffrax.diffeqsolve(term, method, 0.0, t1, None, u0, stepsize_controller=control, max_steps=100_000).ys
        )

    def adam(width, batch):
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (batch, width))
        start = {"a": jax.random.normal(keys[1], (width, width)) / width, "b": jax.random.normal(keys[2], (width, 1))}
        optimiser = optax.adam(1e-3)

        def loss(p):
            return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - jnp.sin(x[:, :1])) ** 2)

        def step(carry, _):
            p, state = carry
            update, state = optimiser.update(jax.grad(loss)(p), state)
            return (optax.apply_updates(p, update), state), None

        return lambda start: lax.scan(step, (start, optimiser.init(start)), None, length=200)[0][0]["b"], start

    def nuts(d):
        def log_density(x):
            return -jnp.sum(x**2 * jnp.arange(1, d + 1)) / 2 - 0.1 * jnp.sum(x[1:] * x[:-1])

        kernel = blackjax.nuts(log_density, 0.5 / d**0.5, jnp.ones(d))

        def run(x):
            def step(state, key):
                state, _ = kernel.step(key, state)
                return state, state.position

            return lax.scan(step, kernel.init(x), jax.random.split(jax.random.key(1), 100))[1]

        return run, jnp.ones(d)

    def powers(n):
        a = jax.random.normal(jax.random.key(2), (n, n)) / n**0.5
        return lambda x: lax.fori_loop(0, 200, lambda i, x: jnp.tanh(a @ x), x), jnp.eye(n)

    def elementwise(n):
        return lambda x: lax.fori_loop(0, 200, lambda i, x: jnp.sin(x) + 0.1 * jnp.roll(x, 1), x), jnp.ones(n)

    cases = {
        "diffrax Tsit5, Lotka-Volterra": (solve(diffrax.Tsit5(), lotka_volterra, 50.0), jnp.full(2, 20.0)),
        "diffrax Dopri8, Lotka-Volterra": (
            solve(diffrax.Dopri8(), lotka_volterra, 50.0),
            jnp.full(2, 20.0),
        ),
        "diffrax Kvaerno5, Van der Pol": (solve(diffrax.Kvaerno5(), stiff, 2.1), jnp.array([2.0, 0.0])),
        "optax Adam, width 8, batch 32": adam(8, 32),
        "optax Adam, width 64, batch 128": adam(64, 128),
        "optax Adam, width 256, batch 256": adam(256, 256),
        "blackjax NUTS, d = 4": nuts(4),
        "blackjax NUTS, d = 100": nuts(100),
        **{f"loop of matrix products, {n} x {n}": powers(n) for n in (4, 16, 32, 64, 128)},
        **{f"loop of elementwise functions, {n}": elementwise(n) for n in (16, 1000, 10_000)},
    }
    results = {}
    for name, (fn, x) in cases.items():
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(x).compile()
        compiling = time.perf_counter() - start
        value, times = compiled(x), []
        while len(times) < 5 or (sum(times) < 1.0 and len(times) < 200):
            start = time.perf_counter()
            jax.block_until_ready(compiled(x))
            times.append(time.perf_counter() - start)
        results[name] = [min(times), compiling, float(jnp.sum(value))]
    return results


def in_process(what: str, threshold: int | None) -> dict:
    """The result of `what` in a process of its own, with a threshold of XLA's option or, with `None`, its default."""
    flags = "" if threshold is None else f"--xla_backend_extra_options={OPTION}={threshold} {SUMS}=-reduce"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "PROBODE_SMALL_LOOPS": "0"}
    command = [sys.executable, "-m", "benchmarks.small_loops", "--child", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{what} with threshold {threshold} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_loops", description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=40, help="how many random vector fields")
    parser.add_argument("--thresholds", type=int, nargs="*", default=[65_536, 1_000_000], help="in bytes")
    parser.add_argument("--no-workloads", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *numbers = options.child.split()
        print(json.dumps(workloads() if kind == "workloads" else fuzz(*map(int, numbers))))
        return
    for threshold in options.thresholds:
        worst, failures = [0.0, 0.0, 0.0, 0.0], []
        for first in range(0, options.fields, BATCH):
            what = f"fuzz {first} {min(first + BATCH, options.fields)}"
            plain, small = in_process(what, None), in_process(what, threshold)
            for seed, values in plain.items():
                for k, (a, b) in enumerate(zip(values, small[seed], strict=True)):
                    a, b = np.array(a), np.array(b)
                    difference = float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
                    worst[k] = max(worst[k], difference)
                    # More for adaptive solves: round-off may move a step across a kink of its field.
                    if not difference < (1e-9 if k < 2 else 1e-2):
                        failures.append((int(seed), k, difference))
        print(f"{options.fields} fields, threshold {threshold}: largest relative difference of grid mean, grid std,")
        print(f"  adaptive mean, gradient: {' '.join(f'{w:.1e}' for w in worst)}; failures: {failures or 'none'}")
    if options.no_workloads:
        return
    settings = [None, *options.thresholds]
    runs = [in_process("workloads", threshold) for threshold in settings for _ in range(2)]
    print(f"\n{'ms, compile s':<38}" + "".join(f"{s or 'default':>18}" for s in settings))
    for name in runs[0]:
        cells = []
        for i in range(len(settings)):
            pair = [runs[2 * i][name], runs[2 * i + 1][name]]
            cells.append(f"{1e3 * min(p[0] for p in pair):11.3f} {min(p[1] for p in pair):6.2f}")
        print(f"{name:<38}" + "".join(cells))


if __name__ == "__main__":
    main()
