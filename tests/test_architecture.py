"""The shape of the package: classes abstract or final, imports one way, every public name documented."""

import ast
import importlib
import inspect
import os
import pathlib
import pkgutil
import subprocess
import sys
import textwrap

import equinox as eqx
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import probode
from probode.algebra.linalg import triangularise


PACKAGE = pathlib.Path(probode.__file__).parent
MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages([str(PACKAGE)], "probode.")]
CLASSES = sorted(
    {
        value
        for module in MODULES
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, eqx.Module) and value.__module__.startswith("probode.")
    },
    key=lambda cls: cls.__name__,
)


def abstract(cls):
    undefined = [getattr(cls, name, ()) for name in ("__abstractvars__", "__abstractclassvars__")]
    return bool(inspect.isabstract(cls) or any(undefined))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_module_is_abstract_or_final(cls):
    assert cls.__name__.lstrip("_").startswith("Abstract") == abstract(cls)
    if abstract(cls):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert "__init__" not in [node.name for node in definition.body if isinstance(node, ast.FunctionDef)]
        own_fields = set(vars(cls).get("__annotations__", {})) - set(cls.__abstractvars__ | cls.__abstractclassvars__)
        assert not own_fields, "an abstract class declares variables, it has no fields"
    else:
        children = [c for c in CLASSES if cls in c.__mro__[1:]]
        assert not children, "a class that can be instantiated is final"
        overridden = {
            name
            for base in cls.__mro__[1:]
            if base in CLASSES
            for name, value in vars(base).items()
            if inspect.isfunction(value)
            and not name.startswith("__")
            and not getattr(value, "__isabstractmethod__", False)
            and name in vars(cls)
        }
        assert not overridden, "only abstract methods are overridden"


def test_the_walk_found_the_classes():
    assert len(CLASSES) > 25
    assert probode.Solver in CLASSES and probode.AbstractPrior in CLASSES


# Each stands on those before it. Those in one line do not know each other.
FLOORS = [
    ("util",),
    ("algebra",),
    ("equations",),
    ("priors", "information", "estimation"),
    ("stepping",),
    ("posterior", "subspace"),
    ("requests",),
    ("adaptive_solve",),
    ("solver",),
    ("ivp", "ensembles", "diagnostics", "trajectories"),
    ("inference",),
    ("testing",),
]
# Inside of functions: methods of a solution that look at it from above.
LATER = {("posterior.solution", f"diagnostics.{name}") for name in ("plots", "check", "labelled")}


def imports(path, *, everywhere=True):
    """The modules of the package that a file imports, by their dotted names in it."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "probode" for alias in node.names), "imports are relative"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            for alias in node.names:
                target = PACKAGE.joinpath(*filter(None, base), alias.name)
                is_module = target.is_dir() or target.with_suffix(".py").exists()
                found.add(".".join(filter(None, (*base, alias.name) if is_module else base)))
    return found


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_imports_run_one_way():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(floor)
    for path in PACKAGE.rglob("*.py"):
        if path.stem == "__init__":
            continue
        for module in imports(path):
            here, there = dotted(path).split(".")[0], module.split(".")[0]
            downwards = floor[there] < floor[here] or there == here
            assert downwards or (dotted(path), module) in LATER, f"{dotted(path)} imports {module}"


def test_there_are_no_circles():
    graph = {dotted(path): imports(path, everywhere=False) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_there_are_few_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


PARTS = {
    "prior": (probode.AbstractPrior, probode.AbstractSplitPrior, probode.AbstractPriorFamily),
    "constraint": (probode.AbstractConstraint,),
    "problem": (probode.AbstractProblem, probode.ODE),  # constraints of zeroth order take an ODE
    "jacobian": (probode.AbstractJacobian,),
    "cubature": (probode.AbstractCubature,),
    "factorisation": (
        probode.AbstractFactorisation,
        probode.AbstractOwnAlgebra,
        probode.AbstractCoupledFactorisation,
        probode.AbstractAdaptiveFactorisation,
    ),
    "strategy": (probode.AbstractStrategy,),
    "calibration": (probode.AbstractCalibration, probode.AbstractLeaveOneOut),
    "error": (probode.AbstractErrorEstimate,),
    "controller": (probode.AbstractController,),
    "loop": (probode.AbstractLoop,),
    "initialisation": (probode.AbstractInitialisation,),
    "progress": (probode.AbstractProgress,),
}


def declared(kind):
    names = {name for base in kind.__mro__ for name in vars(base)}
    return names | set(kind.__abstractvars__) | set(getattr(kind, "__annotations__", {}))


def _asked_for(node):
    """Of ``owner.name``, ``getattr(owner, "name")`` and ``hasattr(owner, "name")`` the owner and the name."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        if isinstance(node.args[1], ast.Constant):
            return node.args[0], node.args[1].value
    return None, ""


def test_what_is_asked_of_a_part_is_declared():
    """Wherever the package takes an attribute of something called ``prior``, ``calibration``, ..., a base has it."""
    asked = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            owner, attribute = _asked_for(node)
            name = getattr(owner, "id", getattr(owner, "attr", None))
            if name in PARTS and not attribute.startswith("__"):
                known = any(attribute in declared(kind) for kind in PARTS[name])
                # A field that a prior need not have; who takes it asks for it first.
                known = known or (name, attribute) == ("prior", "output_scale")
                # A module knows the parts that it defines.
                here = [cls for cls in CLASSES if cls.__module__ == f"probode.{dotted(path)}"]
                known = known or any(attribute in declared(cls) for cls in here if issubclass(cls, PARTS[name]))
                # Arrays have these names, too.
                known = known or attribute in ("shape", "ndim", "dtype", "T")
                assert known, f"{dotted(path)}, line {node.lineno}: no base of a {name} declares {attribute}"
                asked += 1
    assert asked > 100


@pytest.mark.parametrize("kind", [kind for kinds in PARTS.values() for kind in kinds], ids=lambda kind: kind.__name__)
def test_a_base_documents_what_it_asks_of_a_subclass(kind):
    for name in kind.__abstractmethods__:
        assert inspect.getdoc(getattr(kind, name)), f"{kind.__name__}.{name}"
    flags = {name for name, value in vars(kind).items() if isinstance(value, bool) and not name.startswith("_")}
    flags -= set(vars(kind.__base__))  # said there
    for name in flags | (set(kind.__abstractvars__) - set(getattr(kind.__base__, "__abstractvars__", ()))):
        assert f"``{name}``" in inspect.getdoc(kind), f"{kind.__name__} does not say what {name} is"


def public_names():
    return sorted(
        name for name in vars(probode) if not name.startswith("_") and not inspect.ismodule(getattr(probode, name))
    )


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_documented(name):
    value = getattr(probode, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value) and value.__module__.startswith("probode"):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_") and not abstract(value):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_importing_brings_in_no_extras():
    extras = "hypothesis matplotlib beartype diffrax optax optimistix numpyro blackjax xarray arviz scipy.integrate"
    code = (
        f"import sys, probode; bad = set({extras.split()}) | {{'scipy.optimize'}}; "
        "sys.exit(sorted(bad & set(sys.modules)).__str__() if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_importing_starts_no_backend():
    # It would be too late to tell XLA about small loops, and arrays would have the precision of that moment.
    code = "from jax._src import xla_bridge; import probode; probode.compile_small_loops(); "
    code += "assert not xla_bridge.backends_are_initialized()"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, env=environment)


def test_shapes_are_checked_while_testing(request):
    # A canary: with the import hook a wrong shape is refused; without it (the nohook session) there is nothing to see.
    if "jaxtyping-packages" not in " ".join(request.config.invocation_params.args) + str(
        request.config.getini("addopts")
    ):
        return
    with pytest.raises(TypeCheckError):
        triangularise(jnp.zeros((2, 3)), jnp.zeros((2, 2)))
