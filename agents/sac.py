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
- alpha moves first, then critics, then actor, all with the alpha of before the step;
- actions are uniformly random until `learning_starts`.

Actions are in [-1, 1] here and in the replay buffer; the training loop scales them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.guard import Guard
from agents.limits import check
from agents.networks import Critic, GaussianActor
from agents.optimizers import Adam, Name, take_step, value_optimizer
from agents.replay import Batch
from agents.seeding import Purpose, generators
from agents.targets import Kind, target_networks
from polyak_rl import flatten_


@dataclass(frozen=True)
class SACConfig:
    """Defaults of Stable-Baselines3's SAC."""

    learning_rate: float = 3e-4
    """Adam's step size: actor, critics and temperature"""
    optimizer: Name = "adam"
    """of the critics; polyak_sgd takes learning_rate as its largest step size"""
    batch_size: int = 256
    """transitions in a gradient step"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    learning_starts: int = 100
    """environment steps taken at random before the first gradient step"""
    gamma: float = 0.99
    """discount per environment step"""
    target: Kind = "soft"
    """what values are bootstrapped from; none: the online critics themselves"""
    tau: float = 0.005
    """weight of the online critics in each update of a soft target"""
    tau_end: float | None = None
    """tau at the end of the run, which it goes to linearly; None: it stays"""
    target_update_every: int = 400
    """gradient steps between two copies of a hard target; 400 has the mean age of tau = 0.005"""
    train_every: int = 1
    """environment steps between two rounds of gradient steps"""
    gradient_steps: int = 1
    """gradient steps in a round"""
    alpha_init: float = 1.0
    """the temperature before learning"""
    target_entropy: float | None = None
    """entropy in nats to which the temperature steers the policy; None: minus the action's size"""
    hidden: tuple[int, ...] = (256, 256)
    """units of each hidden layer, actor and critics"""


class Temperature(nn.Module):
    """log alpha [S, 1], a network of one number per seed."""

    def __init__(self, alpha_init: float, members: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((members, 1), math.log(alpha_init)))


class SAC:
    """S independent SAC agents, one per seed.

    Args:
        obs_dim: Size O of an observation.
        action_dim: Size A of an action.
        config: Hyper-parameters.
        seeds: One training seed per agent.
        device: Where the networks live.
        total_steps: Environment steps of the whole run; nothing here depends on it.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: SACConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        check(config)
        self.config = config
        self.action_dim = action_dim
        self.target_entropy = (
            -float(action_dim) if config.target_entropy is None else config.target_entropy
        )
        self.exploration = generators(Purpose.EXPLORATION, seeds, device)
        self.reparameterisation = generators(Purpose.UPDATE, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = GaussianActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=2).to(device)
        self.temperature = Temperature(config.alpha_init, len(seeds)).to(device)
        self.actor_flat = flatten_(self.actor, members=len(seeds))
        self.critic_flat = flatten_(self.critic, members=2 * len(seeds))
        self.temperature_flat = flatten_(self.temperature, members=len(seeds))
        self.actor_optimizer, self.temperature_optimizer = (
            Adam(flat.parameters, lr=config.learning_rate)
            for flat in (self.actor_flat, self.temperature_flat)
        )
        self.critic_optimizer = value_optimizer(
            config.optimizer, self.critic_flat, config.learning_rate
        )
        self.targets = target_networks(config, {"critic": self.critic})
        self.critic_target = self.targets.get("critic", self.critic)

        self.guard = Guard(["temperature", "critic", "actor"], len(seeds), device)
        self.policy: nn.Module = self.actor
        self.optimizers = [
            self.temperature_optimizer,
            self.critic_optimizer,
            self.actor_optimizer,
        ]

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step: there are none."""
        return {}

    @torch.inference_mode()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Sampled actions, uniform ones until learning starts: obs [S, n, O] -> [S, n, A]."""
        shape = (obs.shape[1], self.action_dim)
        if step < self.config.learning_starts:
            draws = [torch.rand(shape, generator=g, device=obs.device) for g in self.exploration]
            return 2 * torch.stack(draws) - 1
        noise = self._noise(self.exploration, shape, obs.device)
        mean, log_std = self.actor(obs)
        return torch.tanh(mean + log_std.exp() * noise)

    @torch.no_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of every agent on its own batch; returns tags with values [S, ...]."""
        action = batch.action
        shape = (2, *action.shape[1:])
        tags = self.learn(batch, self._noise(self.reparameterisation, shape, action.device))

        # thetabar_i <- tau theta_i + (1 - tau) thetabar_i
        for target in self.targets.values():
            target.update()
        return tags

    def learn(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """The gradient step without random draws, decisions and target updates.

        Args:
            batch: Transitions.
            noise: Standard normal draws [S, 2, B, A], of the actions in s and in s'.
        """
        s, a, r, terminated, s_next = batch

        # a_pi ~ pi(.|s): serves the temperature and the actor
        a_pi, log_pi, to_actor = self.actor.sample_vjp(s, noise[:, 0])  # [S, B, A], [S, B]

        # temperature: J(alpha) = mean -log alpha (log pi(a_pi|s) + H-bar), linear in log alpha
        log_alpha = self.temperature.log_alpha  # [S, 1]
        alpha = log_alpha.exp()
        entropy_gap = (log_pi + self.target_entropy).mean(-1, keepdim=True)  # [S, 1]
        alpha_loss = -log_alpha * entropy_gap
        log_alpha.grad = torch.neg(entropy_gap, out=log_alpha.grad)
        bad = self.guard.found_inf("temperature", self.temperature_flat.grad_norm())
        self.temperature_optimizer.step(bad)

        # y = r + gamma (min_i Qbar_i(s', a') - alpha log pi(a'|s')), a' ~ pi(.|s'),
        # and r alone where s' is terminal
        a_next, log_pi_next = self.actor.sample(s_next, noise[:, 1])
        q_next = self.critic_target(s_next, a_next).amin(1)  # [S, B]
        y = r + self.config.gamma * (1 - terminated) * (q_next - alpha * log_pi_next)

        # critics: J(theta) = sum_i mean 1/2 (Q_i(s, a) - y)^2, slope (Q_i(s, a) - y) / B
        q, pullback = self.critic.vjp(s, a)  # [S, 2, B]
        error = q - y.unsqueeze(1)
        critic_loss = 0.5 * error.square().sum(1)  # [S, B]
        pullback(error.div_(q.shape[-1]))
        bad = self.guard.found_inf("critic", self.critic_flat.grad_norm())
        take_step(self.critic_optimizer, critic_loss, bad)

        # actor: J(phi) = mean alpha log pi(a_pi|s) - min_i Q_i(s, a_pi)
        q_pi, to_action = self.critic.action_vjp(s, a_pi)  # [S, 2, B]
        q_min, which = q_pi.min(1, keepdim=True)  # [S, 1, B]
        slopes = torch.zeros_like(q_pi).scatter_(1, which, -1 / q_pi.shape[-1])
        to_actor(to_action(slopes), alpha.expand_as(log_pi) / q_pi.shape[-1])
        self.actor_optimizer.step(self.guard.found_inf("actor", self.actor_flat.grad_norm()))
        return {
            "losses/qf_loss": critic_loss,
            "losses/q_values": q,
            "losses/actor_loss": alpha * log_pi - q_min.squeeze(1),
            "losses/alpha": alpha,
            "losses/alpha_loss": alpha_loss,
        }

    @staticmethod
    def _noise(
        sources: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """Standard normal draws [S, *shape], each seed's from its own generator."""
        return torch.stack([torch.randn(shape, generator=g, device=device) for g in sources])
