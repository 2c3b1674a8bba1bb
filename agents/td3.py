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

Deviations, all shared with Stable-Baselines3, whose defaults these are:
- a batch has 256 transitions, not 100;
- the smoothed target action is clipped to the range of actions, as in the authors' code.

Actions are in [-1, 1] here and in the replay buffer; the training loop scales them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.ddpg import DDPGConfig
from agents.guard import Guard
from agents.limits import check
from agents.networks import Critic, DeterministicActor
from agents.optimizers import Adam, take_step, value_optimizer
from agents.replay import Batch
from agents.seeding import Purpose, generators
from agents.targets import Clock, target_networks
from polyak_rl import flatten_


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
    """S independent TD3 agents, one per seed.

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
        config: TD3Config,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        check(config)
        self.config = config
        self.action_dim = action_dim
        self.exploration = generators(Purpose.EXPLORATION, seeds, device)
        self.smoothing = generators(Purpose.UPDATE, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = DeterministicActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=2).to(device)
        self.actor_flat = flatten_(self.actor, members=len(seeds))
        self.critic_flat = flatten_(self.critic, members=2 * len(seeds))
        lr = config.learning_rate
        self.actor_optimizer = Adam(self.actor_flat.parameters, lr=lr)
        self.critic_optimizer = value_optimizer(config.optimizer, self.critic_flat, lr)
        online = {"actor": self.actor, "critic": self.critic}
        self.targets = target_networks(config, online, every=config.policy_delay)
        self.actor_target = self.targets.get("actor", self.actor)
        self.critic_target = self.targets.get("critic", self.critic)
        self.clock = Clock()

        self.guard = Guard(["critic", "actor"], len(seeds), device)
        self.policy: nn.Module = self.actor
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step: there are none."""
        return {}

    @torch.inference_mode()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Noisy actions, uniform ones until learning starts: obs [S, n, O] -> [S, n, A]."""
        shape, device = (obs.shape[1], self.action_dim), obs.device
        if step < self.config.learning_starts:
            draws = [torch.rand(shape, generator=g, device=device) for g in self.exploration]
            return 2 * torch.stack(draws) - 1
        draws = [torch.randn(shape, generator=g, device=device) for g in self.exploration]
        action: Tensor = self.actor(obs)
        return (action + self.config.noise_std * torch.stack(draws)).clamp(-1, 1)

    @torch.no_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of every agent on its own batch; returns tags with values [S, ...]."""
        shape, device = batch.action.shape[1:], batch.action.device
        draws = [torch.randn(shape, generator=g, device=device) for g in self.smoothing]
        actors_turn = self.clock.tick() % self.config.policy_delay == 0
        tags = self.learn(batch, torch.stack(draws), actors_turn)

        # every d gradient steps: theta_i' <- tau theta_i + (1 - tau) theta_i', phi' likewise
        for target in self.targets.values():
            target.update()
        return tags

    def learn(self, batch: Batch, noise: Tensor, actors_turn: bool) -> dict[str, Tensor]:
        """The gradient step without random draws, decisions and target updates.

        Args:
            batch: Transitions.
            noise: Standard normal draws [S, B, A].
            actors_turn: Whether the actor takes a step too.
        """
        c, (s, a, r, terminated, s_next) = self.config, batch

        # a~ = pi_phi'(s') + eps, eps ~ clip(N(0, sigma~), -c, c)
        # y = r + gamma min_i Q_thetai'(s', a~), and r alone where s' is terminal
        clip = c.target_noise_clip
        eps = (c.target_noise_std * noise).clamp_(-clip, clip)
        a_next = (self.actor_target(s_next) + eps).clamp_(-1, 1)
        y = r + c.gamma * (1 - terminated) * self.critic_target(s_next, a_next).amin(1)

        # critics: L = sum_i mean (y - Q_i(s, a))^2, whose slope in Q_i is 2 (Q_i(s, a) - y) / B
        q, pullback = self.critic.vjp(s, a)  # [S, 2, B]
        error = q - y.unsqueeze(1)
        critic_loss = error.square().sum(1)  # [S, B]
        pullback(error.mul_(2 / q.shape[-1]))
        bad = self.guard.found_inf("critic", self.critic_flat.grad_norm())
        take_step(self.critic_optimizer, critic_loss, bad)
        tags = {"losses/qf_loss": critic_loss, "losses/q_values": q}

        # every d gradient steps, the actor, uphill:
        # grad_phi J = mean grad_a Q_theta1(s, a)|a=pi_phi(s) grad_phi pi_phi(s)
        if actors_turn:
            mu, pullback = self.actor.vjp(s)  # [S, B, A]
            q_mu, to_action = self.critic.action_vjp(s, mu)  # [S, 2, B]
            slopes = torch.zeros_like(q_mu)
            slopes[:, 0] = -1 / q_mu.shape[-1]
            pullback(to_action(slopes))
            self.actor_optimizer.step(self.guard.found_inf("actor", self.actor_flat.grad_norm()))
            tags["losses/actor_loss"] = -q_mu[:, 0]
        return tags
