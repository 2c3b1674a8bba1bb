"""The jobs of the comparison: what one process does, and which jobs a command line asks for."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tyro

from agents.agent import check as check_config
from agents.environments import interface, make_env
from agents.presets import ALGORITHMS, preset
from polyak_rl.files import write_whole
from scripts.experiment.paths import folder_name
from scripts.experiment.study import CELLS, FIRST_SEED, PPOConfig

AgentConfig = TypeVar("AgentConfig")

SMALL = {"hidden": (32, 32), "batch_size": 32, "learning_starts": 500}
MUJOCO = ("Hopper", "Walker2d", "HalfCheetah", "InvertedDoublePendulum", "Reacher", "Swimmer")
TIERS: dict[str, list[tuple[str, str, int, dict[str, Any]]]] = {  # algo, env, seeds, changes
    "s": [
        ("dqn", "CartPole-v1", 2, {"total_steps": 8_000, "agent": {"hidden": (32, 32)}}),
        ("ddpg", "Pendulum-v1", 1, {"total_steps": 3_000, "agent": SMALL}),
    ],
    "m": [
        ("dqn", "CartPole-v1", 20, {}),
        ("dqn", "Acrobot-v1", 20, {}),
        ("dqn", "LunarLander-v3", 10, {}),
        ("ddpg", "InvertedPendulum-v5", 20, {}),
        ("ddpg", "Reacher-v5", 10, {}),
        ("sac", "InvertedDoublePendulum-v5", 10, {}),
        ("ddpg", "Pendulum-v1", 5, {}),
        ("sac", "Pendulum-v1", 5, {}),
    ],
    "l": [
        (algo, f"{env}-v5", 20, {"total_steps": 1_000_000})
        for algo in ("sac", "ddpg")
        for env in MUJOCO
    ],
}
SMOKE = {"points": 10, "episodes": 5, "final_episodes": 10}  # tier s


@dataclass(frozen=True)
class Job:
    """What one process trains: an algorithm on an environment, for one seed or several."""

    algo: str
    env_id: str
    seeds: tuple[int, ...]
    variant: str = ""
    """what differs from the plain protocol, e.g. "lr=linear"; empty for the protocol itself"""
    total_steps: int | None = None
    """environment steps; None: the preset's"""
    agent: Mapping[str, Any] = field(default_factory=dict)
    """fields of the algorithm's config that differ from the preset"""
    lr_decay: Literal["constant", "linear"] = "constant"
    lr_decay_until: float = 1.0
    """as in `TrainConfig`"""
    lr_floor: float = 0.0
    """as in `TrainConfig`"""
    points: int = 20
    """evaluations, evenly spread"""
    episodes: int = 20
    """episodes in an evaluation"""
    final_episodes: int = 100
    """episodes of every scheme at the last point"""
    capacity: int = 256
    """segments of the timeline"""
    device: str = "cpu"
    """where networks and replay buffer live, as torch names it"""
    wrap: tuple[str, ...] = ()
    """wrappers around the environment, as in `TrainConfig`"""

    def run_names(self) -> list[str]:
        """The folder of each seed's run."""
        variant = [self.variant.replace("=", "-").replace(":", "-")] if self.variant else []
        parts = (self.env_id, self.algo, *variant)
        return [folder_name(*parts, str(seed)) for seed in self.seeds]

    def steps(self) -> int:
        """Environment steps per seed."""
        return self.total_steps or preset(self.algo, self.env_id)[1]

    def agent_config(self) -> Any:
        """The preset's config with this job's changes."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in self.agent.items()}
        base = PPOConfig() if self.algo == "ppo" else preset(self.algo, self.env_id)[0]
        return dataclasses.replace(base, **values)


def plain(job: Job) -> dict[str, Any]:
    """A job as plain values of JSON."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(job)))
    return values


def from_plain(values: Any) -> Job:
    """The job of `plain`, also of a version that had fewer settings.

    Raises:
        ValueError: The values are not those of a job.
    """
    try:
        seeds, wrap = tuple(map(int, values["seeds"])), tuple(values.get("wrap", ()))
        return Job(**{**values, "seeds": seeds, "wrap": wrap})
    except (TypeError, KeyError) as error:
        raise ValueError(f"these are not the settings of a job: {error}") from error


def read_job(path: Path) -> Job:
    """The job of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    try:
        return from_plain(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_job(job: Job, path: Path) -> None:
    """Write a job to a file, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as file:
        file.write(json.dumps(plain(job), indent=2).encode() + b"\n")


@dataclass(frozen=True)
class Options(Generic[AgentConfig]):
    """What to compare, and how."""

    tier: Literal["s", "m", "l", "study"] | None = None
    """a set of runs: s takes minutes, m hours, l a cluster; study is the registered one"""
    algo: str | None = None
    """instead of a tier: one algorithm, with --env-id"""
    env_id: str | None = None
    """Gymnasium's name of the environment; my_module:My-v0 imports my_module first"""
    agent: AgentConfig | None = None
    """with --algo, its settings in place of the preset's, such as --agent.learning-rate 1e-3"""
    wrap: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a wrapper around the environment, package.module:Wrapper; repeat it, the innermost first"""
    random_score: float | None = None
    """return of a uniformly random policy, the report's 0; None: measured, where 1 is given"""
    reference_score: float | None = None
    """return of a good policy, the report's 1; None: the report has raw returns"""
    seeds: int | None = None
    """runs of each algorithm on each environment; None: the tier's, or 20"""
    first_seed: int = 1
    """the seeds are this one and those after it"""
    total_steps: int | None = None
    """environment steps of each run; None: the preset's"""
    lr_decay: Literal["constant", "linear"] = "constant"
    """the rival explanation: learning rates that fall to 0 over the run"""
    workers: int = 2
    """processes side by side, one thread each; a cluster has as many as it has room for"""
    together: int = 1
    """seeds trained as members of one process"""
    ray: str | None = None
    """do the runs on Ray: the address of a running cluster ("auto": the one of this machine), or
    "local" to begin one here"""
    num_cpus: float = 1
    """CPUs that each process takes on Ray"""
    num_gpus: float = 0
    """GPUs that each process takes on Ray, and trains on: 0.25 for four on one"""
    out: Path = Path("runs/compare")
    """where run folders and results go; runs that are finished there are not done again"""


def plan(options: Options[Any]) -> list[Job]:
    """The jobs of a command line, in the order in which they are done.

    Raises:
        ValueError: The options contradict each other or name something unknown.
    """
    if (options.tier is None) == (options.algo is None or options.env_id is None):
        raise ValueError("give either --tier or both --algo and --env-id")
    for name in ("seeds", "workers", "together", "total_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    if options.first_seed < 0:
        raise ValueError(f"first-seed must be at least 0, got {options.first_seed}")
    for name in ("num_cpus", "num_gpus"):
        value = getattr(options, name)
        if value < 0 or (value > 1 and value % 1):
            raise ValueError(
                f"{name.replace('_', '-')} must be a share of one or a whole number, got {value}"
            )
    if options.num_gpus and options.ray is None:
        raise ValueError("num-gpus is for --ray: without it, runs are on the CPU")
    check_scores(options)
    if options.tier == "study":
        return study(options)
    if options.tier is not None:
        grid = TIERS[options.tier]
    elif options.algo in ALGORITHMS:
        changes = {"agent": changed(options), "wrap": options.wrap}
        grid = [(options.algo, str(options.env_id), 20, changes)]
    else:
        raise ValueError(f"algo must be one of {', '.join(ALGORITHMS)}, got {options.algo!r}")
    common: dict[str, Any] = {"device": "cuda" if options.num_gpus else "cpu"}
    if options.tier == "s":
        common |= SMOKE
    asked: dict[str, Any] = {"total_steps": options.total_steps} if options.total_steps else {}
    if options.lr_decay == "linear":
        asked |= {"variant": "lr=linear", "lr_decay": "linear"}
    jobs: list[Job] = []
    for algo, env_id, seeds, changes in grid:
        every = range(options.first_seed, options.first_seed + (options.seeds or seeds))
        for i in range(0, len(every), options.together):
            group = tuple(every[i : i + options.together])
            jobs.append(Job(algo, env_id, group, **{**common, **changes, **asked}))
    return jobs


def changed(options: Options[Any]) -> dict[str, Any]:
    """The settings of the algorithm that are not those of its preset."""
    if options.agent is None:
        return {}
    asked, base = options.agent, preset(options.algo or "", options.env_id or "")[0]
    names = [each.name for each in dataclasses.fields(asked)]
    return {k: getattr(asked, k) for k in names if getattr(asked, k) != getattr(base, k)}


def check_scores(options: Options[Any]) -> None:
    """Raise ValueError unless the scores, and what belongs to one environment, make sense."""
    low, high = options.random_score, options.reference_score
    if options.tier and (options.agent is not None or options.wrap or (low, high) != (None, None)):
        raise ValueError("agent, wrap and scores are for --algo and --env-id, not for --tier")
    if low is not None and high is None:
        raise ValueError("random-score needs reference-score beside it: the report's 0 and 1")
    if any(score is not None and not isfinite(score) for score in (low, high)):
        raise ValueError(f"random and reference score must be finite, got {low} and {high}")
    if low is not None and low == high:
        raise ValueError(f"random and reference score must differ, got {low} twice")


def check(jobs: Sequence[Job]) -> None:
    """Look at what can be known before anything is trained.

    Raises:
        ValueError: An environment cannot be made, its spaces are not those of the algorithm, or a
            setting is out of its range.
    """
    jobs = [job for job in jobs if job.algo in ALGORITHMS]  # cell 12's PPO has settings of its own
    for algo, env_id, wrap in dict.fromkeys((job.algo, job.env_id, job.wrap) for job in jobs):
        with closing(make_env(env_id, wrap)) as env:
            interface(env.observation_space, env.action_space, algo)
    for job in jobs:
        config = job.agent_config()
        check_config(config)
        if config.learning_starts >= job.steps():
            raise ValueError(
                f"learning starts after {config.learning_starts} steps, and {job.algo} on "
                f"{job.env_id} ends at {job.steps()}: give more --total-steps"
            )


def study(options: Options[Any]) -> list[Job]:
    """The jobs of the registered study, which nothing but the way they are run can change."""
    fixed = ("seeds", "first_seed", "total_steps", "lr_decay", "together", "num_gpus")
    if any(getattr(options, name) != getattr(Options[Any](), name) for name in fixed):
        raise ValueError(f"the registered study fixes {', '.join(fixed)}: leave them out")
    return [
        Job(cell.algo, cell.env_id, tuple(range(first, first + cell.together)), **cell.changes)
        for cell in CELLS
        for first in range(FIRST_SEED, FIRST_SEED + cell.runs, cell.together)
    ]
