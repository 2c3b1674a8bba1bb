"""Gradient steps beside other libraries' and beside their own matrix products, and of many seeds.

Discrete control learns in bursts, as in its presets; the others take one step a call, TD3 two, of
which one is an actor's too.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from agents.ddpg import DDPGConfig
from agents.denormals import flushed
from agents.dqn import DQNConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
from agents.training import Training
from scripts.bench_cases.counting import flops
from scripts.bench_cases.floors import gemms, traffic
from scripts.bench_cases.gpu import graphed
from scripts.bench_cases.lean import LEAN, LeanSAC
from scripts.bench_cases.rivals import SB3, fill, rival_agents
from scripts.bench_cases.timing import STEP, Bench, Contender, Needs, call_all
from scripts.bench_cases.trainings import COMPILED, OURS, ROWS, filled, learn, ways

GEMMS = "its GEMMs alone"
ALONE, TOGETHER, TF32 = "one seed", "seeds together", "seeds together, TF32"
SAC_STEP, DDPG_STEP, TD3_STEP = "SAC gradient step", "DDPG gradient step", "TD3 gradient step"
DQN64_STEP, DQN256_STEP = "DQN gradient step, 64 units", "DQN gradient step, 256x256"
DEAD_UNITS = "DDPG gradient step, half of the units dead"
FLUSHED, KEPT = "denormal numbers flushed", "denormal numbers kept"
SAC_SEEDS = "SAC step of many seeds"
DQN64_SEEDS, DQN256_SEEDS = "DQN step of many seeds, 64 units", "DQN step of many seeds, 256x256"


class Step(NamedTuple):
    """A gradient step at an environment's shapes."""

    algo: str
    env_id: str
    config: Any
    burst: int = 1


DQN64 = Step("dqn", "CartPole-v1", DQNConfig(hidden=(64, 64), batch_size=64), 64)
DQN256 = Step("dqn", "CartPole-v1", DQNConfig(hidden=(256, 256), batch_size=64), 64)
SAC = Step("sac", "HalfCheetah-v5", SACConfig())
STEPS = {
    SAC_STEP: SAC,
    DDPG_STEP: Step("ddpg", "HalfCheetah-v5", DDPGConfig(hidden=(256, 256))),
    TD3_STEP: Step("td3", "HalfCheetah-v5", TD3Config(hidden=(256, 256)), 2),
    DQN64_STEP: DQN64,
    DQN256_STEP: DQN256,
}
MANY_SEEDS = {DQN64_SEEDS: DQN64, DQN256_SEEDS: DQN256, SAC_SEEDS: SAC}


def floor_of(step: Step, training: Training) -> tuple[Contender, Needs]:
    """The matrix products of a step, and what its roofline is made of."""
    size, algo = training.interface, step.algo
    shapes = (algo, math.prod(size.obs_shape), size.action_dim, step.config)
    products = partial(call_all, gemms(*shapes, training.device))
    count = 2 if algo == "td3" else 1
    needs = Needs(traffic(*shapes) / count, flops(products) / count)
    return Contender(products, count), needs


def steps(bench: Bench) -> None:
    """One gradient step, sampling from a full replay buffer included."""
    for title, step in STEPS.items():
        algo, env_id, config, burst = step
        trainings = {
            way: filled(algo, env_id, config, bench.device, compile=way == COMPILED)
            for way in ways(bench.device, bench.compile)
        }
        floor, needs = floor_of(step, trainings[OURS])
        bench.value(f"{title}: operations in its products", needs.flop, "FLOP")
        contenders = {GEMMS: floor}
        for way, training in trainings.items():
            contenders[way] = Contender(partial(learn, training, burst), burst)
        rival_config = dataclasses.replace(config, buffer_size=ROWS)
        for name, model in rival_agents(algo, env_id, rival_config, bench.device).items():
            fill(model.replay_buffer)
            train = partial(model.train, gradient_steps=burst, batch_size=config.batch_size)
            contenders[name] = Contender(train, burst, rival=True)
        if algo == "sac" and bench.compile and bench.device.type == "cuda":
            size = trainings[OURS].interface
            sizes = math.prod(size.obs_shape), size.action_dim
            lean = LeanSAC(*sizes, config, bench.device, ROWS, graphed)
            contenders[LEAN] = Contender(lean, rival=True)
        note = f"{env_id}'s shapes, units {config.hidden}, batch {config.batch_size}"
        bench.compare(title, contenders, seconds=STEP, note=note, baseline=SB3, needs=needs)
        for training in trainings.values():
            training.close()


def dead_units(bench: Bench) -> None:
    """A step late in a run, where of half of the units Adam's first moments are denormal."""
    if bench.device.type != "cpu":
        return
    contenders, trainings = {}, []
    for name, mode in ((FLUSHED, flushed), (KEPT, nullcontext)):
        training = filled(*STEPS[DDPG_STEP][:3], bench.device)
        trainings.append(training)
        learn(training, 3)
        agent: Any = training.agent
        for network in (agent.actor, agent.critic):
            for layer in [*network.net][:-1:2]:
                layer.bias.data[..., ::2] = -1e3
        for optimizer in agent.descent.optimizers.values():
            for state in optimizer.state.values():
                state["exp_avg"].mul_(1e-36)
        contenders[name] = partial(step_in, mode, training)
    bench.compare(DEAD_UNITS, contenders, seconds=STEP, baseline=KEPT)
    for training in trainings:
        training.close()


def step_in(mode: Callable[[], AbstractContextManager[object]], training: Training) -> None:
    """A gradient step in a way of treating denormal numbers."""
    training.learner.begin(1)
    with mode():
        training.learner.step()


def many_seeds(bench: Bench) -> None:
    """Gradient steps of many seeds in one, counted a seed."""
    if bench.device.type == "cuda":
        many_seeds_on_gpu(bench)
        return
    for title, step in MANY_SEEDS.items():
        for count in bench.sizes((1, 2, 5, 10, 20, 32)):
            one, many = (
                filled(step.algo, step.env_id, step.config, bench.device, range(n))
                for n in (1, count)
            )
            contenders = {
                ALONE: Contender(partial(learn, one)),
                TOGETHER: Contender(partial(learn, many), count),
            }
            bench.compare(title, contenders, size=str(count), note="time of one seed's step")
            one.close()
            many.close()


def many_seeds_on_gpu(bench: Bench) -> None:
    """The same as programs, with products of float32 and, of many seeds of SAC, of TF32."""
    for title in (SAC_SEEDS, DQN64_SEEDS):
        algo, env_id, config, _ = step = MANY_SEEDS[title]
        for count in bench.sizes((1, 20, 128, 1024)):
            many = partial(filled, algo, env_id, config, bench.device, range(count), bench.compile)
            trainings = {TOGETHER: many()}
            if algo == "sac" and count > 1:
                learn(trainings[TOGETHER])  # recorded with the precision of now
                trainings = {**trainings, TF32: many(precision="high")}
            contenders = {
                name: Contender(partial(learn, training), count)
                for name, training in trainings.items()
            }
            _, needs = floor_of(step, trainings[TOGETHER])
            note = (
                "time of one seed's step, compiled" if bench.compile else "time of one seed's step"
            )
            bench.compare(title, contenders, size=str(count), note=note, needs=needs)
            for training in trainings.values():
                training.close()
