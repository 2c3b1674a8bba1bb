"""Cell 12 of the study: Stable-Baselines3's PPO, averaged through `PolyakAveragingCallback`.

It is trained as `PPO.learn` trains it, to the bit, and measured as all other cells are: the same
schemes at the same points on the same episodes, but for the target actor, which PPO does not have.
A point at n steps is the model that `learn(n)` leaves, which ends with the rollout in which n
falls. No checkpoint is written on the way: a run that is killed begins anew.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from agents.environments import interface, make_env
from agents.evaluation import Evaluation, Evaluator
from agents.training import TrainConfig
from scripts.experiment.jobs import Job
from scripts.experiment.locks import Hold
from scripts.experiment.measurement import Measurement, beginning, clear, in_bank
from scripts.experiment.run_folder import RunFolder

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.policies import ActorCriticPolicy

    from polyak_rl.sb3 import PolyakAveragingCallback
except ImportError as error:
    hint = "pip install -c constraints.txt --group sb3"
    raise ImportError(f"cell 12 needs Stable-Baselines3: {hint}") from error


def set_up(job: Job, paths: list[Path], held: Hold) -> Measurement:
    """Set a job up at its first step; what its folder held is removed.

    Raises:
        ValueError: It asks for what only the algorithms of `agents` can do.
    """
    asked = {"seeds": len(job.seeds), "wrap": job.wrap, "lr_decay": job.lr_decay}
    if asked != {"seeds": 1, "wrap": (), "lr_decay": "constant"}:
        raise ValueError(f"a job of PPO has one seed, no wrapper and a constant rate, got {asked}")
    (path,) = paths
    clear(path)
    run = PPORun(job, path)
    return Measurement(job, run, run.averages, run)


class Greedy(nn.Module):
    """A policy that acts deterministically, as `Evaluator` asks for it: of one member."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)  # a new one would draw training's random numbers

    def act(self, obs: Tensor) -> Tensor:
        """Actions [1, E] for observations [1, E, O]."""
        return self.policy.get_distribution(obs.flatten(0, 1)).mode().view(obs.shape[:2])


class PPORun:
    """A training by Stable-Baselines3 with what `Measurement` asks of one, and its empty folder.

    `averages` are of the policy, actor and critic together, after each of its gradient steps.
    """

    def __init__(self, job: Job, path: Path) -> None:
        (seed,), c = job.seeds, job.agent_config()
        settings = {name: value for name, value in vars(c).items() if name != "n_envs"}
        self.envs = make_vec_env(job.env_id, c.n_envs, seed=seed)
        self.model = PPO("MlpPolicy", self.envs, seed=seed, device=job.device, **settings)
        self.step, self.rollout = 0, c.n_envs * c.n_steps  # environment steps
        rollouts = -(-job.steps() // self.rollout)
        self.total_updates = rollouts * c.n_epochs * -(-self.rollout // c.batch_size)
        self.averaging = PolyakAveragingCallback(in_bank(self.total_updates), capacity=job.capacity)
        self.averaging.init_callback(self.model)
        self.averages = self.averaging.averages
        with closing(make_env(job.env_id)) as env:
            spaces = interface(env.observation_space, env.action_space, "dqn")
        self.evaluator = Evaluator(job.env_id, spaces, job.device)
        self.greedy = Greedy(self.model.policy)
        config = TrainConfig(job.env_id, job.steps(), n_envs=c.n_envs, eval_every=0)
        self.about = beginning(job)
        self.folders = [RunFolder(path, job.algo, seed, config, c)]

    def advance(self) -> None:
        """Go on by a rollout and its update, which is as if `learn` had not stopped in between."""
        self.model.learn(self.rollout, self.averaging, reset_num_timesteps=False)
        self.step = self.model.num_timesteps

    def play(
        self, states: Mapping[str, Mapping[str, Tensor]], episodes: NDArray[Any]
    ) -> dict[str, Evaluation]:
        """Play the same episodes [1, E] with several sets of the policy's weights."""
        results = {}
        for name, weights in states.items():
            self.greedy.policy.load_state_dict(weights)
            results[name] = self.evaluator.evaluate(self.greedy, episodes)
        return results

    def try_to_save(self, extra: Mapping[str, Any]) -> None:
        """Bring the rows to the disk, and nothing else."""
        self.folders[0].sync()

    def close(self) -> None:
        """Close the environments and the files."""
        with ExitStack() as stack:
            stack.callback(self.folders[0].close)
            stack.callback(self.evaluator.close)
            stack.callback(self.envs.close)
