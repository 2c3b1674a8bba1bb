"""Bad numbers: noticed on the device, kept out of the weights, and named."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """A NaN or an infinity where a number is needed."""


class BadGradient(NamedTuple):
    """Where a gradient was not finite."""

    network: str
    member: int
    """index of the seed"""
    env_step: int
    """environment steps taken when the gradient step began"""
    row: int
    """index of the gradient step since the last reading"""


class GradientWatch:
    """Notices gradients that are not finite, without reading anything back in a gradient step.

    `found_inf` gives the flag that fused optimizers take: where it is 1 they leave weights and
    moments alone. So no NaN ever reaches a weight, a target or an average; the flags are kept and
    read when a log line or a checkpoint is due.

    Args:
        networks: Names of what is watched.
        members: Number S of seeds.
        device: Of the gradients.
        capacity: Gradient steps for which flags are kept.
    """

    def __init__(
        self,
        networks: Sequence[str],
        members: int,
        device: torch.device | str,
        capacity: int = 1024,
    ) -> None:
        self.networks = tuple(networks)
        self.flags = torch.zeros(capacity, len(networks), members, device=device)
        self.env_steps: list[int] = []  # of each gradient step since the last reading
        self._rows = self.flags.unbind(0)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)  # of the next `note`
        # Of the gradient step under way, at one place, so that a step can be one program.
        self._now = torch.zeros(len(networks), members, device=device)
        self._flags_now: dict[str, Tensor] = dict(zip(networks, self._now, strict=True))

    @property
    def full(self) -> bool:
        """True when the flags must be read before the next gradient step."""
        return len(self.env_steps) == len(self.flags)

    def found_inf(self, network: str, norm: Tensor) -> Tensor:
        """1 where the gradient of any seed is not finite, else 0; a 0-dim tensor on the device.

        Args:
            network: One of `networks`.
            norm: Its gradient norms [S * n], a seed's members side by side.
        """
        flag, members = self._flags_now[network], self._now.shape[1]  # [S], S
        if norm.shape[0] > members:
            norm = norm.view(members, -1).sum(-1)
        torch.ne(norm - norm, 0, out=flag)  # Inf - Inf is NaN, which differs from all numbers
        return flag.amax() if members > 1 else flag[0]

    def count(self, env_step: int, *, noted: bool = False) -> None:
        """Count a gradient step that was begun after `env_step` environment steps.

        Args:
            env_step: How many.
            noted: Its flags were kept by `note`, which was part of it.
        """
        if not noted:
            self._rows[len(self.env_steps)].copy_(self._now)
            self._now.zero_()
        self.env_steps.append(env_step)

    def note(self) -> None:
        """Keep the flags of the gradient step under way, in the row that the device counts."""
        row = self._row.remainder(len(self.flags))  # past the end a device would stop for good
        self.flags.index_copy_(0, row, self._now.unsqueeze(0))
        self._row.add_(1)
        self._now.zero_()

    def read(self) -> list[BadGradient]:
        """The bad gradients since the last reading, oldest first; the flags are cleared.

        Raises:
            RuntimeError: The device has noted other steps than were counted.
        """
        if (noted := int(self._row)) not in (0, len(self.env_steps)):
            raise RuntimeError(
                f"the device noted {noted} gradient steps and {len(self.env_steps)} were counted: "
                "which of them were bad cannot be told"
            )
        rows = self.flags[: len(self.env_steps)]
        bad = [
            BadGradient(self.networks[network], member, self.env_steps[row], row)
            for row, network, member in rows.nonzero().tolist()
        ]
        rows.zero_()
        self._row.zero_()
        self.env_steps = []
        return bad
