"""The optimizer of the value networks, by name."""

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyak_rl import ASGD, Flat, PolyakSGD

Name = Literal["adam", "sgd", "asgd", "polyak_sgd"]


def value_optimizer(name: Name, flat: Flat, learning_rate: float) -> Optimizer:
    """An optimizer over a flat network.

    Args:
        name: "adam"; "sgd"; "asgd", averaged SGD; "polyak_sgd", whose step size is the loss over
            the squared gradient norm, since a TD loss cannot fall below 0.
        flat: The network.
        learning_rate: The step size; for "polyak_sgd" the largest one.

    Raises:
        ValueError: There is no such optimizer.
    """
    parameters = flat.parameters
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    if name == "asgd":
        return ASGD(parameters, lr=learning_rate)
    if name != "polyak_sgd":
        raise ValueError(f"optimizer must be adam, sgd, asgd or polyak_sgd, got {name!r}")
    return PolyakSGD(parameters, max_stepsize=learning_rate)


def take_step(optimizer: Optimizer, loss: Tensor) -> None:
    """One step of an optimizer whose gradients are ready.

    Args:
        optimizer: From :func:`value_optimizer`.
        loss: The loss of those gradients, 0-dim; Polyak's step size needs it.
    """
    if isinstance(optimizer, PolyakSGD):
        optimizer.step(loss=loss.detach())
    else:
        optimizer.step()
