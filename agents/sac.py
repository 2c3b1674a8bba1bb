"""SAC: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications.

https://arxiv.org/abs/1812.05905, Algorithm 1: the version with a learned temperature.

| paper | here |
|---|---|
| pi_phi | `actor` |
| Q_theta1, Q_theta2 | `critic`, two members per seed |
| Q_thetabar1, Q_thetabar2 | `critic_target` |
| alpha | `temperature`, which holds log alpha |
| H-bar, target entropy, -dim(A) | `target_entropy` |
| D, replay pool | the training loop's `Replay`, `buffer_size` |
| tau | `tau` |

Deviations, all shared with Stable-Baselines3, whose defaults and order of updates these are:
- the temperature's loss is linear in log alpha, not in alpha: -log alpha (log pi + H-bar); the
  sign of its gradient is the paper's, and alpha stays positive by itself;
- y is r alone where s' is terminal, which Algorithm 1 leaves out;
- alpha moves first, then critics, then actor, all with the alpha of before the step;
- actions are uniformly random until `learning_starts`.

Actions are in [-1, 1] here and in the replay buffer; the training loop scales them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.agent import AgentConfig, Turns
from agents.networks import Critic, GaussianActor
from agents.optimizers import Descent
from agents.replay import Batch
from agents.seeding import Draw, Purpose, Streams, generators
from agents.targets import target_every, target_networks


@dataclass(frozen=True)
class SACConfig(AgentConfig):
    """Defaults of Stable-Baselines3's SAC, which are those of `AgentConfig`."""

    alpha_init: float = 1.0
    """the temperature before learning"""
    target_entropy: float | None = None
    """entropy in nats to which the temperature steers the policy; None: minus the action's size"""


class Temperature(nn.Module):
    """log alpha [S, 1], a network of one number per seed."""

    def __init__(self, alpha_init: float, members: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((members, 1), math.log(alpha_init)))


class SAC:
    """S independent SAC agents, one per seed; for the arguments see `agents.agent.Agent`."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: SACConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        self.config = config
        self.action_dim = action_dim
        self.target_entropy = (
            -float(action_dim) if config.target_entropy is None else config.target_entropy
        )
        self.exploration = Streams(Purpose.EXPLORATION, seeds, device)
        self.reparameterisation = Streams(Purpose.UPDATE, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = GaussianActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=2).to(device)
        self.temperature = Temperature(config.alpha_init, len(seeds)).to(device)
        self.descent = Descent(
            {"temperature": self.temperature, "critic": self.critic, "actor": self.actor},
            config.learning_rate,
            len(seeds),
        )
        self.targets = target_networks(config, {"critic": self.critic})
        self.critic_target = self.targets.get("critic", self.critic)
        self.turns = Turns(target_every(config))
        self.draws: list[Draw] = [
            (self.reparameterisation, "normal", (2, config.batch_size, action_dim))
        ]
        self.policy: nn.Module = self.actor

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step: there are none."""
        return {}

    def noise(self, n: int) -> Draw:
        """What `explore` is given for n environments."""
        return self.exploration, "normal", (n, self.action_dim)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Sampled actions: obs [S, n, O], normal draws [S, n, A] -> [S, n, A]."""
        mean, log_std = self.actor(obs)
        return torch.tanh(mean + log_std.exp() * noise)

    def learn(self, batch: Batch, noise: Tensor, follow: bool) -> dict[str, Tensor]:
        """The gradient step without random draws and decisions.

        Args:
            batch: Transitions.
            noise: Standard normal draws [S, 2, B, A], of the actions in s and in s'.
            follow: Whether the target network is updated.
        """
        s, a, r, terminated, s_next = batch

        # a_pi ~ pi(.|s): serves the temperature and the actor
        a_pi, log_pi = self.actor.sample(s, noise[:, 0])  # [S, B, A], [S, B]

        # temperature: J(alpha) = mean -log alpha (log pi(a_pi|s) + H-bar)
        log_alpha = self.temperature.log_alpha  # [S, 1]
        alpha = log_alpha.detach().exp()
        alpha_loss = -log_alpha * (log_pi.detach() + self.target_entropy)  # [S, B]
        self.descent.step("temperature", alpha_loss)

        # y = r + gamma (min_i Qbar_i(s', a') - alpha log pi(a'|s')), a' ~ pi(.|s'),
        # and r alone where s' is terminal
        with torch.no_grad():
            a_next, log_pi_next = self.actor.sample(s_next, noise[:, 1])
            q_next = self.critic_target(s_next, a_next).amin(1)  # [S, B]
            y = r + self.config.gamma * (1 - terminated) * (q_next - alpha * log_pi_next)

        # critics: J(theta) = mean sum_i 1/2 (Q_i(s, a) - y)^2
        q = self.critic(s, a)  # [S, 2, B]
        errors = F.mse_loss(q, y.unsqueeze(1).expand_as(q), reduction="none")  # [S, 2, B]
        critic_loss = 0.5 * errors.sum(1)  # [S, B]
        self.descent.step("critic", critic_loss)

        # actor: J(phi) = mean alpha log pi(a_pi|s) - min_i Q_i(s, a_pi)
        q_pi = self.critic(s, a_pi).min(1).values  # [S, B]; of equal ones one has the slope
        actor_loss = alpha * log_pi - q_pi  # [S, B]
        self.descent.step("actor", actor_loss)

        # thetabar_i <- tau theta_i + (1 - tau) thetabar_i, unless the target is a hard one
        if follow:
            for target in self.targets.values():
                target.update()
        return {
            "losses/qf_loss": critic_loss.detach(),
            "losses/q_values": q.detach(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/alpha": alpha,
            "losses/alpha_loss": alpha_loss.detach(),
        }
