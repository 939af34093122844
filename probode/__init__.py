"""Probabilistic ODE solvers in JAX: solutions of differential equations that say how sure they are."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from . import testing as testing
from .algebra.blocks import Blocks as Blocks
from .algebra.coordinates import Conditional as Conditional
from .algebra.derivatives import NoiseSplit as NoiseSplit
from .algebra.factorisations import AbstractFactorisation as AbstractFactorisation
from .algebra.factorisations import BlockDiagonal as BlockDiagonal
from .algebra.factorisations import Dense as Dense
from .algebra.factorisations import Isotropic as Isotropic
from .algebra.factorisations import Layout as Layout
from .algebra.innovation import Innovation as Innovation
from .algebra.linearisation import Linearisation as Linearisation
from .algebra.marginals import Moments as Moments
from .algebra.marginals import Posterior as Posterior
from .algebra.normal import Normal as Normal
from .algebra.transition import Transition as Transition
from .diagnostics import plots as plots
from .diagnostics.calibration_report import CalibrationReport as CalibrationReport
from .diagnostics.calibration_report import calibration_report as calibration_report
from .ensembles import solve_ensemble as solve_ensemble
from .equations.jacobians import AbstractJacobian as AbstractJacobian
from .equations.jacobians import BandedJacobian as BandedJacobian
from .equations.jacobians import ExactJacobian as ExactJacobian
from .equations.jacobians import GivenJacobian as GivenJacobian
from .equations.jacobians import HutchinsonDiagonal as HutchinsonDiagonal
from .equations.jacobians import SparseJacobian as SparseJacobian
from .equations.problems import ODE as ODE
from .equations.problems import AbstractProblem as AbstractProblem
from .equations.problems import Lifted as Lifted
from .equations.problems import Residual as Residual
from .equations.problems import flat_field as flat_field
from .estimation.calibration import AbstractCalibration as AbstractCalibration
from .estimation.calibration import AbstractLeaveOneOut as AbstractLeaveOneOut
from .estimation.calibration import DynamicCalibration as DynamicCalibration
from .estimation.calibration import LeaveOneOutCalibration as LeaveOneOutCalibration
from .estimation.calibration import MLECalibration as MLECalibration
from .estimation.calibration import NoCalibration as NoCalibration
from .estimation.initialisation import AbstractInitialisation as AbstractInitialisation
from .estimation.initialisation import Diffuse as Diffuse
from .estimation.initialisation import InitialState as InitialState
from .estimation.initialisation import TaylorMode as TaylorMode
from .estimation.strategies import AbstractStrategy as AbstractStrategy
from .estimation.strategies import Filter as Filter
from .estimation.strategies import FixedIntervalSmoother as FixedIntervalSmoother
from .estimation.strategies import FixedPointSmoother as FixedPointSmoother
from .inference.iterated_smoother import solve_grid_iterated as solve_grid_iterated
from .inference.likelihoods import dalton_log_likelihood as dalton_log_likelihood
from .inference.likelihoods import fenrir_log_likelihood as fenrir_log_likelihood
from .inference.likelihoods import filtering_log_likelihood as filtering_log_likelihood
from .inference.tempering import DiffusionTempering as DiffusionTempering
from .information.constraints import TS0 as TS0
from .information.constraints import TS1 as TS1
from .information.constraints import AbstractConstraint as AbstractConstraint
from .information.constraints import Noisy as Noisy
from .information.constraints import Stack as Stack
from .information.iteration import Iteration as Iteration
from .information.observations import Observations as Observations
from .information.regression import SLR0 as SLR0
from .information.regression import SLR1 as SLR1
from .information.regression import AbstractCubature as AbstractCubature
from .information.regression import GaussHermite as GaussHermite
from .information.regression import SphericalCubature as SphericalCubature
from .information.regression import UnscentedTransform as UnscentedTransform
from .ivp import solve_ivp as solve_ivp
from .posterior.solution import SaveAt as SaveAt
from .posterior.solution import Solution as Solution
from .priors.iwp import IWP as IWP
from .priors.linear_sde import IOUP as IOUP
from .priors.linear_sde import LinearSDE as LinearSDE
from .priors.linear_sde import RosenbrockIOUP as RosenbrockIOUP
from .priors.linear_sde import linear_transition as linear_transition
from .priors.matern import Matern as Matern
from .priors.prior import AbstractPrior as AbstractPrior
from .priors.prior import AbstractPriorFamily as AbstractPriorFamily
from .priors.prior import AbstractSplitPrior as AbstractSplitPrior
from .priors.process import prior_marginals as prior_marginals
from .priors.process import sample_prior as sample_prior
from .priors.relative_scale import RelativeScale as RelativeScale
from .solver import Solver as Solver
from .stepping.adaptive import AdaptiveState as AdaptiveState
from .stepping.attempt import Attempt as Attempt
from .stepping.controllers import AbstractController as AbstractController
from .stepping.controllers import IntegralController as IntegralController
from .stepping.controllers import Limits as Limits
from .stepping.controllers import PIController as PIController
from .stepping.controllers import Tolerances as Tolerances
from .stepping.error_estimates import AbstractErrorEstimate as AbstractErrorEstimate
from .stepping.error_estimates import LocalError as LocalError
from .stepping.error_estimates import ResidualError as ResidualError
from .stepping.error_estimates import StateError as StateError
from .stepping.error_estimates import max_norm as max_norm
from .stepping.error_estimates import rms_norm as rms_norm
from .stepping.loops import AbstractLoop as AbstractLoop
from .stepping.loops import BoundedLoop as BoundedLoop
from .stepping.loops import CheckpointedLoop as CheckpointedLoop
from .stepping.loops import ForwardLoop as ForwardLoop
from .stepping.own_algebra import AbstractOwnAlgebra as AbstractOwnAlgebra
from .stepping.progress import AbstractProgress as AbstractProgress
from .stepping.progress import TextProgress as TextProgress
from .stepping.progress import TqdmProgress as TqdmProgress
from .stepping.result import Result as Result
from .stepping.state import State as State
from .subspace.factorisation import Subspace as Subspace
from .subspace.krylov import rightmost_basis as rightmost_basis
from .util.xla import by_default as _compile_small_loops_by_default
from .util.xla import compile_small_loops as compile_small_loops


try:
    __version__ = _version("probode")
except _NotInstalled:  # imported from a plain checkout
    __version__ = "0.0.0+checkout"

_compile_small_loops_by_default()
