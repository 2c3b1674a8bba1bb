"""Multi-layer perceptrons whose tensors have a leading member dimension.

`M` members are `M` independent networks of one shape, evaluated by one batched product:
`[M, B, in] @ [M, in, out]`. Training several seeds at once is several members, and so are twin
critics; a single network is `M = 1`. No network stores `M`: it is read from the weights, so that a
policy whose weights are replaced by a stack of other policies' weights evaluates all of them.

On one thread of a CPU a member's result does not depend, to the bit, on which members are beside
it, where hidden sizes are multiples of 4 and the weights lie in flat memory (`polyak_rl.flatten_`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak_rl import flatten_

LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0


class Linear(nn.Module):
    r"""Affine maps `y = x W + b`, one per member.

    Each member's weight and bias are drawn from U(-1/sqrt(in), 1/sqrt(in)), torch's default law
    for a linear layer, with that member's generator (`nn.init` on [M, in, out] would take the
    wrong fan).

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        generators: One generator per member, on the CPU, so that a seed's first weights are the
            same on every device.

    Shape:
        x [M, B, in] -> [M, B, out]; weight [M, in, out], bias [M, 1, out].
    """

    def __init__(
        self, in_features: int, out_features: int, generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)

        def draw(*shape: int) -> nn.Parameter:
            rows = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
            return nn.Parameter(torch.stack(rows))

        self.weight = draw(in_features, out_features)
        self.bias = draw(1, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply each member's map to its own batch."""
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W + b` for each member: [M, B, in], [M, in, out], [M, 1, out] -> [M, B, out].

    The forms are one product; which one is fast, and gives one member and several the same bits on
    CPU, depends on the shape (measured, and held by tests).
    """
    outputs, rows = weight.shape[-1], x.shape[1]
    if outputs >= 8 and outputs % 4 == 0:
        return torch.baddbmm(bias, x, weight)
    if outputs == 1:
        return (weight.mT @ x.mT).mT + bias
    if rows == 1:  # the same product, without looking what kind of product it is
        return torch.bmm(weight.mT, x.mT).mT + bias
    return torch.baddbmm(bias.mT, weight.mT, x.mT).mT


class MLP(nn.Sequential):
    """Linear layers with a ReLU between each two: x [M, B, in] -> [M, B, out].

    Of fewer inputs x [S, B, in] each serves M / S neighbouring members.

    Args:
        sizes: Of the input, of each hidden layer and of the output.
        generators: One per member, for the first weights.
    """

    def __init__(self, sizes: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        linear = [Linear(*pair, generators) for pair in pairwise(sizes)]
        layers = [layer for each in linear for layer in (each, nn.ReLU(inplace=True))]
        super().__init__(*layers[:-1])
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        weights: list[Any] = [p for one in self._linear for p in one._parameters.values()]
        if not torch.is_grad_enabled():
            return activations(x, weights)[-1]
        y: Tensor = Layers.apply(x, *weights)  # type: ignore[no-untyped-call]
        return y


class Layers(torch.autograd.Function):
    """The layers of an `MLP` as one node of autograd's graph, with the gradient written out.

    Recorded layer by layer it costs more than the products of a small network. With h_0 = x, h_i
    the output of hidden layer i, and dy_i the slopes behind layer i:

        dL/dW_i = h_i^T dy_i,  dL/db_i = sum_B dy_i,  dL/dh_i = dy_i W_i^T
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        """The outputs; weight and bias of a layer by turns."""
        *h, y = activations(x, weights)
        ctx.save_for_backward(*h)
        ctx.weights, ctx.strides, ctx.inputs = weights, y.stride(), x.shape[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Slopes in x and in the weights; those that nobody asked for are None."""
        if torch.is_grad_enabled():
            raise RuntimeError("an MLP can be differentiated once, and not with create_graph=True")
        h, weights = ctx.saved_tensors, ctx.weights
        into_x, *into_weights = ctx.needs_input_grad
        if _places:  # a loss that passes through these weights and descends in others
            into_weights = [id(weight) in _places for weight in weights]
        # As y lies in memory: the order of the sums depends on it.
        if dy.shape[-1] > 1 and dy.stride() != ctx.strides:
            dy = dy.new_empty_strided(dy.shape, ctx.strides).copy_(dy)
        slopes: list[Tensor | None] = [None] * len(weights)
        for i in reversed(range(len(h))):
            weight, bias = weights[2 * i : 2 * i + 2]
            if into_weights[2 * i] or into_weights[2 * i + 1]:
                slopes[2 * i] = torch.bmm(h[i].mT, dy, out=_place_of(weight))
                slopes[2 * i + 1] = torch.sum(dy, 1, True, out=_place_of(bias))
            if i > 0:
                dy = relu_backward_(below(dy, weight), h[i])
        if not into_x:
            return None, *slopes
        dx = below(dy, weights[0])
        if ctx.inputs < dx.shape[0]:
            dx = dx.view(ctx.inputs, -1, *dx.shape[1:]).sum(1)
        return dx, *slopes


_engine = torch.autograd.Variable._execution_engine
# The weights whose gradients are wanted, by id, each with the memory for it where there is some.
_places: dict[int, Tensor | None] = {}


def _place_of(weight: Tensor) -> Tensor | None:
    """Where a weight's gradient goes: who comes first takes the place, and autograd adds others."""
    place = _places.get(id(weight))
    if place is not None:
        _places[id(weight)] = None
    return place


def set_gradients(loss: Tensor, weights: Sequence[nn.Parameter], share: float = 1.0) -> None:
    """weight.grad <- dL/dweight, whatever was there; in the same memory where an `MLP` can do so.

    Of other weights that L depends on nothing is computed.

    Args:
        loss: Of any shape; L is its sum times the share.
        weights: Leaves of its graph.
        share: Of each element in L.
    """
    try:
        _places.update((id(weight), weight.grad) for weight in weights)
        # What torch.autograd.grad calls; the Python around it is a tenth of a small network's step.
        gradients = _engine.run_backward(
            (loss,),
            (torch.full_like(loss, share),),
            keep_graph=False,
            create_graph=False,
            inputs=tuple(weights),
            allow_unreachable=False,
            accumulate_grad=False,
        )
    finally:
        _places.clear()
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not weight.grad:
            weight.grad = gradient


def activations(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x, the output of each hidden layer, and the outputs; weight and bias of a layer by turns."""
    inputs, members = x.shape[0], weights[0].shape[0]
    if inputs < members:
        x = x.unsqueeze(1).expand(-1, members // inputs, -1, -1).flatten(0, 1)
    h = [x]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h.append(affine(h[-1], weight, bias).relu_())
    h.append(affine(h[-1], *weights[-2:]))
    return h


def below(dy: Tensor, weight: Tensor) -> Tensor:
    """Slopes in a layer's inputs: dy W^T, [M, B, out] -> [M, B, in]."""
    # One output: a column times a row, which a product of matrices is slow at.
    return dy * weight.mT if dy.shape[-1] == 1 else torch.bmm(dy, weight.mT)


def relu_backward_(dy: Tensor, h: Tensor) -> Tensor:
    """Slopes before a ReLU that returned h, in place of those after it."""
    result: Tensor = torch.ops.aten.threshold_backward.grad_input(dy, h, 0, grad_input=dy)
    return result


class QNetwork(nn.Module):
    """Action values Q(s, .) of a discrete-action problem: obs [S, B, O] -> [S, B, actions]."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.net: nn.Module = MLP((obs_dim, *hidden, action_dim), generators)

    def forward(self, obs: Tensor) -> Tensor:
        """Values of all actions."""
        q: Tensor = self.net(obs)
        return q

    def act(self, obs: Tensor) -> Tensor:
        """The greedy actions [S, B], as integers."""
        q: Tensor = self.net(obs)
        return q.argmax(-1)


class DeterministicActor(nn.Module):
    """A policy mu(s) with actions in [-1, 1]: obs [S, B, O] -> [S, B, A]."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.net = MLP((obs_dim, *hidden, action_dim), generators)

    def forward(self, obs: Tensor) -> Tensor:
        """The actions."""
        return torch.tanh(self.net(obs))

    def act(self, obs: Tensor) -> Tensor:
        """The actions [S, B, A]."""
        return torch.tanh(self.net(obs))


class GaussianActor(nn.Module):
    """A squashed Gaussian policy: a = tanh(u), u ~ N(mean(s), std(s)^2), actions in [-1, 1].

    log std is clamped to [-20, 2], as in Stable-Baselines3: std from 2e-9 to 7.4.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.net = MLP((obs_dim, *hidden, 2 * action_dim), generators)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of u, [S, B, A] each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        # A clamp, backward in one kernel instead of five.
        return mean, F.hardtanh(log_std, LOG_STD_MIN, LOG_STD_MAX)

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic actions tanh(mean(s)) [S, B, A]."""
        return torch.tanh(self.net(obs).chunk(2, dim=-1)[0])

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Actions tanh(mean + std noise), differentiable in the weights, and their log density.

        log pi(a|s) = sum_i [ log N(u_i) - log(1 - tanh(u_i)^2) ]. The last term is computed as
        -2 log cosh(u), finite where 1 - tanh(u)^2 rounds to zero, with u - log sigmoid(2u) for
        log(2 cosh(u)); its bits do not depend on the shape as softplus's do.

        Args:
            obs: Observations [S, B, O].
            noise: Standard normal draws [S, B, A].

        Returns:
            Actions [S, B, A] and log densities [S, B].
        """
        mean, log_std = self(obs)
        u = torch.addcmul(mean, log_std.exp(), noise)
        twice = 2 * u
        log_4cosh2 = torch.sub(twice, F.logsigmoid(twice), alpha=2)  # log (2 cosh(u))^2
        constants = 0.5 * noise.square() + (0.5 * math.log(2 * math.pi) + 2 * math.log(2))
        return torch.tanh(u), (log_4cosh2 - log_std - constants).sum(-1)


class Critic(nn.Module):
    """`n` action-value functions per seed: obs [S, B, O], action [S, B, A] -> Q [S, n, B].

    A seed's critics are neighbouring members: member `s * n + i` is critic `i` of seed `s`.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Sequence[torch.Generator],
        n: int,
    ) -> None:
        super().__init__()
        members = [generator for generator in generators for _ in range(n)]
        self.net = MLP((obs_dim + action_dim, *hidden, 1), members)
        self.n = n

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Values of the given actions under every critic."""
        q: Tensor = self.net(torch.cat((obs, action), dim=-1))  # [S * n, B, 1]
        return q.view(-1, self.n, q.shape[1])


def stack_members(policy: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """A copy of `policy` whose members are those of all `states`, one after another.

    Args:
        policy: A network of this module; it is left as it is.
        states: K mappings of parameter name to tensor [S, ...], of any float dtype.

    Returns:
        A frozen network of K * S members: member `k * S + s` has the weights `states[k]` give
        seed `s`.
    """
    stacked = copy.deepcopy(policy).requires_grad_(False)
    for name, parameter in stacked.named_parameters():
        rows = torch.cat([state[name].detach() for state in states])
        parameter.data = rows.to(parameter.dtype)
    flatten_(stacked, members=len(rows))  # aligned like the policy itself: the same bits
    return stacked


def select_member(state: Mapping[str, Tensor], index: int, seeds: int) -> dict[str, Tensor]:
    """The part of a state of `seeds` seeds that belongs to seed number `index`, copied.

    Args:
        state: Name to tensor [S * n, ...], for example `policy.state_dict()`.
        index: Which seed, from 0.
        seeds: How many seeds the state holds.
    """
    return {
        name: tensor.detach().view(seeds, -1, *tensor.shape[1:])[index].clone()
        for name, tensor in state.items()
    }
