"""Bytes that are held, and bytes that an update allocates."""

import numpy as np

from agents.sac import SACConfig
from polyak_rl import TargetNetwork, flatten_
from scripts.bench_cases.averages import RULES, averages_of
from scripts.bench_cases.counting import allocated, held
from scripts.bench_cases.rivals import AVERAGED_MODEL, CLEANRL, SB3, rival_agents, rival_updates
from scripts.bench_cases.timing import Bench
from scripts.bench_cases.trainings import ROWS, filled
from scripts.bench_cases.updates import (
    SOFT,
    SOFT_FLAT,
    TARGET_FLAT,
    TAU,
    TWIN,
    critic_net,
    our_updates,
)


def memory(bench: Bench) -> None:
    """Bytes of networks, targets, averages and transitions; allocations of an update."""
    network = critic_net().to(bench.device)
    updates = {**rival_updates(network, TAU), **our_updates(network)}
    for name in (SB3, CLEANRL, AVERAGED_MODEL, SOFT, SOFT_FLAT, TARGET_FLAT):
        size = allocated(updates[name], bench.device)
        bench.value(f"{name}: allocated in an update, {TWIN}", size, "bytes")

    size = sum(p.nbytes for p in network.parameters())
    bench.value(f"parameters, {TWIN}", size, "bytes")
    bench.value("flat parameters and gradients", held(flatten_(network)), "bytes")
    bench.value("flat target network", held(TargetNetwork(network), without=network), "bytes")

    training = filled("sac", "HalfCheetah-v5", SACConfig(), bench.device)
    policy = training.agent.policy
    bench.value("parameters of SAC's actor", sum(p.nbytes for p in policy.parameters()), "bytes")
    for name in RULES:
        averages, _ = averages_of(training, name)
        bench.value(f"bank, {name}", held(averages.bank, without=policy), "bytes")
    bench.value("timeline of 256 segments", held(averages.timeline, without=policy), "bytes")
    bench.value("a transition in the replay buffer", training.replay.rows.nbytes / ROWS, "bytes")
    config = SACConfig(buffer_size=ROWS)
    rival = rival_agents("sac", "HalfCheetah-v5", config, bench.device)[SB3]
    arrays = [x for x in vars(rival.replay_buffer).values() if isinstance(x, np.ndarray)]
    bench.value("a transition in SB3's", sum(x.nbytes for x in arrays) / ROWS, "bytes")
    training.close()
