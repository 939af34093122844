"""Events: are all roots found, and only these, and what does it cost: `python -m benchmarks.events`.

Random affine functions of random linear systems with two components: how many roots of the exact solution are missed
and how many are invented, but for those within 1e-4 of touching (relative to the size of the function). Then the run
time and the time to compile a gradient with an event that never happens, over those without.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from .timing import compare, parse, result_file, versions, write_rows


SPAN, MOST, FINE = 10.0, 24, 4000
TOUCHES = 1e-4


def draws(number: int) -> tuple[np.ndarray, ...]:
    """Systems that decay or grow slowly and oscillate, starts, and affine functions that cross zero sometimes."""
    rng = np.random.default_rng(0)
    rate, frequency = rng.uniform(-0.3, 0.1, number), rng.uniform(0.2, 5.0, number)
    mixing = rng.normal(size=(number, 2, 2)) + 2 * np.eye(2)
    inner = np.stack([np.stack([rate, -frequency], -1), np.stack([frequency, rate], -1)], -2)
    systems = np.linalg.solve(mixing, inner @ mixing)
    starts, weights = rng.normal(size=(number, 2)), rng.normal(size=(number, 2))
    size = np.abs(np.einsum("ni,ni->n", weights, starts)) + np.linalg.norm(weights, axis=1)
    return systems, starts, weights, rng.uniform(-1, 1, number) * size


def exact(systems, starts, weights, levels, ts):
    """The functions at the times, `(number, times)`."""
    values, vectors = np.linalg.eig(systems)
    start = np.linalg.solve(vectors, starts[..., None].astype(complex))[..., 0]
    shares = np.einsum("ni,nij->nj", weights.astype(complex), vectors) * start
    return np.einsum("nj,njt->nt", shares, np.exp(values[:, :, None] * ts)).real - levels[:, None]


def roots(number: int) -> dict:
    """How many roots are missed and invented at a relative tolerance of 1e-6."""
    import probode as po

    systems, starts, weights, levels = draws(number)
    event = po.Event(lambda t, u, args: args[1] @ u - args[2], terminal=False)
    solver = po.Solver(
        po.IWP(4),
        po.TS1(po.ODE(lambda t, u, args: args[0] @ u)),
        controller=po.IntegralController(rtol=1e-6, atol=1e-9),
    )
    args = tuple(jnp.asarray(x) for x in (systems, weights, levels))
    solutions = po.solve_ensemble(
        solver, jnp.asarray(starts), 0.0, SPAN, args=args, in_axes=(0, None, None, 0), events=event, max_events=MOST
    )
    found, counts = np.asarray(solutions.events.t), np.asarray(solutions.events.count)
    ts = np.linspace(0, SPAN, FINE + 1)
    values = exact(systems, starts, weights, levels, ts)
    change = values[:, 1:] * values[:, :-1] < 0
    # Local extrema near zero, and the ends: there it is a matter of round-off whether there is a root.
    inner = values[:, 1:-1]
    extremum = (inner - values[:, :-2]) * (values[:, 2:] - inner) <= 0
    scale = np.max(np.abs(values), axis=1, keepdims=True)
    # On a grid of times an extremum is missed by a part of the change from one to the next.
    near = np.any(
        extremum & (np.abs(inner) < TOUCHES * scale + np.abs(values[:, 2:] - 2 * inner + values[:, :-2])), axis=1
    )
    near |= np.any(np.abs(values[:, [0, -1]]) < TOUCHES * scale, axis=1)
    wrong = counts - np.sum(change, axis=1)
    errors = []
    for i in np.flatnonzero(~near & (wrong == 0)):
        places = np.flatnonzero(change[i])
        a, b = values[i, places], values[i, places + 1]
        true = ts[places] + (ts[places + 1] - ts[places]) * a / (a - b)
        errors.append(np.max(np.abs(found[i, : counts[i]] - true), initial=0.0))
    return {
        "solves": number,
        "roots": int(np.sum(change[~near])),
        "left_out": int(np.sum(near)),
        "missed": int(np.sum(np.maximum(-wrong, 0)[~near])),
        "invented": int(np.sum(np.maximum(wrong, 0)[~near])),
        "failed": int(np.sum(np.asarray(solutions.result != po.Result.successful))),
        "largest_error": float(max(errors)),
    }


def cost() -> dict:
    """What an event that never happens costs, and one with a reset: run time and compile time of a gradient."""
    import probode as po

    def field(t, u, args):
        return jnp.stack([0.5 * u[0] - 0.05 * u[0] * u[1], -0.5 * u[1] + 0.05 * u[0] * u[1]])

    controller = po.IntegralController(rtol=1e-5, atol=1e-7)
    solver = po.Solver(po.IWP(4), po.TS1(po.ODE(field)), controller=controller)
    never = po.Event(lambda t, u, args: u[0] - 1000.0)
    back = po.Event(lambda t, u, args: u[0] - 1000.0, reset=lambda t, u, args: u)
    kinds = {"without": None, "event": never, "reset": back}

    def end(u0, events):
        return jnp.sum(solver.solve(u0, 0.0, 20.0, events=events).mean[0])

    u0 = jnp.asarray([20.0, 20.0])
    runs = compare({k: (lambda u0, e=e: end(u0, e), (u0,)) for k, e in kinds.items()}, repeats=200)
    gradients = compare({k: (jax.grad(lambda u0, e=e: end(u0, e)), (u0,)) for k, e in kinds.items()}, repeats=20)
    row = {}
    for kind in ("event", "reset"):
        row[f"{kind}_run"] = runs[kind].fastest / runs["without"].fastest
        row[f"{kind}_compile"] = runs[kind].compile_seconds / runs["without"].compile_seconds
        row[f"{kind}_gradient_run"] = gradients[kind].fastest / gradients["without"].fastest
        row[f"{kind}_gradient_compile"] = gradients[kind].compile_seconds / gradients["without"].compile_seconds
    return row


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000, help="how many random systems")
    options = parse(parser)

    import probode as probode  # sets XLA's options, which JAX reads when it starts its backend

    jax.config.update("jax_enable_x64", True)
    row = roots(options.number) | cost()
    for name, value in row.items():
        print(f"{name:>24}: {value:.4g}")
    write_rows(result_file("events", options.output), [row | versions()])


if __name__ == "__main__":
    main()
