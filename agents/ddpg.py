"""DDPG: Lillicrap et al. 2016, Continuous control with deep reinforcement learning.

https://arxiv.org/abs/1509.02971, Algorithm 1.

| paper | here |
|---|---|
| mu(s; theta^mu) | `actor` |
| Q(s, a; theta^Q) | `critic` |
| mu', Q' | `actor_target`, `critic_target` |
| tau | `tau` |
| N, exploration noise | `noise_std` |
| R, replay buffer | the training loop's `Replay`, `buffer_size` |
| y_i | `y` in `learn` |

Deviations, all to be had with Stable-Baselines3, whose values the config's are but for the noise:
- y is r alone where s' is terminal, which the paper leaves out;
- the noise is Gaussian and uncorrelated: Fujimoto et al. 2018 (https://arxiv.org/abs/1802.09477)
  saw no gain from the Ornstein-Uhlenbeck process;
- the critic takes the action at its first layer, not its second, and has no weight decay and no
  batch normalisation; both networks have torch's initial weights;
- actions are uniformly random until `learning_starts`.

Actions are in [-1, 1] here and in the replay buffer; the training loop scales them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.agent import AgentConfig, Turns
from agents.networks import Critic, DeterministicActor
from agents.optimizers import Descent
from agents.replay import Batch
from agents.seeding import Draw, Purpose, Streams, generators
from agents.targets import target_every, target_networks


@dataclass(frozen=True)
class DDPGConfig(AgentConfig):
    """Defaults of Stable-Baselines3's DDPG; noise as in rl-baselines3-zoo."""

    learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (400, 300)
    noise_std: float = 0.1
    """standard deviation of the exploration noise, actions in [-1, 1]"""


class DDPG:
    """S independent DDPG agents, one per seed; for the arguments see `agents.agent.Agent`."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: DDPGConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        self.config = config
        self.action_dim = action_dim
        self.exploration = Streams(Purpose.EXPLORATION, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = DeterministicActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=1).to(device)
        self.descent = Descent(
            {"critic": self.critic, "actor": self.actor}, config.learning_rate, len(seeds)
        )
        self.targets = target_networks(config, {"actor": self.actor, "critic": self.critic})
        self.actor_target = self.targets.get("actor", self.actor)
        self.critic_target = self.targets.get("critic", self.critic)
        self.turns = Turns(target_every(config))
        self.draws = ()
        self.policy: nn.Module = self.actor

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step: there are none."""
        return {}

    def noise(self, n: int) -> Draw:
        """What `explore` is given for n environments."""
        return self.exploration, "normal", (n, self.action_dim)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Noisy actions: obs [S, n, O], normal draws [S, n, A] -> [S, n, A]."""
        action: Tensor = self.actor(obs)
        return (action + self.config.noise_std * noise).clamp(-1, 1)

    def learn(self, batch: Batch, follow: bool) -> dict[str, Tensor]:
        """The gradient step without decisions: whether the target networks follow is given."""
        s, a, r, terminated, s_next = batch

        # y = r + gamma Q'(s', mu'(s')), and r alone where s' is terminal
        with torch.no_grad():
            q_next = self.critic_target(s_next, self.actor_target(s_next)).squeeze(1)  # [S, B]
            y = r + self.config.gamma * (1 - terminated) * q_next

        # critic: L = mean (y - Q(s, a))^2
        q = self.critic(s, a).squeeze(1)  # [S, B]
        critic_loss = F.mse_loss(q, y, reduction="none")  # [S, B]
        self.descent.step("critic", critic_loss)

        # actor: J = mean Q(s, mu(s)), uphill: grad J = mean grad_a Q(s, a)|a=mu(s) grad mu(s)
        actor_loss = -self.critic(s, self.actor(s)).squeeze(1)  # [S, B]
        self.descent.step("actor", actor_loss)

        # theta' <- tau theta + (1 - tau) theta', unless the target is a hard one
        if follow:
            for target in self.targets.values():
                target.update()
        return {
            "losses/qf_loss": critic_loss.detach(),
            "losses/q_values": q.detach(),
            "losses/actor_loss": actor_loss.detach(),
        }
