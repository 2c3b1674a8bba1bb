"""What a policy scores that knows nothing: the 0 of normalised scores."""

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from agents.environments import Interface, interface, make_env
from agents.evaluation import Evaluator
from agents.seeding import Purpose, evaluation_seeds, generators

EPISODES = 100


class Uniform(nn.Module):
    """Draws every action uniformly, whatever it sees."""

    def __init__(self, space: Interface) -> None:
        super().__init__()
        self.space = space
        (self.generator,) = generators(Purpose.RANDOM, [0])

    def act(self, obs: Tensor) -> Tensor:
        """Actions [M, E, A] in [-1, 1], or indices [M, E], for observations [M, E, ...]."""
        size, space = obs.shape[:2], self.space
        if space.discrete:
            return torch.randint(space.action_dim, size, generator=self.generator)
        return 2 * torch.rand(*size, space.action_dim, generator=self.generator) - 1


def random_score(algo: str, env_id: str, wrap: Sequence[str] = ()) -> float:
    """The mean return of a uniformly random policy over `EPISODES` episodes, always the same ones.

    Raises:
        ValueError: The environment cannot be made, or is not one of the algorithm's.
        EnvironmentFault: It raised, or broke its spaces.
    """
    with closing(make_env(env_id, wrap)) as env:
        space = interface(env.observation_space, env.action_space, algo)
    seeds = evaluation_seeds(env_id, 0, EPISODES, Purpose.RANDOM)
    with closing(Evaluator(env_id, space, wrap=wrap)) as evaluator:
        return float(evaluator.evaluate(Uniform(space), seeds[None]).returns.mean())
