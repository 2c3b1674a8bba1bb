"""Adam for flat networks, and the optimizer of the value networks by name."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyak_rl import ASGD, Flat, FlatParameter, PolyakSGD

Name = Literal["adam", "sgd", "asgd", "polyak_sgd"]


class Adam(torch.optim.Adam):
    """torch's fused Adam over flat parameters, without the Python around its one kernel.

    State and checkpoints are those of `torch.optim.Adam(fused=True)`; of its options there is the
    learning rate, a number or a tensor on the device. The moments are there from the beginning and
    stay where they are, also when a state is loaded.
    """

    def __init__(self, parameters: Sequence[FlatParameter], lr: float) -> None:
        super().__init__(parameters, lr=lr, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with moments of zero."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; what it does not have is zero, as before the first step."""
        own = dict(self.state)
        super().load_state_dict(state_dict)
        for parameter, state in own.items():
            for name, tensor in state.items():
                loaded = self.state[parameter].get(name)
                tensor.zero_() if loaded is None else tensor.copy_(loaded)
            self.state[parameter] = state

    def step(self, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """m <- m + (1 - b1) (g - m), v <- v + (1 - b2) (g^2 - v), p <- p - lr m^ / (sqrt(v^) + e).

        Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980.

        Args:
            found_inf: A 0-dim tensor; where it is 1 nothing moves, the step count neither.
        """
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"].add_(1)
                if found_inf is not None:
                    state["step"].sub_(found_inf)
                torch._fused_adam_(
                    [parameter.detach()],
                    [parameter.grad],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=0.0,
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    found_inf=found_inf,
                )

    # torch wraps a step in a profiler's record and hooks unless told that this was done: 30 to 70
    # microseconds, more than the kernel of a small network. So step hooks do not run, the one by
    # which `AverageBank.applied` refuses a step included.
    step.hooked = True  # type: ignore[attr-defined]


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
        return Adam(parameters, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    if name == "asgd":
        return ASGD(parameters, lr=learning_rate)
    if name != "polyak_sgd":
        raise ValueError(f"optimizer must be adam, sgd, asgd or polyak_sgd, got {name!r}")
    return PolyakSGD(parameters, max_stepsize=learning_rate)


def take_step(optimizer: Optimizer, loss: Tensor, found_inf: Tensor) -> None:
    """One step of an optimizer whose gradients are ready, or none where they are not finite.

    Args:
        optimizer: From :func:`value_optimizer`.
        loss: The loss of those gradients, [S, ...]: Polyak's step size needs the sum of each seed's
            mean.
        found_inf: A 0-dim tensor, 1 where the gradient is not finite; see `agents.guard.Guard`.
    """
    if isinstance(optimizer, Adam):
        optimizer.step(found_inf)
    elif found_inf:  # read back: these optimizers take no such flag
        return
    elif isinstance(optimizer, PolyakSGD):
        optimizer.step(loss=loss.flatten(1).mean(1).sum())
    else:
        optimizer.step()
