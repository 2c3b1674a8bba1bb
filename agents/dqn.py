"""DQN: Mnih et al. 2015, Human-level control through deep reinforcement learning.

https://www.nature.com/articles/nature14236, Algorithm 1. The switch `double` gives Double DQN,
van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461.

| paper | here |
|---|---|
| Q(s, a; theta) | `q` |
| Q^(s, a; theta^-), reset to theta every C updates | `q_target`, `target_update_every` |
| D, replay memory of N transitions | the training loop's `Replay`, `buffer_size` |
| replay start size, before which actions are random | `learning_starts` |
| the network and the memory of images | `agents/pixels.py`, where observations are images |
| epsilon, annealed linearly | `epsilon(step)` |
| y_j | `y` in `learn` |

Deviations, all shared with Stable-Baselines3, whose defaults these are:
- the Huber loss stands for the clipping of the error term: the same gradient, and a loss to show
  (its minimum is no mean: where rewards vary by more than 1, values are those of a trimmed one);
- rewards are not clipped, the gradient's norm is: the tasks have no common reward scale;
- Adam stands for RMSProp, which needs a rate of its own for each task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.agent import AgentConfig, Target, Turns
from agents.networks import QNetwork
from agents.optimizers import Descent
from agents.pixels import PixelQNetwork
from agents.replay import Batch
from agents.seeding import Draw, Purpose, Streams, generators
from agents.targets import target_every, target_networks


@dataclass(frozen=True)
class DQNConfig(AgentConfig):
    """Defaults of Stable-Baselines3's DQN, its target period restated in gradient steps."""

    learning_rate: float = 1e-4
    batch_size: int = 32
    train_every: int = 4
    hidden: tuple[int, ...] = (64, 64)
    """units of each hidden layer; on images, of those behind the convolutions"""
    target: Target = "hard"
    tau: float = 1.0
    target_update_every: int = 2500
    """gradient steps between two copies of a hard target; a soft one moves at each"""
    epsilon_start: float = 1.0
    """share of random actions at step 0"""
    epsilon_end: float = 0.05
    """share of random actions once annealed"""
    exploration_fraction: float = 0.1
    """share of all environment steps over which epsilon is annealed"""
    max_grad_norm: float = 10.0
    """L2 norm to which a gradient is clipped"""
    double: bool = False
    """choose the next action by the online network (Double DQN)"""


class DQN:
    """S independent DQN agents, one per seed; for the arguments see `agents.agent.Agent`."""

    def __init__(
        self,
        obs_dim: int | tuple[int, int, int],
        action_dim: int,
        config: DQNConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        c = self.config = config
        self.action_dim = action_dim
        self.annealing_steps = c.exploration_fraction * total_steps
        self.exploration = Streams(Purpose.EXPLORATION, seeds, device)

        init = generators(Purpose.INIT, seeds)
        network: Any = PixelQNetwork if isinstance(obs_dim, tuple) else QNetwork
        self.q: QNetwork = network(obs_dim, action_dim, c.hidden, init).to(device)
        self.descent = Descent({"q": self.q}, c.learning_rate, len(seeds), c.max_grad_norm)
        self.targets = target_networks(config, {"q": self.q})
        self.q_target = self.targets.get("q", self.q)
        self.turns = Turns(target_every(config))
        self.draws = ()
        self.policy: nn.Module = self.q

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

    def noise(self, n: int) -> Draw:
        """What `explore` is given for n environments: two draws an action, random or not."""
        return self.exploration, "uniform", (2, n)

    def explore(self, obs: Tensor, noise: Tensor, epsilon: float | Tensor) -> Tensor:
        """Epsilon-greedy actions: obs [S, n, O], uniform draws [S, 2, n] -> [S, n]."""
        coin, pick = noise.unbind(1)
        if coin.is_cpu and coin.numel() == 1:  # the host need not work out both answers
            random = coin.numpy() < epsilon
            return (pick * self.action_dim).long() if random else self.q.act(obs)
        return torch.where(coin < epsilon, (pick * self.action_dim).long(), self.q.act(obs))

    def learn(self, batch: Batch, follow: bool) -> dict[str, Tensor]:
        """The gradient step without decisions: whether the target network follows is given."""
        s, a, r, terminated, s_next = batch

        # y = r + gamma max_a' Q^(s', a'), and r alone where s' is terminal
        # Double DQN: y = r + gamma Q^(s', argmax_a' Q(s', a'))
        with torch.no_grad():
            q_next = self.q_target(s_next)  # [S, B, actions]
            if self.config.double:
                q_next = q_next.gather(-1, self.q.act(s_next).unsqueeze(-1)).squeeze(-1)
            else:
                q_next = q_next.amax(-1)
            y = r + self.config.gamma * (1 - terminated) * q_next  # [S, B]

        # L = mean Huber(y - Q(s, a)); a compiled smooth_l1_loss would lose a NaN
        q = self.q(s).gather(-1, a.long()).squeeze(-1)  # [S, B]
        loss = F.huber_loss(q, y, reduction="none")  # [S, B]
        self.descent.step("q", loss)

        # every C gradient steps: theta^- <- theta, unless the target is a soft one
        if follow:
            for target in self.targets.values():
                target.update()
        return {"losses/td_loss": loss.detach(), "losses/q_values": q.detach()}
