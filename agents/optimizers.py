"""Steps down a loss: networks in flat memory, each with its Adam."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.networks import set_gradients
from agents.nonfinite import GradientWatch
from polyak_rl import FlatParameter, flatten_


class Descent:
    """The networks that an agent trains, each in flat memory and with an Adam of its own.

    Args:
        networks: By name.
        learning_rate: Adam's step size, of all of them.
        members: Number S of seeds; a network may have several members for each.
        max_grad_norm: L2 norm to which each member's gradient is clipped; None: as it is.

    Attributes:
        optimizers: By the network's name.
        watch: Notices gradients that are not finite; such a step is left out.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        learning_rate: float,
        members: int,
        max_grad_norm: float | None = None,
    ) -> None:
        self.weights = {name: [*network.parameters()] for name, network in networks.items()}
        self.flats = {
            name: flatten_(network, members=len(self.weights[name][0]))
            for name, network in networks.items()
        }
        self.optimizers = {
            name: Adam(flat.parameters, lr=learning_rate) for name, flat in self.flats.items()
        }
        self.max_grad_norm = max_grad_norm
        first = next(iter(self.weights.values()))[0]
        self.watch = GradientWatch([*networks], members, first.device)

    def step(self, name: str, loss: Tensor) -> None:
        """theta <- Adam(theta, grad_theta L) for the weights theta of one network.

        Whatever else the loss depends on stays as it is, its gradient too. L is the sum over seeds,
        of which each seed's weights see their own alone.

        Args:
            name: Whose weights.
            loss: Of every transition [S, B], of which a seed's is the mean, or of every seed [S].
        """
        flat = self.flats[name]
        set_gradients(loss, self.weights[name], share=loss.shape[0] / loss.numel())
        if self.max_grad_norm is None:
            norm = flat.grad_norm()
        else:
            norm = flat.clip_grad_norm_(self.max_grad_norm)
        self.optimizers[name].step(self.watch.found_inf(name, norm))

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' states by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


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
