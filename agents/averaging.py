"""Averages of a training's policy, beside it."""

from collections.abc import Callable, Mapping

from torch import Tensor

from agents.training import Training
from polyak_rl import PolicyAverages, Rule


def record_policy(
    training: Training, rules: Mapping[str, Rule], capacity: int | None = None
) -> PolicyAverages:
    """Record the weights of a training's policy in every gradient step.

    Averages are taken of what acts: DQN's Q network, the others' actor. Training is the
    same, bit for bit, with it and without.

    Args:
        training: The run; nothing of what it learns is written to.
        rules: Averages to keep, by name.
        capacity: Segments of the timeline; None: 256, or as many as 512 MiB a seed hold.
    """
    averages = PolicyAverages(
        training.agent.policy,
        rules,
        capacity=capacity,
        expected=max(1, training.total_updates),
        # The machine's memory is the limit where the caller chose.
        max_bytes=1 << 36 if capacity else len(training.seeds) << 29,
    )
    training.learner.record(averages)
    return averages


def evaluate_averages(training: Training, averages: PolicyAverages) -> None:
    """Evaluate each average beside the last policy, where it can be given, and log how far it is.

    An average that the timeline is too coarse for yet is left out of an evaluation.
    """
    for name in averages.rules:
        training.schemes[name] = _scheme(averages, name)

    def distances() -> dict[str, Tensor]:
        each = averages.distances(len(training.seeds))
        return {f"averaging/distance_to_last/{name}": x for name, x in each.items()}

    training.diagnostics.append(distances)


def _scheme(averages: PolicyAverages, name: str) -> Callable[[], Mapping[str, Tensor] | None]:
    return lambda: averages.average(name) if averages.ready(name) else None
