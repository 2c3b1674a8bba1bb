"""Every speed that this project claims, measured beside what it is compared with, in one process.

    python -m scripts.bench                          # all sections, about a quarter of an hour
    python -m scripts.bench updates steps            # some of them
    python -m scripts.bench --device cuda            # adds launches and bandwidth

This file says what is compared, and which ratios must be reached. Contenders take turns
(`bench_cases/timing.py`), ours beside other libraries (`rivals.py`) and what cannot be beaten
(`floors.py`). The process is pinned to as many cores as it has threads. Libraries that are not
installed are left out (extra `bench`).

Written under `--out`: `bench.md` to read, and `bench.json` with every round of every contender.
"""

import copy
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from stable_baselines3.common.utils import polyak_update
from torch import nn

from agents.averaging import default_rules, record_policy
from agents.ddpg import DDPGConfig
from agents.dqn import DQNConfig
from agents.presets import preset
from agents.program import require_compiler
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import TrainConfig, Training
from polyak_rl import AverageBank, Ema, Power, Rule, TargetNetwork, Uniform, Window, flatten_
from polyak_rl import soft_update as polyak_soft_update
from scripts.bench_cases.counting import GRAPH_LAUNCH, allocated, flops, held, launches
from scripts.bench_cases.floors import COPY, bare_updates, gemms, on_one_vector
from scripts.bench_cases.rivals import (
    AVERAGED_MODEL,
    CLEANRL,
    SB3,
    SBX,
    fill,
    rival_agents,
    rival_updates,
)
from scripts.bench_cases.tables import machine, to_json, to_markdown
from scripts.bench_cases.timing import Bench, Clock, Contender, Goal, pinned

Section = Literal["updates", "steps", "loops", "averaging", "memory", "scaling", "gpu"]

TAU = 0.005
ROWS = 5_000  # transitions in a replay buffer that gradient steps are measured on
BLOCK = 32  # updates after which a bank takes them in: calls hold so many, lest turns differ
STEPS_OF_A_RUN = 1_000_000  # environment steps that averages and timelines are laid out for

# Names that goals refer to, beside those of rivals and floors.
GEMMS, OURS, COMPILED = "its GEMMs alone", "polyak_rl", "polyak_rl, compiled"
SOFT, SOFT_FLAT = "soft_update", "soft_update, flat"
TARGET, TARGET_FLAT = "TargetNetwork", "TargetNetwork, flat"
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
    clock: Clock = "wall"
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
    compile: bool = True
    """measure compiled steps too, where a C++ compiler is at hand; ten seconds each to begin"""
    out: Path = Path("runs/bench")
    """folder of bench.md and bench.json"""


TWIN, NARROW, CONV = "twin critic 256x256", "three-layer 64-unit net", "160 conv tensors"
SAC_STEP, DDPG_STEP, TD3_STEP = "SAC gradient step", "DDPG gradient step", "TD3 gradient step"
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
    *(
        Goal(f"{step}, compiled, against SBX", title, "", SBX, COMPILED, at_least=1)
        for step, title in (
            ("SAC step", SAC_STEP),
            ("DDPG step", DDPG_STEP),
            ("TD3 step", TD3_STEP),
            ("DQN step, 64 units", DQN64_STEP),
            ("DQN step, 256x256", DQN256_STEP),
            ("SAC whole loop", SAC_LOOP),
            ("DQN whole loop", DQN_LOOP),
        )
    ),
    Goal("SAC whole loop against SB3", SAC_LOOP, "", SB3, OURS, at_least=1.5),
    Goal("DQN whole loop against SB3", DQN_LOOP, "", SB3, OURS, at_least=1.6),
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


def updates(bench: Bench, options: Options) -> None:
    """One target update on networks of several sizes."""
    for title, build in ((TWIN, critic_net), (NARROW, narrow_net), (CONV, conv_net)):
        network = build().to(bench.device)
        contenders = {
            **rival_updates(network, TAU),
            **our_updates(network),
            **bare_updates(network, TAU),
        }
        note = (
            f"{len([*network.parameters()])} tensors, "
            f"{sum(p.numel() for p in network.parameters()):,} parameters"
        )
        bench.compare(title, contenders, seconds=options.seconds, note=note, baseline=SB3)


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


# --- gradient steps ------------------------------------------------------------------------------


def steps(bench: Bench, options: Options) -> None:
    """One gradient step, sampling from a full replay buffer included."""
    for title, algo, env_id, config in (
        (SAC_STEP, "sac", "HalfCheetah-v5", SACConfig()),
        (DDPG_STEP, "ddpg", "HalfCheetah-v5", DDPGConfig(hidden=(256, 256))),
        (TD3_STEP, "td3", "HalfCheetah-v5", TD3Config(hidden=(256, 256))),
        (DQN64_STEP, "dqn", "CartPole-v1", DQNConfig(hidden=(64, 64), batch_size=64)),
        (DQN256_STEP, "dqn", "CartPole-v1", DQNConfig(hidden=(256, 256), batch_size=64)),
    ):
        # Discrete control learns in bursts, as in its presets; the others at every step, or, where
        # the actor has every second one, at two.
        burst = {"dqn": 64, "td3": 2}.get(algo, 1)
        trainings = {
            name: filled_training(algo, env_id, config, bench.device, compile=name == COMPILED)
            for name in ours(options)
        }
        size = trainings[OURS].interface
        floor = gemms(algo, size.obs_dim, size.action_dim, config, bench.device)
        contenders = {GEMMS: Contender(partial(call_all, floor), burst if algo == "td3" else 1)}
        for name, training in trainings.items():
            contenders[name] = Contender(partial(training.learn, burst), burst)
        rival_config = dataclasses.replace(config, buffer_size=ROWS)
        for name, model in rival_agents(algo, env_id, rival_config, bench.device).items():
            fill(model.replay_buffer)
            train = partial(model.train, gradient_steps=burst, batch_size=config.batch_size)
            contenders[name] = Contender(train, burst, rival=True)
        for what, name in (
            ("floating-point operations in products", OURS),
            ("those of its GEMMs alone", GEMMS),
        ):
            run, count = contenders[name][:2]
            bench.value(f"{title}: {what}", flops(run) / count, "FLOP")
        note = f"{env_id}'s shapes, units {config.hidden}, batch {config.batch_size}"
        bench.compare(title, contenders, seconds=options.step_seconds, note=note, baseline=SB3)
        for training in trainings.values():
            training.close()


def ours(options: Options) -> list[str]:
    """In which ways this project's gradient steps are measured."""
    if not options.compile:
        return [OURS]
    try:
        if options.device == "cpu":
            require_compiler()
    except ValueError:
        return [OURS]
    return [OURS, COMPILED]


def call_all(calls: Sequence[Callable[[], object]]) -> None:
    """Call one after another."""
    for call in calls:
        call()


def fresh_training(
    algo: str,
    env_id: str,
    config: Any,
    device: torch.device,
    seeds: Sequence[int] = (1,),
    buffer_size: int = 100_000,
    compile: bool = False,
) -> Training:
    """A training that never evaluates and never ends."""
    config = dataclasses.replace(config, buffer_size=buffer_size)
    run = TrainConfig(
        env_id,
        STEPS_OF_A_RUN,
        eval_every=2 * STEPS_OF_A_RUN,
        device=str(device),
        compile=compile,
    )
    return Training(algo, config, run, seeds)


def filled_training(
    algo: str,
    env_id: str,
    config: Any,
    device: torch.device,
    seeds: Sequence[int] = (1,),
    compile: bool = False,
) -> Training:
    """A training with random transitions in every row of its replay buffer."""
    training = fresh_training(algo, env_id, config, device, seeds, ROWS, compile)
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


# --- whole loops ---------------------------------------------------------------------------------


def loops(bench: Bench, options: Options) -> None:
    """Environment steps a second with everything in: acting, storing, learning."""
    dqn = dataclasses.replace(preset("dqn", "CartPole-v1")[0], learning_starts=256)
    sac = dataclasses.replace(preset("sac", "HalfCheetah-v5")[0], learning_starts=16)
    turns: dict[str, Any] = {"seconds": options.loop_seconds, "unit": "steps/s"}
    for title, algo, env_id, config, burst in (
        (SAC_LOOP, "sac", "HalfCheetah-v5", sac, 16),
        (DQN_LOOP, "dqn", "CartPole-v1", dqn, 256),
    ):
        trainings = {
            name: fresh_training(algo, env_id, config, bench.device, compile=name == COMPILED)
            for name in ours(options)
        }
        contenders = {
            name: Contender(partial(advance, training, burst), burst)
            for name, training in trainings.items()
        }
        for name, model in rival_agents(algo, env_id, config, bench.device).items():
            run = partial(model.learn, burst, log_interval=None, reset_num_timesteps=False)
            contenders[name] = Contender(run, burst, rival=True)
        note = (
            f"units {config.hidden}, batch {config.batch_size}, {config.gradient_steps} gradient "
            f"steps every {config.train_every} environment steps, no evaluation"
        )
        bench.compare(title, contenders, note=note, baseline=SB3, **turns)
        for training in trainings.values():
            training.close()

    count = min(20, options.max_seeds)
    for title, hidden in ((SEEDS64, (64, 64)), (SEEDS256, (256, 256))):
        config = dataclasses.replace(dqn, hidden=hidden)
        one, many = (
            fresh_training("dqn", "CartPole-v1", config, bench.device, range(seeds))
            for seeds in (1, count)
        )
        contenders = {
            ALONE: Contender(partial(advance, one, 256), 256),
            TOGETHER: Contender(partial(advance, many, 256), 256 * count),
        }
        note = "environment steps of all seeds; one seed at a time against all in one process"
        bench.compare(title, contenders, size=str(count), note=note, baseline=ALONE, **turns)
        one.close()
        many.close()


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


def averaging(bench: Bench, options: Options) -> None:
    """A SAC step with and without averages of the policy, in place and on their own."""
    training = filled_training("sac", "HalfCheetah-v5", SACConfig(), bench.device)
    recorders: dict[str, list[Callable[[], None]]] = {PLAIN: []}
    for name, rules in ((DEFAULT, default_rules), (TWELVE, twelve_rules)):
        record_policy(training, rules(training.total_updates))
        recorders[name], training.recorders = training.recorders, []
    # All contenders train one agent, so that they differ in the averages alone.
    calls = {name: [partial(training.learn, 1), *records] for name, records in recorders.items()}
    calls |= {f"{name}, alone": recorders[name] for name in (DEFAULT, TWELVE)}
    contenders = {
        name: Contender(partial(call_all, each * BLOCK), BLOCK) for name, each in calls.items()
    }
    bench.compare(AVERAGING, contenders, seconds=options.step_seconds, baseline=PLAIN)
    training.close()


# --- memory --------------------------------------------------------------------------------------


def memory(bench: Bench, options: Options) -> None:
    """Bytes that are held, and bytes that an update allocates."""
    network = critic_net().to(bench.device)
    updates = {**rival_updates(network, TAU), **our_updates(network)}
    for name in (SB3, CLEANRL, AVERAGED_MODEL, SOFT, SOFT_FLAT, TARGET_FLAT):
        size = allocated(updates[name], bench.device)
        bench.value(f"{name}: allocated in an update, {TWIN}", size, "bytes")

    size = sum(p.nbytes for p in network.parameters())
    bench.value(f"parameters, {TWIN}", size, "bytes")
    bench.value("flat parameters and gradients", held(flatten_(network)), "bytes")
    bench.value("flat target network", held(TargetNetwork(network), without=network), "bytes")

    training = filled_training("sac", "HalfCheetah-v5", SACConfig(), bench.device)
    policy = training.agent.policy
    bench.value("parameters of SAC's actor", sum(p.nbytes for p in policy.parameters()), "bytes")
    for name, rules in ((DEFAULT, default_rules), (TWELVE, twelve_rules)):
        kept = record_policy(training, rules(training.total_updates))
        bench.value(f"bank, {name}", held(kept.bank, without=policy), "bytes")
    bench.value("timeline of 256 segments", held(kept.timeline, without=policy), "bytes")
    bench.value("a transition in the replay buffer", training.replay.rows.nbytes / ROWS, "bytes")
    config = SACConfig(buffer_size=ROWS)
    rival = rival_agents("sac", "HalfCheetah-v5", config, bench.device)[SB3]
    arrays = [x for x in vars(rival.replay_buffer).values() if isinstance(x, np.ndarray)]
    bench.value("a transition in SB3's", sum(x.nbytes for x in arrays) / ROWS, "bytes")
    training.close()


# --- scaling -------------------------------------------------------------------------------------


def scaling(bench: Bench, options: Options) -> None:
    """How costs grow with parameters, tensors, averages and seeds."""
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
            scale_averages(bench, averages, options.seconds)
    for seeds in (1, 2, 5, 10, 20, 32):
        if seeds <= options.max_seeds:
            scale_seeds(bench, seeds, options.seconds)


def pieces(parameters: int, tensors: int, device: torch.device) -> nn.Module:
    """A network of so many parameters in so many tensors of one size."""
    size = parameters // tensors
    return nn.ParameterList([torch.randn(size, device=device) for _ in range(tensors)])


def target_updates(online: nn.Module) -> dict[str, Callable[[], object]]:
    """Updates of one flat pair, and the plain copy of the same bytes."""
    flat = flatten_(online)
    target = TargetNetwork(online, TAU)
    return {
        SB3: lambda: polyak_update(online.parameters(), target.parameters(), TAU),
        SOFT_FLAT: lambda: polyak_soft_update(target.module, online, TAU),
        TARGET_FLAT: target.update,
        **on_one_vector(flat.buffers[0], TAU),
    }


def free_bytes(device: torch.device) -> float:
    """The memory that is free on the device, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def scale_averages(bench: Bench, count: int, seconds: float) -> None:
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
    bench.compare("averages", contenders, seconds=seconds, size=str(count), note=note)


def scale_seeds(bench: Bench, count: int, seconds: float) -> None:
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
        one, many = (
            filled_training(algo, env_id, config, bench.device, range(n)) for n in (1, count)
        )
        contenders = {
            ALONE: Contender(partial(one.learn, 1)),
            TOGETHER: Contender(partial(many.learn, 1), count),
        }
        note = "time of one seed's step"
        bench.compare(title, contenders, seconds=seconds, size=str(count), note=note)
        one.close()
        many.close()


# --- what only a GPU shows -----------------------------------------------------------------------


def gpu(bench: Bench, options: Options) -> None:
    """Launches of an update and of a step, graph replay, and bandwidth."""
    network = critic_net().to(bench.device)
    for name, run in our_updates(network).items():
        bench.value(
            UPDATE_LAUNCHES if name == TARGET_FLAT else f"{name}: launches of an update",
            sum(launches(run).values()),
            "launches",
        )
    training = filled_training("sac", "HalfCheetah-v5", SACConfig(), bench.device, compile=True)
    counts = launches(partial(training.learn, 1))
    bench.value(SAC_LAUNCHES, sum(counts.values()), "launches")
    bench.value("of these, graphs", counts[GRAPH_LAUNCH], "launches")
    training.close()

    flatten_(network)
    target = TargetNetwork(network, TAU)
    bench.compare(
        "target update as a captured graph",
        {TARGET_FLAT: target.update, "graph replay": captured(target.update)},
        seconds=options.seconds,
    )

    contenders = target_updates(pieces(25_000_000, 12, bench.device))
    bench.compare(HUNDRED_MB, contenders, seconds=options.seconds)
    seconds = bench.cases[-1].seconds
    for name, vectors in ((TARGET_FLAT, 3), (COPY, 2)):  # read two and write one; one and one
        rate = vectors * 4 * 25_000_000 / seconds(name).median
        bench.value(f"{HUNDRED_MB}, {name}: bandwidth", rate / 1e9, "GB/s")


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


# --- the command line ----------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench, Options], None]] = {
    "updates": updates,
    "steps": steps,
    "loops": loops,
    "averaging": averaging,
    "memory": memory,
    "scaling": scaling,
    "gpu": gpu,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, args=argv, prog="python -m scripts.bench")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            print(
                f"error: {name} must be at least 1, got {getattr(options, name)}", file=sys.stderr
            )
            return 2
    bench = Bench(torch.device(options.device), options.rounds, options.clock)
    if bench.device.type == "cuda" and not torch.cuda.is_available():
        print("error: device 'cuda' cannot be used: torch sees no GPU", file=sys.stderr)
        return 2
    on_gpu = bench.device.type == "cuda"
    chosen = options.sections or [name for name in SECTIONS if name != "gpu" or on_gpu]
    if "gpu" in chosen and not on_gpu:
        print("error: the section 'gpu' needs --device cuda", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    plain_options = dataclasses.asdict(options) | {"out": str(options.out)}
    with pinned(options.threads):
        for bench.section in chosen:
            SECTIONS[bench.section](bench, options)
            # After each, so that an interrupted run keeps what it has.
            facts = machine(bench)
            text = to_markdown(bench, GOALS, facts, SECTIONS)
            figures = to_json(bench, GOALS, facts, plain_options)
            (options.out / "bench.md").write_text(text, encoding="utf-8")
            (options.out / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
