"""DQN: Mnih et al. 2015, Human-level control through deep reinforcement learning.

https://www.nature.com/articles/nature14236, Algorithm 1. The switch `double` gives Double DQN,
van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461.

| paper | here |
|---|---|
| Q(s, a; theta) | `q` |
| Q^(s, a; theta^-), reset to theta every C updates | `q_target`, `target_update_every` |
| D, replay memory of N transitions | the training loop's `Replay`, `buffer_size` |
| the network and the memory of images | `agents/pixels.py`, where observations are images |
| epsilon, annealed linearly | `epsilon(step)` |
| y_j | `y` in `learn` |

Deviations, all shared with Stable-Baselines3, whose defaults these are:
- the Huber loss stands for the clipping of the error term: the same gradient, and a loss to show;
- rewards are not clipped, the gradient's norm is: the tasks have no common reward scale;
- Adam stands for RMSProp, which needs a rate of its own for each task;
- actions are random until `learning_starts`, whatever epsilon says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.guard import Guard
from agents.limits import check
from agents.networks import QNetwork
from agents.optimizers import Name, take_step, value_optimizer
from agents.pixels import PixelQNetwork
from agents.replay import Batch
from agents.seeding import Purpose, generators
from agents.targets import Kind, target_networks
from polyak_rl import flatten_


@dataclass(frozen=True)
class DQNConfig:
    """Defaults of Stable-Baselines3's DQN, its target period restated in gradient steps."""

    learning_rate: float = 1e-4
    """Adam's step size"""
    optimizer: Name = "adam"
    """of the Q network; polyak_sgd takes learning_rate as its largest step size"""
    batch_size: int = 32
    """transitions in a gradient step"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    learning_starts: int = 100
    """environment steps taken at random before the first gradient step"""
    gamma: float = 0.99
    """discount per environment step"""
    target: Kind = "hard"
    """what values are bootstrapped from; none: the online network itself"""
    target_update_every: int = 2500
    """gradient steps between two copies of a hard target; a soft one moves at each"""
    tau: float = 1.0
    """weight of the online network in each update of a soft target, below 1 there"""
    tau_end: float | None = None
    """tau at the end of the run, which it goes to linearly; None: it stays"""
    train_every: int = 4
    """environment steps between two rounds of gradient steps"""
    gradient_steps: int = 1
    """gradient steps in a round"""
    epsilon_start: float = 1.0
    """share of random actions at step 0"""
    epsilon_end: float = 0.05
    """share of random actions once annealed"""
    exploration_fraction: float = 0.1
    """share of all environment steps over which epsilon is annealed"""
    hidden: tuple[int, ...] = (64, 64)
    """units of each hidden layer; on images, of those behind the convolutions"""
    max_grad_norm: float = 10.0
    """L2 norm to which a gradient is clipped"""
    double: bool = False
    """choose the next action by the online network (Double DQN)"""


class DQN:
    """S independent DQN agents, one per seed.

    Args:
        obs_dim: Size O of an observation; of a stack of images (frames, height, width).
        action_dim: Number of actions.
        config: Hyper-parameters.
        seeds: One training seed per agent.
        device: Where the networks live.
        total_steps: Environment steps of the whole run, to which epsilon's schedule is tied.
    """

    def __init__(
        self,
        obs_dim: int | tuple[int, int, int],
        action_dim: int,
        config: DQNConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        check(config)
        self.config = config
        self.action_dim = action_dim
        self.annealing_steps = config.exploration_fraction * total_steps
        self.exploration = generators(Purpose.EXPLORATION, seeds, device)

        init = generators(Purpose.INIT, seeds)
        network: Any = PixelQNetwork if isinstance(obs_dim, tuple) else QNetwork
        self.q: QNetwork = network(obs_dim, action_dim, config.hidden, init).to(device)
        self.flat = flatten_(self.q, members=len(seeds))
        self.optimizer = value_optimizer(config.optimizer, self.flat, config.learning_rate)
        self.targets = target_networks(config, {"q": self.q})
        self.q_target = self.targets.get("q", self.q)

        self.guard = Guard(["q"], len(seeds), device)
        self.policy: nn.Module = self.q
        self.optimizers = [self.optimizer]

    def epsilon(self, step: int) -> float:
        """Share of random actions at an environment step."""
        c = self.config
        if step < c.learning_starts:
            return 1.0
        progress = min(1.0, step / self.annealing_steps) if self.annealing_steps else 1.0
        return c.epsilon_start + progress * (c.epsilon_end - c.epsilon_start)

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step."""
        return {"charts/epsilon": self.epsilon(step)}

    @torch.inference_mode()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Epsilon-greedy actions: obs [S, n, O] -> [S, n].

        Two numbers are drawn for each action whether or not it is random, so that the stream's
        position depends on the number of actions alone.
        """
        shape = (2, obs.shape[1])
        coin, pick = torch.stack(
            [torch.rand(shape, generator=g, device=obs.device) for g in self.exploration], dim=1
        )
        random = (pick * self.action_dim).long()
        return torch.where(coin < self.epsilon(step), random, self.q.act(obs))

    @torch.no_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of every agent on its own batch; returns tags with values [S, ...]."""
        tags = self.learn(batch)

        # every C gradient steps: theta^- <- theta
        for target in self.targets.values():
            target.update()
        return tags

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """The gradient step without random draws, decisions and target updates."""
        s, a, r, terminated, s_next = batch

        # y = r + gamma max_a' Q^(s', a'), and r alone where s' is terminal
        # Double DQN: y = r + gamma Q^(s', argmax_a' Q(s', a'))
        q_next = self.q_target(s_next)  # [S, B, actions]
        if self.config.double:
            q_next = q_next.gather(-1, self.q.act(s_next).unsqueeze(-1)).squeeze(-1)
        else:
            q_next = q_next.amax(-1)
        y = r + self.config.gamma * (1 - terminated) * q_next  # [S, B]

        # L = mean Huber(y - Q(s, a)), whose slope in Q(s, a) is the error clipped to [-1, 1]
        values, pullback = self.q.vjp(s)  # [S, B, actions]
        a = a.long()  # [S, B, 1]
        q = values.gather(-1, a).squeeze(-1)  # [S, B]
        loss = F.smooth_l1_loss(q, y, reduction="none")
        slope = (q - y).clamp_(-1, 1).div_(q.shape[1])
        pullback(torch.zeros_like(values).scatter_(-1, a, slope.unsqueeze(-1)))
        norm = self.flat.clip_grad_norm_(self.config.max_grad_norm)
        take_step(self.optimizer, loss, self.guard.found_inf("q", norm))
        return {"losses/td_loss": loss, "losses/q_values": q}
