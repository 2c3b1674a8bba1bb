"""Memory, open files and event files do not grow with the run.

`LONG_RUN_STEPS=1000000 pytest -m full tests/test_long_run.py` takes a million steps.
"""

import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from agents.averaging import record_policy
from agents.checkpoint import Checkpoints
from agents.dqn import DQNConfig
from agents.training import TrainConfig, Training
from scripts.experiment.run_folder import RunFolder
from scripts.experiment.schemes import SHOWN, rules_of


class Short(gym.Env):
    """Episodes of 5 steps, as many as there can be."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        self.time += 1
        return np.full(2, self.time / 5, np.float32), float(action), False, self.time == 5, {}


@pytest.fixture(autouse=True)
def _environment():
    gym.register("test/Short-v0", Short)
    yield
    gym.registry.pop("test/Short-v0")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


def run(path, steps, checks):
    """Train with logs, averages and checkpoints; (memory, files, event bytes) at each check."""
    config = TrainConfig("test/Short-v0", steps, eval_every=steps // 20, eval_episodes=5)
    agent = DQNConfig(hidden=(8,), batch_size=8, buffer_size=1000, train_every=16)
    training = Training("dqn", agent, config)
    averages = record_policy(training, rules_of(SHOWN, training.total_updates), 32)
    folder = RunFolder(path, "dqn", 1, config, agent)
    training.logs = (folder,)
    checkpoints, seen = Checkpoints(path / "checkpoint", training, averages), {}

    def after_step():
        if training.step % (steps // 20) == 0:
            checkpoints.save()
            folder.events.flush()
        if training.step in checks:
            events = sum(p.stat().st_size for p in path.rglob("events.out.tfevents.*"))
            seen[training.step] = resident_bytes(), open_files(), events

    training.run(after_step)
    folder.close()
    training.close()
    return [seen[step] for step in checks]


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_open_files_stay_as_they_are_over_a_long_run(tmp_path, capsys):
    steps = int(os.environ.get("LONG_RUN_STEPS", 60_000))
    (early, files, _), (late, files_late, events) = run(tmp_path, steps, [steps // 4, steps])
    with capsys.disabled():
        mib = [f"{size / 2**20:.1f}" for size in (early, late, events)]
        print(f"\nmemory {mib[0]} -> {mib[1]} MiB, events {mib[2]} MiB")
    assert late - early < 8 * 2**20
    assert files_late == files
    assert events < 8 * 2**20


def test_no_more_training_episodes_are_logged_than_a_curve_can_show(monkeypatch):
    shown, steps = 300, []
    monkeypatch.setattr("agents.training.EPISODES_SHOWN", shown)

    class Log:
        def scalars(self, step, values):
            if "charts/episodic_return" in values:
                steps.append(step)

        def evaluation(self, *args):
            pass

    total = 8 * shown
    agent = DQNConfig(hidden=(8,), gradient_steps=0)
    training = Training("dqn", agent, TrainConfig("test/Short-v0", total), logs=[Log()])
    training.run()
    training.close()
    assert 0.7 * shown < len(steps) <= shown
    assert steps == sorted(set(steps))
