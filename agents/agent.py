"""What every agent has: its settings, what they may be, and what the training loop asks of it.

A new agent is a file like `agents/ddpg.py`, and elsewhere these lines:

| file | line |
|---|---|
| `agents/agent.py` | what its own settings may be, in `LIMITS` |
| `agents/presets.py` | its name, class and config, in `ALGORITHMS` |
| `tests/test_program.py` | a small config, in `CASES` |
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from agents.optimizers import Descent
from agents.seeding import Draw
from polyak_rl import TargetNetwork

Target = Literal["soft", "hard", "none"]


@dataclass(frozen=True)
class AgentConfig:
    """Settings of every agent; an agent's own config adds to them, and names values that differ.

    The values are those of Stable-Baselines3's SAC.
    """

    learning_rate: float = 3e-4
    """Adam's step size, of every network"""
    batch_size: int = 256
    """transitions in a gradient step"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    learning_starts: int = 100
    """environment steps taken at random before the first gradient step"""
    gamma: float = 0.99
    """discount per environment step"""
    train_every: int = 1
    """environment steps between two rounds of gradient steps"""
    gradient_steps: int = 1
    """gradient steps in a round"""
    hidden: tuple[int, ...] = (256, 256)
    """units of each hidden layer, of every network"""
    target: Target = "soft"
    """what values are bootstrapped from; none: the online networks themselves"""
    tau: float = 0.005
    """weight of the online network in each update of a soft target, below 1 there"""
    tau_end: float | None = None
    """tau at the end of the run, which it goes to linearly; None: it stays"""
    target_update_every: int = 400
    """gradient steps between two copies of a hard target; 400 has the mean age of tau = 0.005"""


class Turns(nn.Module):
    """Counts gradient steps, and says what is due in each; a module, so that checkpoints keep it.

    Args:
        every: Gradient steps between two turns, one number for each thing that has turns.

    Example:
        >>> turns = Turns(2, 3)
        >>> [turns.next() for _ in range(3)]
        [(False, False), (True, False), (False, True)]
    """

    def __init__(self, *every: int) -> None:
        super().__init__()
        self.every = every
        self.steps = 0

    def next(self) -> tuple[bool, ...]:
        """Count a gradient step; whose turn it is in it."""
        steps = vars(self)["steps"] = self.steps + 1  # a module's attributes are slow to set
        return tuple([steps % every == 0 for every in self.every])

    def get_extra_state(self) -> int:
        """The count."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Go on from a saved count."""
        self.steps = state


class Agent(Protocol):
    """S independent agents, one per seed; every tensor begins with the dimension S.

    Args:
        obs_dim: Size O of an observation; for DQN also (frames, height, width), stacks of images.
        action_dim: Size A of an action, or the number of discrete ones.
        config: Settings.
        seeds: One training seed per agent.
        device: Where the networks live.
        total_steps: Environment steps of the whole run, to which schedules are tied.
    """

    targets: dict[str, TargetNetwork]
    policy: nn.Module
    """acts, and is what averages are taken of"""
    descent: Descent
    """the networks that are trained, and the watch over their gradients"""
    turns: Turns
    """whose turn it is in a gradient step, of what is not due in all of them"""

    @property
    def draws(self) -> Sequence[Draw]:
        """What `learn` is given besides a batch, in the order of the stream that it is from."""
        ...

    @property
    def learn(self) -> Callable[..., dict[str, Tensor]]:
        """One gradient step, for a batch, `draws` and turns, in this order: it can be one program.

        Returns tags with values [S, ...] on the device, shown by their means.
        """
        ...

    @property
    def config(self) -> AgentConfig:
        """Its settings."""
        ...

    def noise(self, n: int) -> Draw:
        """What `explore` is given besides observations, for n environments of every seed."""
        ...

    @property
    def explore(self) -> Callable[..., Tensor]:
        """Actions of the behaviour policy for obs [S, n, ...], draws, and the values of `charts`.

        It can be one program, and is not asked before learning starts where its draws are normal.
        """
        ...

    def charts(self, step: int) -> dict[str, float]:
        """Tags of what the agent's schedules say at an environment step."""
        ...


# field: (smallest, largest), both allowed
LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 1.0),
    "batch_size": (1, math.inf),
    "buffer_size": (1, 2**31),
    "learning_starts": (0, math.inf),
    "gamma": (0.0, 1.0),
    "tau": (0.0, 1.0),
    "tau_end": (0.0, 1.0),
    "target_update_every": (1, math.inf),
    "train_every": (1, math.inf),
    "gradient_steps": (0, math.inf),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "exploration_fraction": (0.0, 1.0),
    "max_grad_norm": (1e-12, math.inf),
    "noise_std": (0.0, 10.0),
    "target_noise_std": (0.0, 10.0),
    "target_noise_clip": (0.0, 10.0),
    "policy_delay": (1, math.inf),
    "alpha_init": (1e-12, 1e12),
    "hidden": (1, 2**20),
    "total_steps": (1, math.inf),
    "n_envs": (1, 2**16),
    "eval_every": (0, math.inf),
    "eval_episodes": (1, 2**20),
    "eval_processes": (1, 2**10),
    "max_episode_steps": (1, math.inf),
    "log_every": (1, math.inf),
    "lr_decay_until": (1e-12, 1.0),
    "lr_floor": (0.0, 1.0),
}


def check(config: Any) -> None:
    """Check the fields of a dataclass; a tuple is checked item by item, and None passes.

    Raises:
        ValueError: A field lies outside its limits; the first such one is named.
    """
    for field in dataclasses.fields(config):
        low, high = LIMITS.get(field.name, (-math.inf, math.inf))
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not low <= item <= high:
                allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise ValueError(f"{field.name} must be {allowed}, got {value}")
