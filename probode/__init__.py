"""Probabilistic ODE solvers in JAX: solutions of differential equations that say how sure they are."""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from . import plots as plots
from . import testing as testing
from .adaptive import AdaptiveState as AdaptiveState
from .calibration import AbstractCalibration as AbstractCalibration
from .calibration import DynamicCalibration as DynamicCalibration
from .calibration import LeaveOneOutCalibration as LeaveOneOutCalibration
from .calibration import MLECalibration as MLECalibration
from .calibration import NoCalibration as NoCalibration
from .constraints import TS0 as TS0
from .constraints import TS1 as TS1
from .constraints import AbstractConstraint as AbstractConstraint
from .constraints import Noisy as Noisy
from .constraints import Stack as Stack
from .controllers import AbstractController as AbstractController
from .controllers import IntegralController as IntegralController
from .controllers import PIController as PIController
from .cubature import SLR0 as SLR0
from .cubature import SLR1 as SLR1
from .cubature import AbstractCubature as AbstractCubature
from .cubature import GaussHermite as GaussHermite
from .cubature import SphericalCubature as SphericalCubature
from .cubature import UnscentedTransform as UnscentedTransform
from .ensembles import solve_ensemble as solve_ensemble
from .errors import AbstractErrorEstimate as AbstractErrorEstimate
from .errors import LocalError as LocalError
from .errors import ResidualError as ResidualError
from .errors import StateError as StateError
from .exponential import IOUP as IOUP
from .exponential import LinearSDE as LinearSDE
from .exponential import RosenbrockIOUP as RosenbrockIOUP
from .factorisations import AbstractFactorisation as AbstractFactorisation
from .factorisations import BlockDiagonal as BlockDiagonal
from .factorisations import Dense as Dense
from .factorisations import Isotropic as Isotropic
from .initialisation import AbstractInitialisation as AbstractInitialisation
from .initialisation import Diffuse as Diffuse
from .initialisation import InitialState as InitialState
from .initialisation import TaylorMode as TaylorMode
from .iterated import solve_grid_iterated as solve_grid_iterated
from .ivp import solve_ivp as solve_ivp
from .iwp import IWP as IWP
from .jacobians import AbstractJacobian as AbstractJacobian
from .jacobians import BandedJacobian as BandedJacobian
from .jacobians import ExactJacobian as ExactJacobian
from .jacobians import GivenJacobian as GivenJacobian
from .jacobians import HutchinsonDiagonal as HutchinsonDiagonal
from .jacobians import SparseJacobian as SparseJacobian
from .krylov import rightmost_basis as rightmost_basis
from .likelihoods import dalton_log_likelihood as dalton_log_likelihood
from .likelihoods import fenrir_log_likelihood as fenrir_log_likelihood
from .likelihoods import filtering_log_likelihood as filtering_log_likelihood
from .loops import AbstractLoop as AbstractLoop
from .loops import BoundedLoop as BoundedLoop
from .loops import CheckpointedLoop as CheckpointedLoop
from .loops import ForwardLoop as ForwardLoop
from .marginals import Posterior as Posterior
from .matern import Matern as Matern
from .normal import Normal as Normal
from .observations import Observations as Observations
from .prior import AbstractPrior as AbstractPrior
from .prior_process import prior_marginals as prior_marginals
from .prior_process import sample_prior as sample_prior
from .problems import ODE as ODE
from .problems import Residual as Residual
from .progress import AbstractProgress as AbstractProgress
from .progress import TextProgress as TextProgress
from .progress import TqdmProgress as TqdmProgress
from .relative_scale import RelativeScale as RelativeScale
from .report import CalibrationReport as CalibrationReport
from .report import calibration_report as calibration_report
from .result import Result as Result
from .small_loops import by_default as _compile_small_loops_by_default
from .small_loops import compile_small_loops as compile_small_loops
from .solution import SaveAt as SaveAt
from .solution import Solution as Solution
from .solver import Solver as Solver
from .strategies import AbstractStrategy as AbstractStrategy
from .strategies import Filter as Filter
from .strategies import FixedIntervalSmoother as FixedIntervalSmoother
from .strategies import FixedPointSmoother as FixedPointSmoother
from .subspace import Subspace as Subspace
from .tempering import DiffusionTempering as DiffusionTempering


try:
    __version__ = _version("probode")
except _NotInstalled:  # imported from a plain checkout
    __version__ = "0.0.0+checkout"

_compile_small_loops_by_default()
