"""Conformance checks for subclasses of the solvers' parts, and hypothesis strategies.

``check_prior(MyPrior(...))``, and one such function for each kind of part, tests the laws that all parts of the kind
obey, and raises ``LawBroken``, an ``AssertionError``, with a message that names the law. The checks need double
precision (``jax.config.update("jax_enable_x64", True)``) and raise ``RuntimeError`` without it; the strategies need
hypothesis. A check of one part takes up to 20 seconds, most of them compilation.

>>> import jax, probode
>>> jax.config.update("jax_enable_x64", True)
>>> probode.testing.check_cubature(probode.SphericalCubature())
"""

from .equations import check_constraint as check_constraint
from .equations import check_cubature as check_cubature
from .equations import check_jacobian as check_jacobian
from .equations import check_problem as check_problem
from .estimation import check_calibration as check_calibration
from .estimation import check_factorisation as check_factorisation
from .estimation import check_initialisation as check_initialisation
from .estimation import check_strategy as check_strategy
from .examples import example_attempt as example_attempt
from .generators import KnownSolution as KnownSolution
from .generators import grids as grids
from .generators import normals as normals
from .generators import priors as priors
from .generators import problems as problems
from .generators import solvers as solvers
from .laws import LawBroken as LawBroken
from .solver import check_solver as check_solver
from .stepping import check_controller as check_controller
from .stepping import check_error as check_error
from .stepping import check_loop as check_loop
from .stepping import check_progress as check_progress
from .transitions import check_prior as check_prior
