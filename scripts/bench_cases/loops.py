"""Whole training loops without evaluation: acting, storing, learning."""

import dataclasses
from functools import partial

from agents.presets import preset
from scripts.bench_cases.rivals import SB3, rival_agents
from scripts.bench_cases.steps import ALONE, TOGETHER
from scripts.bench_cases.timing import LOOP, Bench, Contender
from scripts.bench_cases.trainings import COMPILED, advance, fresh, ways

SAC_LOOP, DQN_LOOP = "SAC on HalfCheetah-v5", "DQN on CartPole-v1"
LOOP64, LOOP256 = "DQN on CartPole-v1, 64 units", "DQN on CartPole-v1, 256x256"
SEEDS = 20


def loops(bench: Bench) -> None:
    """Environment steps a second, beside other libraries' and of seeds together."""
    dqn = dataclasses.replace(preset("dqn", "CartPole-v1")[0], learning_starts=256)
    sac = dataclasses.replace(preset("sac", "HalfCheetah-v5")[0], learning_starts=16)
    for title, algo, env_id, config, burst in (
        (SAC_LOOP, "sac", "HalfCheetah-v5", sac, 16),
        (DQN_LOOP, "dqn", "CartPole-v1", dqn, 256),
    ):
        trainings = {
            way: fresh(algo, env_id, config, bench.device, compile=way == COMPILED)
            for way in ways(bench.device, bench.compile)
        }
        contenders = {
            way: Contender(partial(advance, training, burst), burst)
            for way, training in trainings.items()
        }
        for name, model in rival_agents(algo, env_id, config, bench.device).items():
            run = partial(model.learn, burst, log_interval=None, reset_num_timesteps=False)
            contenders[name] = Contender(run, burst, rival=True)
        note = (
            f"units {config.hidden}, batch {config.batch_size}, {config.gradient_steps} gradient "
            f"steps every {config.train_every} environment steps, no evaluation"
        )
        bench.compare(title, contenders, seconds=LOOP, unit="steps/s", note=note, baseline=SB3)
        for training in trainings.values():
            training.close()

    for title, hidden in ((LOOP64, (64, 64)), (LOOP256, (256, 256))):
        config = dataclasses.replace(dqn, hidden=hidden)
        one, many = (
            fresh("dqn", "CartPole-v1", config, bench.device, range(seeds)) for seeds in (1, SEEDS)
        )
        bench.compare(
            title,
            {
                ALONE: Contender(partial(advance, one, 256), 256),
                TOGETHER: Contender(partial(advance, many, 256), 256 * SEEDS),
            },
            seconds=LOOP,
            unit="steps/s",
            size=str(SEEDS),
            note="environment steps of all seeds; one seed at a time against all in one process",
            baseline=ALONE,
        )
        one.close()
        many.close()
