"""What cannot be beaten: bare kernels on tensors at hand, and a gradient step's GEMMs alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

LERP, COPY = "lerp_ on one vector", "copy of one vector"

Call = Callable[[], Tensor]


def bare_updates(network: nn.Module, tau: float) -> dict[str, Callable[[], object]]:
    """A target update's arithmetic, tensor by tensor and on one vector, and a copy's."""
    onlines = [p.detach().clone() for p in network.parameters()]
    targets = [p.clone() for p in onlines]
    online = torch.cat([p.flatten() for p in onlines])
    return {
        "_foreach_lerp_, cached lists": lambda: torch._foreach_lerp_(targets, onlines, tau),
        **on_one_vector(online, tau),
    }


def on_one_vector(online: Tensor, tau: float) -> dict[str, Callable[[], object]]:
    """A target update of one vector in one kernel, and the plain copy of the same bytes."""
    target = online.clone()
    return {LERP: lambda: target.lerp_(online, tau), COPY: lambda: target.copy_(online)}


def gemms(algo: str, obs: int, action: int, config: Any, device: torch.device) -> list[Call]:
    """The matrix products that one gradient step needs, in order, and no others; TD3's of two."""
    q = (obs + action, *config.hidden, 1)
    run = partial(products, batch=config.batch_size, device=device)
    if algo == "dqn":
        q = (obs, *config.hidden, action)
        return [*run(q), *run(q, back="weights")]  # Q^(s'), Q(s)
    twins = 1 if algo == "ddpg" else 2
    pi = (obs, *config.hidden, 2 * action if algo == "sac" else action)
    critic = [
        *run(pi),  # pi(s')
        *run(q, members=twins),  # Q'(s', pi(s'))
        *run(q, members=twins, back="weights"),  # Q(s, a)
    ]
    actor = [
        *run(q, members=twins, back="inputs"),  # Q(s, pi(s)); of TD3's two one would do
        *run(pi, back="weights"),  # pi(s)
    ]
    return [*critic, *critic, *actor] if algo == "td3" else [*critic, *actor]


def products(
    sizes: Sequence[int],
    *,
    batch: int,
    device: torch.device,
    members: int = 1,
    back: Literal["weights", "inputs", "nothing"] = "nothing",
) -> Iterator[Call]:
    """The matrix products of one pass through a multi-layer perceptron, there and back.

    There: y = x W in each layer. Back: dW = x^T dy where weights are trained, and dx = dy W^T where
    something below wants it. Layers narrower than 8 units, or of a width that is no multiple of 4,
    are multiplied as their transposes on the way there, as `agents.networks.affine` does.

    Args:
        sizes: Units of the input and of each layer.
        batch: Rows.
        device: Where the tensors lie ready.
        members: Networks side by side.
        back: What is wanted on the way back: the weights' gradient, the inputs' or neither.
    """
    matrix = partial(torch.randn, members, device=device)
    layers = [  # x, W, dy
        (matrix(batch, i), matrix(i, o), matrix(batch, o)) for i, o in pairwise(sizes)
    ]
    for x, w, _ in layers:
        wide = w.shape[-1] >= 8 and w.shape[-1] % 4 == 0
        yield partial(torch.bmm, x, w) if wide else partial(torch.bmm, w.mT, x.mT)
    if back == "nothing":
        return
    for i, (x, w, dy) in reversed([*enumerate(layers)]):
        if back == "weights":
            yield partial(torch.bmm, x.mT, dy)
        if back == "inputs" or i > 0:
            yield partial(torch.mul if dy.shape[-1] == 1 else torch.bmm, dy, w.mT)
