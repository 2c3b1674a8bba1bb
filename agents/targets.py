"""What values are bootstrapped from: a soft target network, a hard one, or the network itself."""

from collections.abc import Mapping

from torch import nn

from agents.agent import AgentConfig
from polyak_rl import TargetNetwork


def target_networks(
    config: AgentConfig, online: Mapping[str, nn.Module]
) -> dict[str, TargetNetwork]:
    """The target networks that a config asks for; `update()` them where `target_every` says so.

    | `config.target` | theta', from which values are bootstrapped |
    |---|---|
    | "soft" | theta' <- tau theta + (1 - tau) theta' at every update |
    | "hard" | theta' <- theta at every `target_update_every`-th gradient step |
    | "none" | theta itself: there is no copy |

    Args:
        config: Its `target`, `tau`, `tau_end` and `target_update_every`. The way from `tau` to
            `tau_end` is the training loop's, which knows how long the run is.
        online: The networks theta by name.

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
        tau = 1.0
    else:
        raise ValueError(f"target must be soft, hard or none, got {config.target!r}")
    if config.target == "none":
        return {}
    return {name: TargetNetwork(network, tau) for name, network in online.items()}


def target_every(config: AgentConfig, soft: int = 1) -> int:
    """Gradient steps between two updates of the target networks; `soft` those of soft ones."""
    return config.target_update_every if config.target == "hard" else soft
