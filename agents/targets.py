"""What values are bootstrapped from: a soft target network, a hard one, or the network itself."""

from collections.abc import Mapping

from torch import nn

from agents.agent import AgentConfig
from polyak_rl import TargetNetwork


def target_networks(
    config: AgentConfig, online: Mapping[str, nn.Module], every: int = 1
) -> dict[str, TargetNetwork]:
    """The target networks that a config asks for; `update()` each of them once per gradient step.

    | `config.target` | theta', from which values are bootstrapped |
    |---|---|
    | "soft" | theta' <- tau theta + (1 - tau) theta' at every gradient step |
    | "hard" | theta' <- theta at every `target_update_every`-th |
    | "none" | theta itself: there is no copy |

    Args:
        config: Its `target`, `tau`, `tau_end` and `target_update_every`. The way from `tau` to
            `tau_end` is the training loop's, which knows how long the run is.
        online: The networks theta by name.
        every: Gradient steps between two updates of a soft target (TD3's delay).

    Returns:
        The target of each network by name; of "none" there is none.

    Raises:
        ValueError: There is no such kind of target, or tau says another kind.
    """
    tau = config.tau
    if config.target == "soft":
        if tau == 1 and config.tau_end is None:
            raise ValueError("a soft target needs tau below 1, got 1.0: that is a copy")
    elif config.target in ("hard", "none"):
        # The attribute of a dataclass is its field's default. 1 is what a copy has.
        if tau not in (type(config).tau, 1) or config.tau_end is not None:
            raise ValueError(
                f"tau and tau_end are for a soft target, got tau {tau} and tau_end "
                f"{config.tau_end} with target {config.target!r}"
            )
        tau, every = 1.0, config.target_update_every
    else:
        raise ValueError(f"target must be soft, hard or none, got {config.target!r}")
    if config.target == "none":
        return {}
    return {name: TargetNetwork(network, tau, every=every) for name, network in online.items()}


class Clock(nn.Module):
    """Counts gradient steps; a module, so that checkpoints keep the count."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def tick(self) -> int:
        """Count one more, and say how many there were."""
        self.steps += 1
        return self.steps

    def get_extra_state(self) -> int:
        """The count."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Go on from a saved count."""
        self.steps = state
