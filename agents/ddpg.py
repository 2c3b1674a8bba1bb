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

Deviations, all shared with Stable-Baselines3, whose defaults these are:
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
from torch import Tensor, nn

from agents.guard import Guard
from agents.limits import check
from agents.networks import Critic, DeterministicActor
from agents.optimizers import Adam, Name, take_step, value_optimizer
from agents.replay import Batch
from agents.seeding import Purpose, generators
from agents.targets import Kind, target_networks
from polyak_rl import flatten_


@dataclass(frozen=True)
class DDPGConfig:
    """Defaults of Stable-Baselines3's DDPG; noise as in rl-baselines3-zoo."""

    learning_rate: float = 1e-3
    """Adam's step size, actor and critic"""
    optimizer: Name = "adam"
    """of the critic; polyak_sgd takes learning_rate as its largest step size"""
    batch_size: int = 256
    """transitions in a gradient step"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    learning_starts: int = 100
    """environment steps taken at random before the first gradient step"""
    gamma: float = 0.99
    """discount per environment step"""
    target: Kind = "soft"
    """what values are bootstrapped from; none: the online networks themselves"""
    tau: float = 0.005
    """weight of the online network in each update of a soft target"""
    tau_end: float | None = None
    """tau at the end of the run, which it goes to linearly; None: it stays"""
    target_update_every: int = 400
    """gradient steps between two copies of a hard target; 400 has the mean age of tau = 0.005"""
    train_every: int = 1
    """environment steps between two rounds of gradient steps"""
    gradient_steps: int = 1
    """gradient steps in a round"""
    noise_std: float = 0.1
    """standard deviation of the exploration noise, actions in [-1, 1]"""
    hidden: tuple[int, ...] = (400, 300)
    """units of each hidden layer, actor and critic"""


class DDPG:
    """S independent DDPG agents, one per seed.

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
        config: DDPGConfig,
        seeds: Sequence[int],
        device: torch.device | str,
        total_steps: int,
    ) -> None:
        check(config)
        self.config = config
        self.action_dim = action_dim
        self.exploration = generators(Purpose.EXPLORATION, seeds, device)

        init = generators(Purpose.INIT, seeds)
        self.actor = DeterministicActor(obs_dim, action_dim, config.hidden, init).to(device)
        self.critic = Critic(obs_dim, action_dim, config.hidden, init, n=1).to(device)
        self.actor_flat = flatten_(self.actor, members=len(seeds))
        self.critic_flat = flatten_(self.critic, members=len(seeds))
        lr = config.learning_rate
        self.actor_optimizer = Adam(self.actor_flat.parameters, lr=lr)
        self.critic_optimizer = value_optimizer(config.optimizer, self.critic_flat, lr)
        self.targets = target_networks(config, {"actor": self.actor, "critic": self.critic})
        self.actor_target = self.targets.get("actor", self.actor)
        self.critic_target = self.targets.get("critic", self.critic)

        self.guard = Guard(["critic", "actor"], len(seeds), device)
        self.policy: nn.Module = self.actor
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]

    def charts(self, step: int) -> dict[str, float]:
        """What the schedules say at an environment step: there are none."""
        return {}

    @torch.inference_mode()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Noisy actions, uniform ones until learning starts: obs [S, n, O] -> [S, n, A]."""
        shape = (obs.shape[1], self.action_dim)
        if step < self.config.learning_starts:
            draws = [torch.rand(shape, generator=g, device=obs.device) for g in self.exploration]
            return 2 * torch.stack(draws) - 1
        noise = torch.stack(
            [torch.randn(shape, generator=g, device=obs.device) for g in self.exploration]
        )
        action: Tensor = self.actor(obs)
        return (action + self.config.noise_std * noise).clamp(-1, 1)

    @torch.no_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of every agent on its own batch; returns tags with values [S, ...]."""
        tags = self.learn(batch)

        # theta' <- tau theta + (1 - tau) theta'
        for target in self.targets.values():
            target.update()
        return tags

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """The gradient step without random draws, decisions and target updates."""
        s, a, r, terminated, s_next = batch

        # y = r + gamma Q'(s', mu'(s')), and r alone where s' is terminal
        q_next = self.critic_target(s_next, self.actor_target(s_next)).squeeze(1)  # [S, B]
        y = r + self.config.gamma * (1 - terminated) * q_next

        # critic: L = mean (y - Q(s, a))^2, whose slope in Q(s, a) is 2 (Q(s, a) - y) / B
        q, pullback = self.critic.vjp(s, a)  # [S, 1, B]
        error = q - y.unsqueeze(1)
        critic_loss = error.square()
        pullback(error.mul_(2 / q.shape[-1]))
        bad = self.guard.found_inf("critic", self.critic_flat.grad_norm())
        take_step(self.critic_optimizer, critic_loss, bad)

        # actor: grad_phi J = mean grad_a Q(s, a)|a=mu(s) grad_phi mu(s), uphill
        mu, pullback = self.actor.vjp(s)  # [S, B, A]
        q_mu, to_action = self.critic.action_vjp(s, mu)  # [S, 1, B]
        pullback(to_action(torch.full_like(q_mu, -1 / q_mu.shape[-1])))
        self.actor_optimizer.step(self.guard.found_inf("actor", self.actor_flat.grad_norm()))
        return {
            "losses/qf_loss": critic_loss,
            "losses/q_values": q,
            "losses/actor_loss": -q_mu,
        }
