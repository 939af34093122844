"""Builds the site: `python .docs/build.py`, or `nox -s docs`; `--quick` does not execute the guides.

Pages are gathered in `.docs/build/pages`: those written by hand from `.docs/pages`, guides from `examples/`, the
reference from the docstrings, and some READMEs of the repository. MkDocs then writes the site to `site/`.
"""

import argparse
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import docstrings
import figures
import guides
import links
import nbformat

import probode
from probode.stepping.result import in_words


HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
BUILD = HERE / "build"
PAGES = BUILD / "pages"
SITE = ROOT / "site"
LEAST_PAGES = 40

# Pages from files of the repository.
COPIED = {
    "learning.md": "probode/inference/README.md",
    "map.md": "probode/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": ".github/CHANGELOG.md",
    "contributing.md": ".github/CONTRIBUTING.md",
}
# Where links to other files of the repository lead.
ELSEWHERE = {
    "README.md": "index.md",
    "examples/README.md": "guides/index.md",
    "examples/README.md#choosing": "choosing.md",
    "probode/testing/README.md": "own_parts.md",
    ".github/CITATION.cff": "citing.md",
}
# Guides are in the order of examples/README.md; each of these groups starts with the guide that is named.
GROUPS = {
    "quickstart": "First steps",
    "observing_derivatives": "Priors and derivatives",
    "equations_of_all_kinds": "Equations",
    "switches_and_events": "Events",
    "boundary_values": "Conditions at both ends",
    "ensembles": "Many solves, and gradients",
    "three_likelihoods": "Learning from data",
    "your_own_parts": "Further",
}
# The reference: every public name, by theme. Functions of probode.testing and probode.plots have their own pages.
REFERENCE = {
    "Solving": ["solve_ivp", "Solver", "solve_ensemble", "solve_bvp", "solve_periodic", "compile_small_loops"],
    "Solutions": [
        "Solution",
        "SaveAt",
        "Result",
        "Posterior",
        "Moments",
        "Normal",
        "transformed",
        "Transformed",
        "Occurrences",
    ],
    "Equations and events": ["ODE", "Lifted", "Residual", "Event", "AbstractProblem", "flat_field"],
    "Jacobians": [
        "ExactJacobian",
        "GivenJacobian",
        "BandedJacobian",
        "SparseJacobian",
        "HutchinsonDiagonal",
        "AbstractJacobian",
    ],
    "Priors": [
        "IWP",
        "RelativeScale",
        "IOUP",
        "RosenbrockIOUP",
        "Matern",
        "LinearSDE",
        "prior_marginals",
        "sample_prior",
        "linear_transition",
        "AbstractPrior",
        "AbstractPriorFamily",
        "AbstractSplitPrior",
    ],
    "Linearisation": [
        "TS0",
        "TS1",
        "SLR0",
        "SLR1",
        "Stack",
        "Noisy",
        "Iteration",
        "SphericalCubature",
        "UnscentedTransform",
        "GaussHermite",
        "AbstractConstraint",
        "AbstractCubature",
    ],
    "Covariances": [
        "Dense",
        "Modal",
        "Blocks",
        "BlockDiagonal",
        "Isotropic",
        "Subspace",
        "rightmost_basis",
        "AbstractFactorisation",
        "AbstractCoupledFactorisation",
        "AbstractAdaptiveFactorisation",
        "AbstractOwnAlgebra",
    ],
    "Filters and smoothers": ["Filter", "FixedPointSmoother", "FixedIntervalSmoother", "AbstractStrategy"],
    "Calibration": [
        "DynamicCalibration",
        "LeaveOneOutCalibration",
        "MLECalibration",
        "NoCalibration",
        "AbstractCalibration",
        "AbstractLeaveOneOut",
    ],
    "Initial derivatives": ["TaylorMode", "Diffuse", "InitialState", "AbstractInitialisation"],
    "Errors and step sizes": [
        "IntegralController",
        "PIController",
        "Tolerances",
        "Limits",
        "LocalError",
        "ResidualError",
        "StateError",
        "max_norm",
        "rms_norm",
        "AbstractController",
        "AbstractErrorEstimate",
    ],
    "Loops and progress": [
        "BoundedLoop",
        "CheckpointedLoop",
        "ForwardLoop",
        "AbstractLoop",
        "TextProgress",
        "TqdmProgress",
        "AbstractProgress",
    ],
    "Learning from data": [
        "Observations",
        "fit",
        "Fit",
        "marginalise",
        "Marginal",
        "data_distribution",
        "filtering_log_likelihood",
        "fenrir_log_likelihood",
        "dalton_log_likelihood",
        "DiffusionTempering",
        "solve_grid_iterated",
    ],
    "Checks of a solution": ["CheckReport", "Finding", "calibration_report", "CalibrationReport"],
    "States and algebra": [
        "State",
        "AdaptiveState",
        "Attempt",
        "Layout",
        "Linearisation",
        "Innovation",
        "Conditional",
        "Transition",
        "NoiseSplit",
    ],
}
MODULES = {"Pictures": probode.plots, "Checks of your own parts": probode.testing}


# Of pages that are alone below their heading of the navigation.
WITHOUT_NAVIGATION = "---\nhide: [navigation]\n---\n\n"
# Figures of the page of benchmarks stand below its tables, which are marked in its source.
MARKED = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def main() -> None:
    """Gather the pages, and build the site."""
    parser = argparse.ArgumentParser(prog="python .docs/build.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="show guides without what they print and draw")
    parser.add_argument("--only", nargs="+", metavar="GUIDE", help="execute these guides alone")
    options = parser.parse_args()
    start = time.perf_counter()
    check_reference()
    described = described_guides()
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(HERE / "pages", PAGES)
    shutil.copytree(HERE / "assets", PAGES / "assets")
    shutil.copy(ROOT / "examples" / "lotka_volterra.png", PAGES / "assets")
    for page in PAGES.glob("*.md"):
        # (Its tables have names of other libraries, some of which are the same.)
        if page.name != "coming_from.md":
            page.write_text(links.with_names(page.read_text()))
    home = PAGES / "index.md"
    if not home.read_text().startswith("---"):
        home.write_text(WITHOUT_NAVIGATION + home.read_text())
    execute = [] if options.quick else options.only or list(described)
    guided = write_guides(described, execute)
    referred = write_reference()
    write_copies(described)
    build(navigation(guided, referred))
    pages = sum(page.name != "404.html" for page in SITE.rglob("*.html"))
    print(f"{pages} pages in {time.perf_counter() - start:.0f} s: {SITE.relative_to(ROOT)}/index.html")
    if pages < LEAST_PAGES:
        sys.exit(f"The site has {pages} pages, fewer than {LEAST_PAGES}.")


def check_reference() -> None:
    """Exits with a message unless the reference has every public name once."""
    listed = Counter(name for names in REFERENCE.values() for name in names)
    public = set(links.public_names(probode))
    complaints = {
        "missing": public - set(listed),
        "listed more than once": {name for name, times in listed.items() if times > 1},
        "not public": set(listed) - public,
    }
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in complaints.items() if names]
    if found:
        sys.exit(f"REFERENCE in {pathlib.Path(__file__).name} has to list every public name once; {'; '.join(found)}.")


def described_guides() -> dict[str, str]:
    """What `examples/README.md` says of each guide, in its order. Exits with a message if its list is not complete."""
    table = (ROOT / "examples" / "README.md").read_text()
    described = dict(re.findall(r"^\| \[(\w+)\]\(\1\.py\) \| (.*?) \|$", table, re.MULTILINE))
    unlike = set(described) ^ {script.stem for script in (ROOT / "examples").glob("*.py")}
    if unlike or not set(GROUPS) <= set(described):
        lost = sorted(unlike | (set(GROUPS) - set(described)))
        sys.exit(f"The table in examples/README.md and the scripts there have to be the same; look at {lost}.")
    return described


def write_guides(described: dict[str, str], execute: list[str]) -> list:
    """Writes a page for each example, with outputs for those that are to be executed; returns their navigation."""
    folder = PAGES / "guides"
    folder.mkdir()
    found, bare = [{"Guides": "guides/index.md"}], []
    overview = ["# Guides\n\nEach guide is a script of the folder `examples/`, and can be had as a notebook."]
    for name, words in described.items():
        script = ROOT / "examples" / f"{name}.py"
        notebook = guides.notebook_of(script)
        shutil.copy(script, folder)
        nbformat.write(notebook, folder / f"{name}.ipynb")
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = links.of_repository(cell.source, "examples", f"guides/{name}.md", pages_of(described))
        if name in execute:
            before = time.perf_counter()
            notebook = guides.executed(notebook, name)
            print(f"executed {name} in {time.perf_counter() - before:.0f} s", flush=True)
        if guides.write(notebook, name, folder) == 0 and name in execute:
            bare.append(name)
        if name in GROUPS:
            found.append({GROUPS[name]: []})
            overview.append(f"\n## {GROUPS[name]}\n")
        found[-1][next(iter(found[-1]))].append(f"guides/{name}.md")
        overview.append(f"- [{guides.title_of(notebook)}]({name}.md): {words}")
    if bare:
        print(f"guides without a figure: {', '.join(bare)}", flush=True)
    (folder / "index.md").write_text(links.with_names("\n".join(overview)))
    return found


def write_reference() -> list:
    """Writes the pages of the reference; returns their navigation."""
    folder = PAGES / "reference"
    folder.mkdir()
    pages = [(title, probode, names) for title, names in REFERENCE.items()]
    pages += [(title, module, links.public_names(module)) for title, module in MODULES.items()]
    overview = ["# Reference", "Every public name of the package, by theme."]
    found = [{"Reference": "reference/index.md"}]
    for title, module, names in pages:
        # (The path of probode.plots, which users know, is not its name.)
        path = module.__name__.replace("diagnostics.", "")
        file = f"{title.lower().replace(' ', '_')}.md"
        parts = [f"# {title}", *(f"::: {path}.{name}{endings() if name == 'Result' else ''}" for name in names)]
        if module is not probode:
            parts.insert(1, docstrings.as_markdown(inspect.getdoc(module), ""))
        (folder / file).write_text("\n\n".join(parts))
        summaries = [f"| [`{name}`][{path}.{name}] | {summary(getattr(module, name))} |" for name in names]
        overview += [f"## [{title}]({file})", "\n".join(["| | |", "|---|---|", *summaries])]
        found.append({title: f"reference/{file}"})
    (folder / "index.md").write_text("\n\n".join(overview))
    return found


def summary(value: object) -> str:
    """The first sentence of a docstring, for a table."""
    paragraph = inspect.getdoc(value).split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.])\s", paragraph)[0].replace("|", "\\|")


def endings() -> str:
    """The list of results of a solve, with the sentences that a user sees."""
    rows = []
    for name in probode.Result._name_to_item:
        result = getattr(probode.Result, name)
        words = in_words(result)
        rows.append(f"- `{name}`" + (words.removeprefix(name) if words != name else ""))
    return "\n\n" + "\n".join(rows)


def write_copies(described: dict[str, str]) -> None:
    """Writes the pages that come from files of the repository."""
    for page, file in COPIED.items():
        text = (ROOT / file).read_text()
        text = links.of_repository(text, str(pathlib.PurePosixPath(file).parent), page, pages_of(described))
        if page == "benchmarks.md":
            text = with_figures(text)
        (PAGES / page).write_text(links.with_names(text))


def with_figures(text: str) -> str:
    """The page of benchmarks with figures below its tables."""
    text = text.replace("links to the test that shows it", "names the test that shows it")
    text = WITHOUT_NAVIGATION + text
    drawn = figures.write_all(PAGES / "figures")
    text = MARKED.sub(lambda table: f"{table[2]}{drawn.pop(table[1], '')}\n", text)
    if drawn:
        sys.exit(f"benchmarks/README.md has no tables {sorted(drawn)}, below which figures are to stand.")
    return text


def pages_of(described: dict[str, str]) -> dict[str, str]:
    """The page of the site for each file of the repository that has one."""
    return {
        **{file: page for page, file in COPIED.items()},
        **{f"examples/{name}.py": f"guides/{name}.md" for name in described},
        **ELSEWHERE,
    }


def navigation(guided: list, referred: list) -> list:
    """The navigation of the site. Pages have the titles that are their headings."""
    return [
        {"Home": "index.md"},
        {"Getting started": ["start.md", "choosing.md", "coming_from.md", "sharp_edges.md", "faq.md"]},
        {"Concepts": ["how_it_works.md", "trust.md", "learning.md", "own_parts.md", "map.md"]},
        {"Guides": guided},
        {"Reference": referred},
        {"Benchmarks": "benchmarks.md"},
        {"About": ["citing.md", "contributing.md", "changelog.md"]},
    ]


def build(nav: list) -> None:
    """Runs MkDocs, which takes a warning for an error."""
    # JSON is YAML, too.
    settings = {"INHERIT": "../mkdocs.yml", "docs_dir": "pages", "site_dir": "../../site", "nav": nav}
    (BUILD / "mkdocs.yml").write_text(json.dumps({**settings, "hooks": ["../formulas.py"]}, indent=1))
    # mkdocstrings imports the module docstrings.py of this folder.
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "--config-file", BUILD / "mkdocs.yml"]
    # Material announces its successor at every build.
    failed = subprocess.call(command, env={**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"})
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
