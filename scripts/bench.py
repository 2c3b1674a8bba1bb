"""Every speed that this project claims, measured beside what it is compared with, in one process.

    python -m scripts.bench                          # all sections, about a quarter of an hour
    python -m scripts.bench updates steps            # some of them
    python -m scripts.bench --device cuda            # adds launches and bandwidth

Contenders take turns: a round times each of them for a moment, the next round begins with another
one. Figures are medians over the rounds with their quartiles, and every ratio is the median of the
rounds' ratios, so that a machine that slows down slows all of them. The process is pinned to as
many cores as it has threads. Libraries that are not installed are left out (extra `bench`).

Written under `--out`: `bench.md` to read, and `bench.json` with every round of every contender.
"""

import contextlib
import copy
import dataclasses
import datetime
import gc
import importlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import stable_baselines3 as sb3
import torch
import tyro
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from agents.averaging import PolicyAverages, default_rules
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.memory import keep_freed_memory
from agents.presets import preset
from agents.sac import SACConfig
from agents.training import TrainConfig, Training
from polyak_rl import AverageBank, Ema, Power, Rule, TargetNetwork, Uniform, Window, flatten_
from polyak_rl import soft_update as polyak_soft_update

Section = Literal["updates", "steps", "loops", "averaging", "memory", "scaling", "gpu"]

TAU = 0.005
ROWS = 5_000  # transitions in a replay buffer that gradient steps are measured on
BLOCK = 32  # updates after which a bank takes them in: calls hold so many, lest turns differ
STEPS_OF_A_RUN = 1_000_000  # environment steps that averages and timelines are laid out for

# Names that goals refer to.
SB3, SBX, GEMMS, OURS = "SB3", "SBX", "its GEMMs alone", "polyak_rl"
SOFT, SOFT_FLAT = "soft_update", "soft_update, flat"
TARGET, TARGET_FLAT = "TargetNetwork", "TargetNetwork, flat"
LERP, COPY = "lerp_ on one vector", "copy of one vector"
ALONE, TOGETHER = "one seed", "seeds together"
PLAIN, DEFAULT, TWELVE = "without averages", "default averages", "12 averages and a timeline"


@dataclass(frozen=True)
class Options:
    """Measure this project's speed beside what it is compared with."""

    sections: tyro.conf.Positional[tuple[Section, ...]] = ()
    """what to measure; all where none is named, "gpu" on a CUDA device only"""
    device: str = "cpu"
    """where networks live, as torch names it"""
    threads: int = 1
    """threads inside one operation, and cores that the process is pinned to"""
    clock: Literal["wall", "cpu"] = "wall"
    """what a turn is timed by; "cpu" counts this process alone, for a machine that others use"""
    rounds: int = 21
    """turns that each contender gets"""
    seconds: float = 0.02
    """of one turn, for updates"""
    step_seconds: float = 0.2
    """of one turn, for gradient steps"""
    loop_seconds: float = 1.5
    """of one turn, for whole training loops"""
    max_parameters: int = 10**8
    """the largest network; sizes that do not fit in half of the free memory are left out"""
    max_tensors: int = 1000
    """the most tensors in a network"""
    max_averages: int = 64
    """the most averages side by side"""
    max_seeds: int = 32
    """the most seeds together"""
    out: Path = Path("runs/bench")
    """folder of bench.md and bench.json"""


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))


class Contender(NamedTuple):
    """Something to time: what a call does, and how many updates or steps that is.

    Ours runs with the allocator as `scripts.train` sets it, a rival with glibc's defaults, as where
    it runs alone.
    """

    run: Callable[[], object]
    per_call: int = 1
    rival: bool = False


@dataclass
class Case:
    """One comparison. Cases of one title differ in size, and make one table."""

    section: str
    title: str
    size: str
    unit: Literal["seconds", "steps/s"]
    note: str
    baseline: str
    rounds: dict[str, list[float]]
    """seconds an item, by contender, in each round"""

    def seconds(self, name: str) -> Spread:
        """Seconds of one item."""
        return Spread.of(self.rounds[name])

    def ratio(self, over: str, under: str) -> Spread:
        """How many times longer `over` took than `under`, compared round by round."""
        both = zip(self.rounds[over], self.rounds[under], strict=True)
        return Spread.of([a / b for a, b in both])


class Value(NamedTuple):
    """A figure that is counted and not timed."""

    section: str
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Goal:
    """What must be reached: a ratio of two contenders' times in a case, or a value."""

    text: str
    title: str
    size: str = ""
    over: str = ""
    under: str = ""
    scale: float = 1.0
    """what the ratio is multiplied by"""
    at_least: float | None = None
    at_most: float | None = None
    gpu: bool = False
    """whether only a GPU can show it"""

    def met(self, reached: float) -> bool:
        """Whether a ratio is on the right side of the bound."""
        return reached >= self.at_least if self.at_least is not None else reached <= self.at_most

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}"


TWIN, NARROW, CONV = "twin critic 256x256", "three-layer 64-unit net", "160 conv tensors"
SAC_STEP, DDPG_STEP = "SAC gradient step", "DDPG gradient step"
DQN64_STEP, DQN256_STEP = "DQN gradient step, 64 units", "DQN gradient step, 256x256"
SAC_LOOP, DQN_LOOP = "SAC on HalfCheetah-v5", "DQN on CartPole-v1"
SEEDS64, SEEDS256 = "DQN on CartPole-v1, 64 units", "DQN on CartPole-v1, 256x256"
AVERAGING, PARAMETERS, SEEDS_SAC = "SAC step with averages", "parameters", "SAC step of many seeds"
UPDATE_LAUNCHES, SAC_LAUNCHES = "launches of a target update", "launches of a SAC step"
HUNDRED_MB = "target update of 100 MB"

GOALS = (
    Goal("flat target update, twin critic, against SB3", TWIN, "", SB3, TARGET_FLAT, at_least=8),
    Goal("flat target update, 64 units, against SB3", NARROW, "", SB3, TARGET_FLAT, at_least=12),
    Goal("soft_update on plain modules, twin critic, against SB3", TWIN, "", SB3, SOFT, at_least=2),
    Goal("soft_update on plain modules, 64 units, against SB3", NARROW, "", SB3, SOFT, at_least=2),
    *(
        Goal(
            f"time of a flat update over a plain copy, {size} parameters",
            PARAMETERS,
            size,
            TARGET_FLAT,
            COPY,
            at_most=1.5,
        )
        for size in ("1e+06", "1e+07", "1e+08")
    ),
    Goal("SAC step over its GEMMs", SAC_STEP, "", OURS, GEMMS, at_most=1.5),
    Goal("DDPG step over its GEMMs", DDPG_STEP, "", OURS, GEMMS, at_most=1.5),
    Goal("SAC step against SB3", SAC_STEP, "", SB3, OURS, at_least=1.5),
    Goal("DDPG step against SB3", DDPG_STEP, "", SB3, OURS, at_least=1.5),
    Goal("DQN step, 64 units, against SB3", DQN64_STEP, "", SB3, OURS, at_least=1.6),
    Goal("DQN step, 256x256, against SB3", DQN256_STEP, "", SB3, OURS, at_least=1.6),
    Goal("SAC step against SBX", SAC_STEP, "", SBX, OURS, at_least=1),
    Goal("DDPG step against SBX", DDPG_STEP, "", SBX, OURS, at_least=1),
    Goal("DQN step, 64 units, against SBX", DQN64_STEP, "", SBX, OURS, at_least=1),
    Goal("DQN step, 256x256, against SBX", DQN256_STEP, "", SBX, OURS, at_least=1),
    Goal("SAC whole loop against SB3", SAC_LOOP, "", SB3, OURS, at_least=1.5),
    Goal("DQN whole loop against SB3", DQN_LOOP, "", SB3, OURS, at_least=1.6),
    Goal("SAC whole loop against SBX", SAC_LOOP, "", SBX, OURS, at_least=1),
    Goal("DQN whole loop against SBX", DQN_LOOP, "", SBX, OURS, at_least=1),
    Goal("SAC step with 12 averages over one without", AVERAGING, "", TWELVE, PLAIN, at_most=1.03),
    Goal("20 DQN seeds together, 64 units", SEEDS64, "20", ALONE, TOGETHER, at_least=3),
    Goal("20 DQN seeds together, 256x256", SEEDS256, "20", ALONE, TOGETHER, at_least=1.3),
    Goal("launches of a flat target update", UPDATE_LAUNCHES, at_most=1, gpu=True),
    # Replaying a graph with random numbers first writes a seed and an offset: two launches more.
    Goal("launches of a SAC step, one graph replay", SAC_LAUNCHES, at_most=3, gpu=True),
    Goal(  # an update moves three vectors, a copy two
        "bandwidth of an update of 100 MB over a device copy's",
        HUNDRED_MB,
        over=COPY,
        under=TARGET_FLAT,
        scale=1.5,
        at_least=0.85,
        gpu=True,
    ),
    Goal(  # the times are of one seed's step
        "SAC step of 20 seeds over that of one",
        SEEDS_SAC,
        "20",
        TOGETHER,
        ALONE,
        scale=20,
        at_most=2,
        gpu=True,
    ),
)


class Bench:
    """Times contenders against each other and keeps the figures."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.cases: list[Case] = []
        self.values: list[Value] = []
        self.section = ""
        self.wall = self.cpu = 0.0  # seconds of all turns

    def compare(
        self,
        title: str,
        contenders: Mapping[str, Contender | Callable[[], object]],
        *,
        seconds: float,
        size: str = "",
        unit: Literal["seconds", "steps/s"] = "seconds",
        note: str = "",
        baseline: str = "",
    ) -> None:
        """Let the contenders take turns of about `seconds`; a turn is at least one call."""
        print(f"{self.section}: {title} {size}".rstrip(), file=sys.stderr, flush=True)
        entered = {
            name: c if isinstance(c, Contender) else Contender(c) for name, c in contenders.items()
        }
        gc.collect()
        gc.freeze()  # what was just built would be walked through in everybody's turns
        calls = {name: self._calls(c, seconds) for name, c in entered.items()}
        rounds: dict[str, list[float]] = {name: [] for name in entered}
        order = list(entered)
        for _ in range(self.options.rounds):
            for name in order:
                turn = self._turn(entered[name], calls[name])
                rounds[name].append(turn / (calls[name] * entered[name].per_call))
            order = [*order[1:], order[0]]
        gc.unfreeze()
        self.cases.append(Case(self.section, title, size, unit, note, baseline, rounds))

    def value(self, name: str, value: float, unit: str) -> None:
        """Keep a figure that is no time."""
        self.values.append(Value(self.section, name, value, unit))

    def reached(self, goal: Goal) -> Spread | None:
        """What a goal came to; None where it was not measured."""
        if goal.gpu and self.device.type != "cuda":
            return None
        if not goal.over:
            found = [v.value for v in self.values if v.name == goal.title]
            return Spread.of(found) if found else None
        for case in self.cases:
            names = {goal.over, goal.under}
            if (case.title, case.size) == (goal.title, goal.size) and names <= set(case.rounds):
                return Spread(*(goal.scale * x for x in case.ratio(goal.over, goal.under)))
        return None

    def _calls(self, contender: Contender, seconds: float) -> int:
        for _ in range(2):
            contender.run()  # compiles, allocates, fills caches
        calls = 1
        while (taken := self._turn(contender, calls)) < seconds / 4:
            calls *= 2
        return max(1, round(calls * seconds / taken))

    def _turn(self, contender: Contender, calls: int) -> float:
        run = contender.run
        keep_freed_memory(not contender.rival)
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in itertools.repeat(None, calls):
            run()
        self._synchronize()
        cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
        self.cpu += cpu
        self.wall += wall
        return cpu if self.options.clock == "cpu" else wall

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- target updates ------------------------------------------------------------------------------


def critic_net() -> nn.Module:
    """SAC's twin critic at HalfCheetah's shapes: 12 tensors, 0.6 MB."""
    return nn.ModuleList([dense(17 + 6, 256, 256, 1) for _ in range(2)])


def narrow_net() -> nn.Module:
    """A network of three layers for CartPole: 6 tensors, 19 kB."""
    return dense(4, 64, 64, 2)


def conv_net() -> nn.Module:
    """A deep convolutional network: 160 tensors, 4.6 MB."""
    return nn.ModuleList([nn.Conv2d(40, 40, 3) for _ in range(80)])


def dense(*sizes: int) -> nn.Module:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for pair in pairwise(sizes):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def updates(bench: Bench) -> None:
    """One target update on networks of several sizes."""
    for title, build in ((TWIN, critic_net), (NARROW, narrow_net), (CONV, conv_net)):
        network = build().to(bench.device)
        contenders = {**rival_updates(network), **our_updates(network), **floors(network)}
        note = (
            f"{len([*network.parameters()])} tensors, "
            f"{sum(p.numel() for p in network.parameters()):,} parameters"
        )
        seconds = bench.options.seconds
        bench.compare(title, contenders, seconds=seconds, note=note, baseline=SB3)


def rival_updates(network: nn.Module) -> dict[str, Callable[[], object]]:
    """What other libraries do, each as its own examples call it, its fastest setting chosen."""
    online, target = copy.deepcopy(network), copy.deepcopy(network)
    averaged = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(1 - TAU))
    rivals: dict[str, Callable[[], object]] = {
        SB3: lambda: polyak_update(online.parameters(), target.parameters(), TAU),
        "CleanRL's loop": lambda: cleanrl_update(online, target),
        "torch AveragedModel": lambda: averaged.update_parameters(online),
    }
    if module := installed("ema_pytorch"):
        ema = module.EMA(
            copy.deepcopy(network),
            beta=1 - TAU,
            update_every=1,
            update_after_step=0,
            use_foreach=True,
        )
        rivals["ema-pytorch"] = ema.update
    if module := installed("torch_ema"):
        shadow = module.ExponentialMovingAverage(online.parameters(), 1 - TAU, False)
        rivals["torch_ema"] = shadow.update
    if module := installed("timm.utils"):
        model_ema = module.ModelEmaV3(online, decay=1 - TAU)
        rivals["timm ModelEmaV3"] = lambda: model_ema.update(online)
    jax, optax = installed("jax"), installed("optax")
    if jax and optax and next(network.parameters()).device.type == "cpu":
        rivals["optax, jitted"] = OptaxUpdate(jax, optax, network)
    return rivals


def cleanrl_update(online: nn.Module, target: nn.Module) -> None:
    """The loop that CleanRL's files repeat."""
    for param, target_param in zip(online.parameters(), target.parameters(), strict=True):
        target_param.data.copy_(TAU * param.data + (1 - TAU) * target_param.data)


class OptaxUpdate:
    """`optax.incremental_update`, compiled, with the old target's memory given up to the new."""

    def __init__(self, jax: Any, optax: Any, network: nn.Module) -> None:
        arrays = {name: p.detach().numpy() for name, p in network.named_parameters()}
        self.online, self.target = jax.device_put(arrays), jax.device_put(arrays)
        self.update = jax.jit(partial(optax.incremental_update, step_size=TAU), donate_argnums=1)
        self.wait = jax.block_until_ready

    def __call__(self) -> None:
        """One update, waited for."""
        self.target = self.wait(self.update(self.online, self.target))


def our_updates(network: nn.Module) -> dict[str, Callable[[], object]]:
    """What this library offers."""
    online, target = copy.deepcopy(network), copy.deepcopy(network)
    flat_online, flat_target = copy.deepcopy(network), copy.deepcopy(network)
    flatten_(flat_online)
    flatten_(flat_target)
    return {
        "soft_update, sequences": lambda: polyak_soft_update(
            target.parameters(), online.parameters(), TAU
        ),
        SOFT: lambda: polyak_soft_update(target, online, TAU),
        TARGET: TargetNetwork(online, TAU).update,
        SOFT_FLAT: lambda: polyak_soft_update(flat_target, flat_online, TAU),
        TARGET_FLAT: TargetNetwork(flat_online, TAU).update,
    }


def floors(network: nn.Module) -> dict[str, Callable[[], object]]:
    """What cannot be beaten: the bare kernels on tensors that are already at hand."""
    onlines = [p.detach().clone() for p in network.parameters()]
    targets = [p.clone() for p in onlines]
    online = torch.cat([p.flatten() for p in onlines])
    target = online.clone()
    return {
        "_foreach_lerp_, cached lists": lambda: torch._foreach_lerp_(targets, onlines, TAU),
        LERP: lambda: target.lerp_(online, TAU),
        COPY: lambda: target.copy_(online),
    }


def installed(name: str) -> Any:
    """A library that may be missing, or unable to load here."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


# --- gradient steps ------------------------------------------------------------------------------


def steps(bench: Bench) -> None:
    """One gradient step, sampling from a full replay buffer included."""
    for title, algo, env_id, config in (
        (SAC_STEP, "sac", "HalfCheetah-v5", SACConfig()),
        (DDPG_STEP, "ddpg", "HalfCheetah-v5", DDPGConfig(hidden=(256, 256))),
        (DQN64_STEP, "dqn", "CartPole-v1", DQNConfig(hidden=(64, 64), batch_size=64)),
        (DQN256_STEP, "dqn", "CartPole-v1", DQNConfig(hidden=(256, 256), batch_size=64)),
    ):
        training = filled_training(bench, algo, env_id, config)
        # Discrete control learns in bursts, as in its presets; the others at every step.
        burst = 64 if algo == "dqn" else 1
        floor = gemms(algo, training.interface.obs_dim, training.interface.action_dim, config)
        products = [call for one in floor for call in one.products(bench.device)]
        contenders: dict[str, Contender] = {
            GEMMS: Contender(partial(call_all, products)),
            OURS: Contender(partial(learn, training)),
        }
        for name, library in ((SB3, sb3), (SBX, sbx(bench.device))):
            if library is not None:
                model = rival_model(library, algo, env_id, config, bench.device, filled=True)
                contenders[name] = Contender(rival_learn(model, config, burst), burst, rival=True)
        step_flops = flops(partial(learn, training))
        bench.value(f"{title}: floating-point operations in products", step_flops, "FLOP")
        bench.value(f"{title}: those of its GEMMs alone", flops(contenders[GEMMS].run), "FLOP")
        note = f"{env_id}'s shapes, units {config.hidden}, batch {config.batch_size}"
        bench.compare(
            title, contenders, seconds=bench.options.step_seconds, note=note, baseline=SB3
        )
        training.close()


def learn(training: Training) -> None:
    """A gradient step as the training loop takes it."""
    batch = training.replay.sample(training.agent.config.batch_size, training.sampling)
    training.agent.update(batch)
    for record in training.recorders:
        record()


def call_all(calls: Sequence[Callable[[], object]]) -> None:
    """Call one after another."""
    for call in calls:
        call()


def filled_training(
    bench: Bench, algo: str, env_id: str, config: Any, seeds: Sequence[int] = (1,)
) -> Training:
    """A training with random transitions in its replay buffer."""
    config = dataclasses.replace(config, buffer_size=ROWS)
    run = TrainConfig(
        env_id, STEPS_OF_A_RUN, eval_every=2 * STEPS_OF_A_RUN, device=str(bench.device)
    )
    training = Training(algo, config, run, seeds)
    rng = np.random.default_rng(0)
    shape, size = (len(seeds), ROWS), training.interface
    if size.discrete:
        action = rng.integers(size.action_dim, size=shape)
    else:
        action = rng.uniform(-1, 1, (*shape, size.action_dim)).astype(np.float32)
    obs, next_obs = rng.standard_normal((2, *shape, size.obs_dim), dtype=np.float32)
    reward, terminated = rng.standard_normal(shape), rng.random(shape) < 0.01
    training.replay.add(obs, action, reward, terminated, next_obs)
    return training


def sbx(device: torch.device) -> Any:
    """Stable-Baselines in JAX where it is installed; its CPU build only runs there."""
    return installed("sbx") if device.type == "cpu" else None


def rival_model(
    library: Any, algo: str, env_id: str, config: Any, device: torch.device, filled: bool = False
) -> Any:
    """The same agent in Stable-Baselines3 or SBX."""
    options: dict[str, Any] = {
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "buffer_size": ROWS if filled else config.buffer_size,
        "learning_starts": config.learning_starts,
        "gamma": config.gamma,
        "tau": config.tau,
        "train_freq": config.train_every,
        "gradient_steps": config.gradient_steps,
        "policy_kwargs": {"net_arch": [*config.hidden]},
        "seed": 1,
    }
    if library is sb3:
        options["device"] = device
    if algo == "dqn":
        options["exploration_fraction"] = config.exploration_fraction
        options["exploration_final_eps"] = config.epsilon_end
        # Counted in environment steps there; 10 is rl-baselines3-zoo's for CartPole-v1.
        options["target_update_interval"] = 10
    model = getattr(library, algo.upper())("MlpPolicy", env_id, **options)
    model.set_logger(Logger(None, []))
    if filled:
        fill(model.replay_buffer)
    return model


def fill(buffer: Any) -> None:
    """Random transitions in every row of a Stable-Baselines3 buffer."""
    rng = np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:] = rng.standard_normal(array.shape)
    buffer.dones[:] = rng.random(buffer.dones.shape) < 0.01
    if np.issubdtype(buffer.actions.dtype, np.integer):
        buffer.actions[:] = rng.integers(buffer.action_space.n, size=buffer.actions.shape)
    else:
        buffer.actions[:] = rng.uniform(-1, 1, buffer.actions.shape)
    buffer.full = True


def rival_learn(model: Any, config: Any, burst: int) -> Callable[[], object]:
    """`burst` gradient steps of a Stable-Baselines3 or SBX model."""
    return lambda: model.train(gradient_steps=burst, batch_size=config.batch_size)


class Pass:
    """The matrix products of one pass through a multi-layer perceptron, there and back.

    There: y = x W in each layer. Back: dW = x^T dy where weights are trained, and dx = dy W^T where
    something below wants it. Layers narrower than 8 units, or of a width that is no multiple of 4,
    are multiplied as their transposes on the way there, as `agents.networks.affine` does.

    Args:
        sizes: units of the input and of each layer.
        batch: rows.
        members: networks side by side.
        back: what is wanted on the way back: the weights' gradient, the inputs' or neither.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch: int,
        members: int = 1,
        back: Literal["weights", "inputs", "nothing"] = "nothing",
    ) -> None:
        self.sizes, self.batch, self.members, self.back = tuple(sizes), batch, members, back

    def products(self, device: torch.device) -> Iterator[Callable[[], Tensor]]:
        """The products, in order, on tensors that lie ready."""
        matrix = partial(torch.randn, self.members, device=device)
        layers = [
            (matrix(self.batch, i), matrix(i, o), matrix(self.batch, o))  # x, W, dy
            for i, o in pairwise(self.sizes)
        ]
        for x, w, _ in layers:
            wide = w.shape[-1] >= 8 and w.shape[-1] % 4 == 0
            yield partial(torch.bmm, x, w) if wide else partial(torch.bmm, w.mT, x.mT)
        if self.back == "nothing":
            return
        for i, (x, w, dy) in reversed([*enumerate(layers)]):
            if self.back == "weights":
                yield partial(torch.bmm, x.mT, dy)
            if self.back == "inputs" or i > 0:
                yield partial(torch.mul if dy.shape[-1] == 1 else torch.bmm, dy, w.mT)


def gemms(algo: str, obs: int, action: int, config: Any) -> list[Pass]:
    """The passes that one gradient step needs and no others."""
    batch = config.batch_size
    q = (obs + action, *config.hidden, 1)
    if algo == "dqn":
        q = (obs, *config.hidden, action)
        return [Pass(q, batch), Pass(q, batch, back="weights")]  # Q^(s'), Q(s)
    twins, outputs = (2, 2 * action) if algo == "sac" else (1, action)
    pi = (obs, *config.hidden, outputs)
    return [
        Pass(pi, batch),  # pi(s')
        Pass(q, batch, twins),  # Q'(s', pi(s'))
        Pass(q, batch, twins, back="weights"),  # Q(s, a)
        Pass(q, batch, twins, back="inputs"),  # Q(s, pi(s))
        Pass(pi, batch, back="weights"),  # pi(s)
    ]


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations in the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- whole loops ---------------------------------------------------------------------------------


def loops(bench: Bench) -> None:
    """Environment steps a second with everything in: acting, storing, learning."""
    dqn = dataclasses.replace(preset("dqn", "CartPole-v1")[0], learning_starts=256)
    sac = dataclasses.replace(preset("sac", "HalfCheetah-v5")[0], learning_starts=16)
    options: dict[str, Any] = {"seconds": bench.options.loop_seconds, "unit": "steps/s"}
    for title, algo, env_id, config, burst in (
        (SAC_LOOP, "sac", "HalfCheetah-v5", sac, 16),
        (DQN_LOOP, "dqn", "CartPole-v1", dqn, 256),
    ):
        training = fresh_training(bench, algo, env_id, config)
        contenders = {OURS: Contender(partial(advance, training, burst), burst)}
        for name, library in ((SB3, sb3), (SBX, sbx(bench.device))):
            if library is not None:
                model = rival_model(library, algo, env_id, config, bench.device)
                contenders[name] = Contender(
                    partial(model.learn, burst, log_interval=None, reset_num_timesteps=False),
                    burst,
                    rival=True,
                )
        note = (
            f"units {config.hidden}, batch {config.batch_size}, {config.gradient_steps} gradient "
            f"steps every {config.train_every} environment steps, no evaluation"
        )
        bench.compare(title, contenders, note=note, baseline=SB3, **options)
        training.close()

    count = min(20, bench.options.max_seeds)
    for title, hidden in ((SEEDS64, (64, 64)), (SEEDS256, (256, 256))):
        config = dataclasses.replace(dqn, hidden=hidden)
        one, many = (
            fresh_training(bench, "dqn", "CartPole-v1", config, range(seeds))
            for seeds in (1, count)
        )
        contenders = {
            ALONE: Contender(partial(advance, one, 256), 256),
            TOGETHER: Contender(partial(advance, many, 256), 256 * count),
        }
        note = "environment steps of all seeds; one seed at a time against all in one process"
        bench.compare(title, contenders, size=str(count), note=note, baseline=ALONE, **options)
        one.close()
        many.close()


def fresh_training(
    bench: Bench, algo: str, env_id: str, config: Any, seeds: Sequence[int] = (1,)
) -> Training:
    """A training that never evaluates and never ends."""
    config = dataclasses.replace(config, buffer_size=100_000)
    run = TrainConfig(
        env_id, STEPS_OF_A_RUN, eval_every=2 * STEPS_OF_A_RUN, device=str(bench.device)
    )
    return Training(algo, config, run, seeds)


def advance(training: Training, env_steps: int) -> None:
    """Environment steps, with the gradient steps that fall due."""
    for _ in range(env_steps):
        training.advance()


# --- averages ------------------------------------------------------------------------------------


def twelve_rules(updates: int) -> dict[str, Rule]:
    """As many averages as an experiment on averaging may want."""
    rules: dict[str, Rule] = {
        f"suffix{share}": Uniform(start=updates * (100 - share) // 100)
        for share in (90, 75, 50, 25, 10)
    }
    rules["uniform"] = Uniform()
    for percent in (0.1, 1, 3, 10):
        rules[f"ema{percent:g}"] = Ema(half_life=updates * percent / 100)
    rules["power"] = Power(gamma=6.94)
    rules["lawa"] = Window(size=5, every=max(1, updates // 100))
    return rules


def averaging(bench: Bench) -> None:
    """A SAC step with and without averages of the policy, in place and on their own."""
    training = filled_training(bench, "sac", "HalfCheetah-v5", SACConfig())
    recorders: dict[str, list[Callable[[], None]]] = {PLAIN: []}
    for name, rules in ((DEFAULT, default_rules), (TWELVE, twelve_rules)):
        PolicyAverages(training, rules(training.total_updates))
        recorders[name], training.recorders = training.recorders, []
    # All contenders train one agent, so that they differ in the averages alone.
    calls = {name: [partial(learn, training), *records] for name, records in recorders.items()}
    calls |= {f"{name}, alone": recorders[name] for name in (DEFAULT, TWELVE)}
    contenders = {
        name: Contender(partial(call_all, each * BLOCK), BLOCK) for name, each in calls.items()
    }
    seconds = bench.options.step_seconds
    bench.compare(AVERAGING, contenders, seconds=seconds, baseline=PLAIN)
    training.close()


# --- memory --------------------------------------------------------------------------------------


def memory(bench: Bench) -> None:
    """Bytes that are held, and bytes that an update allocates."""
    network = critic_net().to(bench.device)
    updates = {**rival_updates(network), **our_updates(network)}
    for name in (SB3, "CleanRL's loop", "torch AveragedModel", SOFT, SOFT_FLAT, TARGET_FLAT):
        size = allocated(updates[name], bench.device)
        bench.value(f"{name}: allocated in an update, {TWIN}", size, "bytes")

    size = sum(p.nbytes for p in network.parameters())
    bench.value(f"parameters, {TWIN}", size, "bytes")
    bench.value("flat parameters and gradients", held(flatten_(network)), "bytes")
    bench.value("flat target network", held(TargetNetwork(network), without=network), "bytes")

    training = filled_training(bench, "sac", "HalfCheetah-v5", SACConfig())
    policy = training.agent.policy
    bench.value("parameters of SAC's actor", sum(p.nbytes for p in policy.parameters()), "bytes")
    for name, rules in ((DEFAULT, default_rules), (TWELVE, twelve_rules)):
        kept = PolicyAverages(training, rules(training.total_updates))
        bench.value(f"bank, {name}", held(kept.bank, without=policy), "bytes")
    bench.value("timeline of 256 segments", held(kept.timeline, without=policy), "bytes")
    bench.value("a transition in the replay buffer", training.replay.rows.nbytes / ROWS, "bytes")
    model = rival_model(sb3, "sac", "HalfCheetah-v5", SACConfig(), bench.device, filled=True)
    arrays = [x for x in vars(model.replay_buffer).values() if isinstance(x, np.ndarray)]
    bench.value("a transition in SB3's", sum(x.nbytes for x in arrays) / ROWS, "bytes")
    training.close()


def allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of the tensors that a call makes on the device, without what a kernel uses inside."""
    for _ in range(2):
        run()
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    where = "cpu" if device.type == "cpu" else "device"
    sizes = [getattr(event, f"self_{where}_memory_usage") for event in profiler.events()]
    return sum(size for size in sizes if size > 0)


def held(thing: object, without: nn.Module | None = None) -> int:
    """Bytes of all tensors that an object of this project leads to, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(x: object) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            walk(x.__dict__)
        elif isinstance(x, dict):
            call_all([partial(walk, value) for value in x.values()])
        elif isinstance(x, list | tuple | set):
            call_all([partial(walk, value) for value in x])
        elif isinstance(x, nn.Module) or type(x).__module__.startswith("polyak_rl"):
            walk(vars(x))

    walk(thing)
    for parameter in without.parameters() if without is not None else ():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


# --- scaling -------------------------------------------------------------------------------------


def scaling(bench: Bench) -> None:
    """How costs grow with parameters, tensors, averages and seeds."""
    options = bench.options
    for exponent in range(4, 9):
        count = 10**exponent
        needed = 4 * 4 * count  # online weights, their gradients, the target, one more vector
        if count <= options.max_parameters and needed < free_bytes(bench.device) / 2:
            contenders = target_updates(pieces(count, 12, bench.device))
            title, size = PARAMETERS, f"{count:.0e}"
            note = "12 tensors; all contenders work on the same memory"
            bench.compare(title, contenders, seconds=options.seconds, size=size, note=note)
    for tensors in (6, 30, 100, 300, 1000):
        if tensors <= options.max_tensors:
            contenders = target_updates(pieces(1_000_000, tensors, bench.device))
            note = "1,000,000 parameters in all"
            bench.compare(
                "tensors", contenders, seconds=options.seconds, size=str(tensors), note=note
            )
    for averages in (1, 2, 4, 8, 16, 32, 64):
        if averages <= options.max_averages:
            scale_averages(bench, averages)
    for seeds in (1, 2, 5, 10, 20, 32):
        if seeds <= options.max_seeds:
            scale_seeds(bench, seeds)


def pieces(parameters: int, tensors: int, device: torch.device) -> nn.Module:
    """A network of so many parameters in so many tensors of one size."""
    size = parameters // tensors
    return nn.ParameterList([torch.randn(size, device=device) for _ in range(tensors)])


def target_updates(online: nn.Module) -> dict[str, Callable[[], object]]:
    """Updates of one flat pair, and the plain copy of the same bytes."""
    flat = flatten_(online)
    target = TargetNetwork(online, TAU)
    source, destination = flat.buffers[0], torch.empty_like(flat.buffers[0])
    return {
        SB3: lambda: polyak_update(online.parameters(), target.parameters(), TAU),
        SOFT_FLAT: lambda: polyak_soft_update(target.module, online, TAU),
        TARGET_FLAT: target.update,
        LERP: lambda: destination.lerp_(source, TAU),
        COPY: lambda: destination.copy_(source),
    }


def free_bytes(device: torch.device) -> float:
    """The memory that is free on the device, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def scale_averages(bench: Bench, count: int) -> None:
    """A bank of many averages of SAC's actor."""
    policy = dense(17, 256, 256, 12).to(bench.device)
    flat = flatten_(policy)
    rules = {f"ema{i}": Ema(half_life=1000.0 * (i + 1)) for i in range(count)}
    scratch, update = torch.empty_like(flat.buffers[0]), AverageBank(policy, rules).update
    contenders = {
        COPY: lambda: scratch.copy_(flat.buffers[0]),
        "AverageBank": Contender(partial(call_all, [update] * BLOCK), BLOCK),
    }
    note = "SAC's actor, 73,000 parameters; an update of all averages"
    bench.compare("averages", contenders, seconds=bench.options.seconds, size=str(count), note=note)


def scale_seeds(bench: Bench, count: int) -> None:
    """Gradient steps of many seeds in one, counted a seed."""
    for title, algo, env_id, config in (
        ("DQN step of many seeds, 64 units", "dqn", "CartPole-v1", DQNConfig(batch_size=64)),
        (
            "DQN step of many seeds, 256x256",
            "dqn",
            "CartPole-v1",
            DQNConfig(hidden=(256, 256), batch_size=64),
        ),
        (SEEDS_SAC, "sac", "HalfCheetah-v5", SACConfig()),
    ):
        one, many = (filled_training(bench, algo, env_id, config, range(n)) for n in (1, count))
        contenders = {
            ALONE: Contender(partial(learn, one)),
            TOGETHER: Contender(partial(learn, many), count),
        }
        note = "time of one seed's step"
        bench.compare(title, contenders, seconds=bench.options.seconds, size=str(count), note=note)
        one.close()
        many.close()


# --- what only a GPU shows -----------------------------------------------------------------------

# Calls of the CUDA runtime and driver that put work on the device.
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
)


def gpu(bench: Bench) -> None:
    """Launches of an update and of a step, graph replay, and bandwidth."""
    network = critic_net().to(bench.device)
    for name, run in our_updates(network).items():
        bench.value(
            UPDATE_LAUNCHES if name == TARGET_FLAT else f"{name}: launches of an update",
            sum(launches(run).values()),
            "launches",
        )
    training = filled_training(bench, "sac", "HalfCheetah-v5", SACConfig())
    counts = launches(partial(learn, training))
    bench.value(SAC_LAUNCHES, sum(counts.values()), "launches")
    bench.value("of these, graphs", counts["cudaGraphLaunch"], "launches")
    training.close()

    flatten_(network)
    target = TargetNetwork(network, TAU)
    bench.compare(
        "target update as a captured graph",
        {TARGET_FLAT: target.update, "graph replay": captured(target.update)},
        seconds=bench.options.seconds,
    )

    contenders = target_updates(pieces(25_000_000, 12, bench.device))
    bench.compare(HUNDRED_MB, contenders, seconds=bench.options.seconds)
    seconds = bench.cases[-1].seconds
    for name, vectors in ((TARGET_FLAT, 3), (COPY, 2)):  # read two and write one; one and one
        rate = vectors * 4 * 25_000_000 / seconds(name).median
        bench.value(f"{HUNDRED_MB}, {name}: bandwidth", rate / 1e9, "GB/s")


def launches(run: Callable[[], object]) -> Counter[str]:
    """How often a call puts work on the device, by the runtime's function."""
    for _ in range(4):
        run()  # graphs are captured after a few calls
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return Counter(event.name for event in profiler.events() if event.name in LAUNCHES)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- what comes out ------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "updates": updates,
    "steps": steps,
    "loops": loops,
    "averaging": averaging,
    "memory": memory,
    "scaling": scaling,
    "gpu": gpu,
}


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "numpy", "stable_baselines3", "sbx-rl", "jax", "optax", "timm")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": bench.options.threads,
        "clock": bench.options.clock,
        "device": str(bench.device),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: found for name in packages if (found := package_version(name))},
        "load average": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
    }
    if bench.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(bench.device)
    if bench.wall:
        # Below 1 the machine was shared: the rest of the time somebody else had the core.
        facts["share of the core"] = round(bench.cpu / bench.wall, 3)
    return facts


def commit() -> str:
    """The commit that was measured, and whether files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def to_json(bench: Bench) -> dict[str, Any]:
    """All figures as plain values; times in seconds."""
    goals = []
    for goal in GOALS:
        reached = bench.reached(goal)
        goals.append(
            {
                "goal": goal.text,
                "required": goal.bound,
                "reached": reached and reached._asdict(),
                "verdict": verdict(goal, reached),
            }
        )
    cases = [
        dataclasses.asdict(case)
        | {"summary": {name: case.seconds(name)._asdict() for name in case.rounds}}
        for case in bench.cases
    ]
    options = dataclasses.asdict(bench.options) | {"out": str(bench.options.out)}
    return {
        "machine": machine(bench),
        "options": options,
        "goals": goals,
        "cases": cases,
        "values": [value._asdict() for value in bench.values],
    }


def verdict(goal: Goal, reached: Spread | None) -> str:
    """pass, miss or not measured."""
    if reached is None:
        return "not measured"
    return "pass" if goal.met(reached.median) else "miss"


def to_markdown(bench: Bench) -> str:
    """All figures as tables."""
    facts = "; ".join(f"{key} {value}" for key, value in machine(bench).items())
    parts = ["# Benchmarks", facts, "Medians over the rounds, quartiles in brackets."]
    rows = []
    for goal in GOALS:
        reached = bench.reached(goal)
        shown = "" if reached is None else "{:.3g} [{:.3g}, {:.3g}]".format(*reached)
        rows.append([goal.text, goal.bound, shown, verdict(goal, reached)])
    parts += ["## Goals", table(["ratio", "required", "reached", "verdict"], rows)]
    for section in SECTIONS:
        cases = [case for case in bench.cases if case.section == section]
        values = [value for value in bench.values if value.section == section]
        if cases or values:
            parts.append(f"## {section.capitalize()}")
        for title in dict.fromkeys(case.title for case in cases):
            group = [case for case in cases if case.title == title]
            parts += [f"### {title.capitalize() if title.islower() else title}"]
            parts += [group[0].note] if group[0].note else []
            parts.append(by_size(group) if len(group) > 1 else by_contender(group[0]))
        if values:
            parts.append(table(["", ""], [[v.name, counted(v)] for v in values]))
    return "\n\n".join(parts) + "\n"


def by_contender(case: Case) -> str:
    """A row a contender: its figure, and how many times as fast as the baseline it is."""
    base = case.baseline if case.baseline in case.rounds else next(iter(case.rounds))
    rows = []
    for name in case.rounds:
        times = "{:.3g} [{:.3g}, {:.3g}]".format(*case.ratio(base, name)) if name != base else "1"
        rows.append([name, figure(case, name), times])
    return table([case.size and f"size {case.size}", case.unit, f"times as fast as {base}"], rows)


def by_size(cases: list[Case]) -> str:
    """A row a size, a column a contender."""
    names = list(cases[0].rounds)
    rows = [[case.size, *(figure(case, name) for name in names)] for case in cases]
    return table(["size", *names], rows)


def figure(case: Case, name: str) -> str:
    """Median and quartiles in a unit that suits them."""
    median, low, high = case.seconds(name)
    if case.unit == "steps/s":
        return f"{1 / median:,.0f} [{1 / high:,.0f}, {1 / low:,.0f}]"
    power, unit = next(
        ((p, u) for p, u in ((1e6, "µs"), (1e3, "ms")) if median * p < 1000), (1.0, "s")
    )
    return f"{median * power:.3g} [{low * power:.3g}, {high * power:.3g}] {unit}"


def counted(value: Value) -> str:
    """A value with its unit."""
    digits = f"{value.value:,.4g}" if abs(value.value) < 1000 else f"{value.value:,.0f}"
    return f"{digits} {value.unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """As many threads in an operation, and as many cores for the process."""
    threads_before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if cores:
            os.sched_setaffinity(0, cores)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.bench")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            print(
                f"error: {name} must be at least 1, got {getattr(options, name)}", file=sys.stderr
            )
            return 2
    bench = Bench(options)
    if bench.device.type == "cuda" and not torch.cuda.is_available():
        print("error: device 'cuda' cannot be used: torch sees no GPU", file=sys.stderr)
        return 2
    on_gpu = bench.device.type == "cuda"
    chosen = options.sections or [name for name in SECTIONS if name != "gpu" or on_gpu]
    if "gpu" in chosen and not on_gpu:
        print("error: the section 'gpu' needs --device cuda", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with pinned(options.threads):
        for bench.section in chosen:
            SECTIONS[bench.section](bench)
            # After each, so that an interrupted run keeps what it has.
            (options.out / "bench.md").write_text(to_markdown(bench), encoding="utf-8")
            (options.out / "bench.json").write_text(json.dumps(to_json(bench), indent=1) + "\n")
    print(to_markdown(bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
