"""Target networks and weight averaging for deep reinforcement learning in PyTorch."""

from polyak_rl.average import AverageBank, refresh_batch_norm
from polyak_rl.choose import Choice, choose, one_by_one
from polyak_rl.flat import Flat, FlatParameter, flatten_
from polyak_rl.optim import ASGD, PolyakSGD, polyak_stepsize
from polyak_rl.recorder import PolicyAverages
from polyak_rl.rules import (
    Between,
    Ema,
    Polynomial,
    Power,
    Rule,
    Tail,
    Uniform,
    Warmup,
    Window,
    parse_rule,
)
from polyak_rl.solver import PolyakSGDSolver
from polyak_rl.target import TargetNetwork, hard_update, soft_update, weighted_average
from polyak_rl.timeline import Timeline

__all__ = [
    "ASGD",
    "AverageBank",
    "Between",
    "Choice",
    "Ema",
    "Flat",
    "FlatParameter",
    "PolicyAverages",
    "PolyakSGD",
    "PolyakSGDSolver",
    "Polynomial",
    "Power",
    "Rule",
    "Tail",
    "TargetNetwork",
    "Timeline",
    "Uniform",
    "Warmup",
    "Window",
    "choose",
    "flatten_",
    "hard_update",
    "one_by_one",
    "parse_rule",
    "polyak_stepsize",
    "refresh_batch_norm",
    "soft_update",
    "weighted_average",
]
