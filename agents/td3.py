"""TD3: Fujimoto et al. 2018, Addressing Function Approximation Error in Actor-Critic Methods.

https://arxiv.org/abs/1802.09477, Algorithm 1. It is DDPG (agents/ddpg.py) with clipped double
Q-learning, delayed updates of the policy, and smoothing of the target policy.

| paper | here |
|---|---|
| pi_phi, pi_phi' | `actor`, `actor_target` |
| Q_theta1, Q_theta2, Q_theta1', Q_theta2' | `critic`, `critic_target`, two members per seed |
| sigma, exploration noise | `noise_std` |
| sigma-tilde, c | `target_noise_std`, `target_noise_clip` |
| d, tau | `policy_delay`, `tau` |
| B, replay buffer | the training loop's `Replay`, `buffer_size` |

Deviations, all to be had with Stable-Baselines3, whose values the config's are but for the noise:
- y is r alone where s' is terminal, which Algorithm 1 leaves out;
- the smoothed target action is clipped to the range of actions, as in the authors' code.

Actions are in [-1, 1] here and in the replay buffer; the training loop scales them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.agent import Turns
from agents.ddpg import DDPGConfig
from agents.networks import Critic, DeterministicActor
from agents.optimizers import Descent
from agents.replay import Batch
from agents.seeding import Draw, Purpose, Streams, generators
from agents.targets import target_every, target_networks


@dataclass(frozen=True)
class TD3Config(DDPGConfig):
    """Defaults of Stable-Baselines3's TD3: those of DDPG, and the paper's for what is TD3's own."""

    target_update_every: int = 800
    """gradient steps between two copies of a hard target; 800: the mean age of the soft target"""
    policy_delay: int = 2
    """gradient steps of the critics to one of the actor and one update of soft targets"""
    target_noise_std: float = 0.2
    """standard deviation of the noise that smooths the target policy, actions in [-1, 1]"""
    target_noise_clip: float = 0.5
    """largest size of that noise"""


class TD3:
    """S independent TD3 agents, one per seed; for the arguments see `agents.agent.Agent`."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: TD3Config,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        self.config = config
        self.action_dim = action_dim
        self.exploration = Streams(Purpose.EXPLORATION, seeds, device)
        self.smoothing = Streams(Purpose.UPDATE, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = DeterministicActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=2).to(device)
        self.descent = Descent(
            {"critic": self.critic, "actor": self.actor}, config.learning_rate, len(seeds)
        )
        online = {"actor": self.actor, "critic": self.critic}
        self.targets = target_networks(config, online)
        self.actor_target = self.targets.get("actor", self.actor)
        self.critic_target = self.targets.get("critic", self.critic)
        self.turns = Turns(config.policy_delay, target_every(config, soft=config.policy_delay))
        self.draws: list[Draw] = [(self.smoothing, "normal", (config.batch_size, action_dim))]
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

    def learn(
        self, batch: Batch, noise: Tensor, actors_turn: bool, follow: bool
    ) -> dict[str, Tensor]:
        """The gradient step without random draws and decisions.

        Args:
            batch: Transitions.
            noise: Standard normal draws [S, B, A].
            actors_turn: Whether the actor takes a step too.
            follow: Whether the target networks are updated.
        """
        c, (s, a, r, terminated, s_next) = self.config, batch

        # a~ = pi_phi'(s') + eps, eps ~ clip(N(0, sigma~), -c, c)
        # y = r + gamma min_i Q_thetai'(s', a~), and r alone where s' is terminal
        with torch.no_grad():
            clip = c.target_noise_clip
            eps = (c.target_noise_std * noise).clamp_(-clip, clip)
            a_next = (self.actor_target(s_next) + eps).clamp_(-1, 1)
            y = r + c.gamma * (1 - terminated) * self.critic_target(s_next, a_next).amin(1)

        # critics: L = mean sum_i (y - Q_i(s, a))^2
        q = self.critic(s, a)  # [S, 2, B]
        critic_loss = F.mse_loss(q, y.unsqueeze(1).expand_as(q), reduction="none").sum(1)  # [S, B]
        self.descent.step("critic", critic_loss)
        tags = {"losses/qf_loss": critic_loss.detach(), "losses/q_values": q.detach()}

        # every d gradient steps, the actor: J = mean Q_theta1(s, pi_phi(s)), uphill:
        # grad_phi J = mean grad_a Q_theta1(s, a)|a=pi_phi(s) grad_phi pi_phi(s)
        if actors_turn:
            actor_loss = -self.critic(s, self.actor(s))[:, 0]  # [S, B]
            self.descent.step("actor", actor_loss)
            tags["losses/actor_loss"] = actor_loss.detach()

        # every d gradient steps: theta_i' <- tau theta_i + (1 - tau) theta_i', phi' likewise,
        # unless the targets are hard ones
        if follow:
            for target in self.targets.values():
                target.update()
        return tags
