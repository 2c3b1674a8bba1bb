"""What cannot be beaten: bare kernels on tensors at hand, and a gradient step's GEMMs alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scripts.bench_cases.timing import Bench, Peaks

LERP, COPY = "lerp_ on one vector", "copy of one vector"

Call = Callable[[], Tensor]
Sizes = tuple[int, ...]


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


def units(algo: str, obs: int, action: int, config: Any) -> tuple[Sizes, Sizes, int]:
    """Units of Q, of the policy (none for DQN, whose Q acts), and how many critics there are."""
    if algo == "dqn":
        return (obs, *config.hidden, action), (), 1
    pi = (obs, *config.hidden, 2 * action if algo == "sac" else action)
    return (obs + action, *config.hidden, 1), pi, 1 if algo == "ddpg" else 2


def gemms(algo: str, obs: int, action: int, config: Any, device: torch.device) -> list[Call]:
    """The matrix products that one gradient step needs, in order, and no others; TD3's of two."""
    q, pi, twins = units(algo, obs, action, config)
    run = partial(products, batch=config.batch_size, device=device)
    if algo == "dqn":
        return [*run(q), *run(q, back="weights")]  # Q^(s'), Q(s)
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


def traffic(algo: str, obs: int, action: int, config: Any) -> int:
    """Bytes that a gradient step moves at the least: Adam's and the soft targets'; TD3's of two.

    Adam reads weights, gradients and two moments and writes three of them; a target update reads
    two vectors and writes one. DQN's hard copies are rare, and the batch is small beside these.
    """
    q, pi, twins = units(algo, obs, action, config)
    critics, actor = (sum((i + 1) * o for i, o in pairwise(sizes)) for sizes in (q, pi))
    critics *= twins
    if algo == "dqn":
        return 4 * 7 * critics
    critic_step, actor_step = 4 * (7 + 3) * critics, 4 * (7 + 3 * (algo != "sac")) * actor
    return 2 * critic_step + actor_step if algo == "td3" else critic_step + actor_step


def peaks(device: torch.device, elements: int = 1 << 27, side: int = 8192) -> Peaks:
    """What the device can do: a plain copy of so many floats, and a product of square matrices."""
    x, a = torch.ones(elements, device=device), torch.randn(side, side, device=device)
    bench = Bench(device, rounds=5)
    bench.section = "peaks"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as fast as any contender may multiply
    bench.compare(COPY, {COPY: partial(torch.empty_like(x).copy_, x), "product": lambda: a @ a})
    torch.set_float32_matmul_precision(before)
    seconds = bench.cases[0].seconds
    return Peaks(2 * x.nbytes / seconds(COPY).low, 2 * side**3 / seconds("product").low)


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
