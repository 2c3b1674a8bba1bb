"""SAC in LeanRL's way: CleanRL's code, compiled by torch and replayed as CUDA graphs.

After https://github.com/pytorch-labs/LeanRL, `sac_continuous_action_torchcompile.py`: the critics'
weights stacked and called by vmap, Adam capturable, sampling outside the graphs. As here, actor and
temperature are updated at every step. A rival for GPUs, where a step of separate launches is slow.
"""

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from scripts.bench_cases.updates import dense

LEAN = "LeanRL's way"
LOG_STD = (-5.0, 2.0)
Call = Callable[[], object]


class LeanSAC:
    """A gradient step on a full replay buffer; every call is one.

    Args:
        obs: Size of an observation.
        action: Size of an action, each in [-1, 1].
        config: The settings of `agents.sac`.
        device: Where all of it lives.
        rows: Transitions in the buffer, drawn at random.
        fast: What makes a call fast: compiling it, and capturing it in a graph.
    """

    def __init__(
        self,
        obs: int,
        action: int,
        config: Any,
        device: torch.device,
        rows: int,
        fast: Callable[[Call], Call],
    ) -> None:
        self.config = config
        self.replay = [
            torch.randn(rows, obs, device=device),
            torch.rand(rows, action, device=device) * 2 - 1,
            torch.randn(rows, device=device),
            torch.randn(rows, obs, device=device),
            (torch.rand(rows, device=device) < 0.01).float(),
        ]
        self.batch = [column[: config.batch_size].clone() for column in self.replay]
        self.actor = dense(obs, *config.hidden, 2 * action).to(device)
        critics = [dense(obs + action, *config.hidden, 1).to(device) for _ in range(2)]
        self.critic = copy.deepcopy(critics[0]).to("meta")
        self.q = {n: p.detach() for n, p in stack_module_state(critics)[0].items()}
        self.q = {name: p.clone().requires_grad_() for name, p in self.q.items()}
        self.q_target = {name: p.detach().clone() for name, p in self.q.items()}
        self.log_alpha = torch.zeros(1, device=device, requires_grad=True)
        rate, capturable = config.learning_rate, device.type == "cuda"
        self.critic_adam = torch.optim.Adam([*self.q.values()], rate, capturable=capturable)
        actor = [*self.actor.parameters(), self.log_alpha]
        self.actor_adam = torch.optim.Adam(actor, rate, capturable=capturable)
        self.entropy = -float(action)
        self.fast = fast

    @cached_property
    def steps(self) -> list[Call]:
        """The critics' and the actor's step, made fast at the first call."""
        return [self.fast(self.critic_step), self.fast(self.actor_step)]

    def __call__(self) -> None:
        """Sample, update, and move the target."""
        rows = len(self.replay[0])
        index = torch.randint(rows, (self.config.batch_size,), device=self.replay[0].device)
        for column, kept in zip(self.batch, self.replay, strict=True):
            torch.index_select(kept, 0, index, out=column)
        for step in self.steps:
            step()
        torch._foreach_lerp_(
            [*self.q_target.values()], [p.detach() for p in self.q.values()], self.config.tau
        )

    def critics(self, weights: dict[str, Tensor], s: Tensor, a: Tensor) -> Tensor:
        """Both critics' values, [2, B]."""
        x = torch.cat([s, a], 1)
        values: Tensor = vmap(lambda w: functional_call(self.critic, w, (x,)))(weights)
        return values.squeeze(-1)

    def act(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """An action and its log-probability, [B, A] and [B]."""
        mean, log_std = self.actor(s).chunk(2, -1)
        log_std = LOG_STD[0] + 0.5 * (LOG_STD[1] - LOG_STD[0]) * (torch.tanh(log_std) + 1)
        noise = torch.randn_like(mean)
        a = torch.tanh(mean + log_std.exp() * noise)
        log_pi = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        return a, (log_pi - torch.log(1 - a**2 + 1e-6)).sum(-1)

    def critic_step(self) -> None:
        """The critics' step."""
        s, a, r, s_next, terminated = self.batch
        with torch.no_grad():
            a_next, log_pi = self.act(s_next)
            q_next = self.critics(self.q_target, s_next, a_next).amin(0)
            q_next = q_next - self.log_alpha.exp() * log_pi
            y = r + (1 - terminated) * self.config.gamma * q_next
        loss = (self.critics(self.q, s, a) - y).square().mean(1).sum()
        self.critic_adam.zero_grad()
        torch.autograd.backward(loss)
        self.critic_adam.step()

    def actor_step(self) -> None:
        """The actor's and the temperature's step."""
        s = self.batch[0]
        a, log_pi = self.act(s)
        alpha = self.log_alpha.exp()
        weights = {name: p.detach() for name, p in self.q.items()}
        loss = (alpha.detach() * log_pi - self.critics(weights, s, a).amin(0)).mean()
        loss = loss - (alpha * (log_pi.detach() + self.entropy)).mean()
        self.actor_adam.zero_grad()
        torch.autograd.backward(loss)
        self.actor_adam.step()
