"""Averages of the policy's weights, recorded while it trains."""

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.training import Training
from polyak_rl import AverageBank, Ema, Rule, Timeline, Uniform


class PolicyAverages:
    """Records the weights of a training's policy after every gradient step.

    Averages are taken of what acts: DQN's Q network, the others' actor. Training is the
    same, bit for bit, with it and without.

    Args:
        training: The run; its `recorders` are added to, and nothing of it is written to.
        rules: Averages to keep in a bank, by name.
        capacity: Segments of the timeline, which answers for averages chosen afterwards.

    Attributes:
        bank: The averages by `rules`.
        timeline: The course of the weights.
    """

    def __init__(self, training: Training, rules: Mapping[str, Rule], capacity: int = 256) -> None:
        policy = training.agent.policy
        self.policy = policy
        self.bank = AverageBank(policy, rules)
        self.timeline = Timeline(
            policy,
            capacity=capacity,
            expected=max(1, training.total_updates),
            max_bytes=1 << 36,  # the machine's memory is the limit; the caller chose the capacity
        )
        self.seeds = len(training.seeds)
        training.recorders += [self.bank.update, self.timeline.record]

    def last(self) -> dict[str, Tensor]:
        """The weights of the last iterate by name."""
        return {name: p.detach().clone() for name, p in self.policy.named_parameters()}

    def average(self, which: str | Rule) -> dict[str, Tensor]:
        """An average of the bank by name, or of the timeline by rule; at first, the last."""
        if not self.timeline.updates:
            return self.last()
        if isinstance(which, str):
            return self.bank.average(which)
        return self.timeline.average(which)

    def distances(self) -> dict[str, Tensor]:
        """Relative distance of each average in the bank to the last iterate, [S] each."""
        last = self.last()
        size = self._squares(last)
        return {
            f"averaging/distance_to_last/{name}": (
                self._squares({n: x - last[n] for n, x in self.average(name).items()}) / size
            ).sqrt()
            for name in self.bank.rules
        }

    def _squares(self, state: Mapping[str, Tensor]) -> Tensor:
        """The squared L2 norm of each seed's weights [S]."""
        norms = [x.double().view(self.seeds, -1).square().sum(1) for x in state.values()]
        return torch.stack(norms).sum(0)


def default_rules(total_updates: int) -> dict[str, Rule]:
    """What every run keeps: the uniform average from half way, and an EMA.

    The EMA's half-life is one per cent of the run.
    """
    return {
        "uniform50": Uniform(start=total_updates // 2),
        "ema1": Ema(half_life=max(1.0, total_updates / 100)),
    }
