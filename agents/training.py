"""The training loop: S seeds side by side on Gymnasium environments."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from agents.agent import Agent, AgentConfig, check
from agents.denormals import flushed
from agents.environments import EnvironmentFault, interface
from agents.evaluation import MAX_STEPS, Evaluation, Evaluator, Stopped
from agents.explorer import Explorer
from agents.learner import Learner
from agents.networks import stack_members
from agents.nonfinite import NonFiniteError
from agents.pixels import FrameReplay
from agents.presets import ALGORITHMS
from agents.program import build_for, require_compiler
from agents.replay import Replay
from agents.seeding import Purpose, Streams, episode_seed, evaluation_seeds
from agents.vector import autoreset_of, finite, finite_reward, require_finite, vector_env

EPISODES_SHOWN = 10_000
"""Points in a curve of training episodes beyond which some are left out."""


class Log(Protocol):
    """Where one seed's numbers go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at an environment step."""
        ...

    def evaluation(
        self, step: int, scheme: str, returns: NDArray[np.float64], lengths: NDArray[np.int64]
    ) -> None:
        """The episodes [E] that one scheme's policy played at an environment step."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on, how long, and how often it is looked at."""

    env_id: str
    """Gymnasium's name of the environment"""
    total_steps: int
    """environment steps"""
    n_envs: int = 1
    """environments side by side; each adds to the same count of steps"""
    eval_every: int | None = None
    """environment steps between two evaluations; None: a twentieth of all; 0: there are none"""
    eval_episodes: int = 20
    """episodes in an evaluation"""
    eval_processes: int | None = 1
    """processes that play them, the run's own included. None: once they take long, as many as there
    are idle cores, if so many pay. The numbers are the same; in other processes an environment is
    what its name and wrappers say, without what has been done to its classes since"""
    max_episode_steps: int = MAX_STEPS
    """steps after which an evaluation episode that has not ended is cut"""
    wrap: tuple[str, ...] = ()
    """wrappers to put around the environment, package.module:Wrapper each, the innermost first"""
    lr_decay: Literal["constant", "linear"] = "constant"
    """learning rates as they are, or falling linearly towards 0"""
    lr_decay_until: float = 1.0
    """share of the gradient steps at which a linear decay would reach 0"""
    lr_floor: float = 0.0
    """share of the learning rate below which a linear decay does not fall"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what a NaN or an infinity does: end the run, or be left out and counted (one seed only)"""
    log_every: int = 1000
    """environment steps between two readings of losses and speed"""
    device: str = "cpu"
    """where networks and replay buffer live, as torch names it"""
    matmul_precision: Literal["highest", "high"] = "highest"
    """of products on CUDA: float32, or TF32's 10 bits for speed; holds for the whole process"""
    compile: bool = False
    """make the gradient step one program, from sampling to the averages, for a constant
    learning rate; its numbers are read once. It is compiled, by a C++ compiler or on CUDA by
    Triton, in ten to twenty seconds, twice where something is not due in every step, and each step
    is the same to rounding; on CUDA it is captured in a graph besides, and acting is another"""


def crossings(before: int, after: int, every: int) -> int:
    """How many multiples of `every` lie in (before, after].

    Example:
        >>> [crossings(step - 3, step, 5) for step in (3, 6, 9, 12, 15)]
        [0, 1, 0, 1, 1]
    """
    return after // every - before // every


class Training:
    """A run of one algorithm on one environment, for several seeds at once.

    A seed's run is the same, to the bit on one thread of a CPU, whichever seeds run beside it (not
    promised with `compile`). Everything that changes from step to step is an attribute.

    Args:
        algo: A name of `agents.presets.ALGORITHMS`.
        agent_config: That algorithm's config.
        config: The run's.
        seeds: One training seed per member, each 0 or more and none twice.
        logs: One per seed, or none.
        envs: A vector environment to use in place of those made here, for one seed; it holds
            `n_envs` environments and resets in either of Gymnasium's two ways.

    Attributes:
        step: Environment steps taken, per seed.
        updates: Gradient steps taken.
        schemes: Name -> function that returns policy weights, which are evaluated, or None where
            there are none yet. "last" is there.
        diagnostics: Functions that return tags with values [S], called for a log line.
        stopping: Set it to end `run` after the step under way.
        skipped: Transitions and gradient steps that were left out, with `on_nonfinite="skip"`.

    Raises:
        ValueError: The environment, its spaces or a number is not one that can be trained on.
        NonFiniteError: While it runs: an observation, a reward, a loss or a gradient is not finite.
            Weights, targets and averages have not taken it in.
        EnvironmentFault: While it runs: an environment made here raised or broke its spaces.
        RuntimeError: While it runs with `compile`: a learning rate or a network was changed.
    """

    def __init__(
        self,
        algo: str,
        agent_config: AgentConfig,
        config: TrainConfig,
        seeds: Sequence[int] = (1,),
        logs: Sequence[Log] = (),
        envs: VectorEnv[Any, Any, Any] | None = None,
    ) -> None:
        check(config)
        check(agent_config)
        self.config = config
        self.seeds = tuple(seeds)
        self.logs = tuple(logs)
        _check_seeds(self.seeds, self.logs, envs is not None)
        if agent_config.buffer_size < config.n_envs:
            raise ValueError(
                f"buffer_size must be at least n_envs = {config.n_envs}, "
                f"got {agent_config.buffer_size}"
            )
        if config.on_nonfinite == "skip" and len(self.seeds) > 1:
            raise ValueError("on_nonfinite skip trains one seed: several would skip together")
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision(config.matmul_precision)
        elif config.matmul_precision != "highest":
            raise ValueError(f"matmul_precision {config.matmul_precision!r} is for CUDA only")
        if config.compile:
            _check_compile(config, self.device)
        self.envs = (
            vector_env(config.env_id, self.seeds, config.n_envs, config.wrap)
            if envs is None
            else envs
        )
        self.autoreset = autoreset_of(self.envs, len(self.seeds) * config.n_envs)
        self.interface = interface(
            self.envs.single_observation_space, self.envs.single_action_space, algo
        )

        obs_dim, action_dim = self.interface.obs_dim, self.interface.action_dim
        if config.compile and isinstance(obs_dim, tuple):
            raise ValueError("compile is for vectors of observations, got images")
        agent_class, _ = ALGORITHMS[algo]
        self.agent: Agent = agent_class(
            obs_dim, action_dim, agent_config, self.seeds, self.device, config.total_steps
        )
        replay_class: Any = FrameReplay if isinstance(obs_dim, tuple) else Replay
        self.replay: Replay = replay_class(
            capacity=max(config.n_envs, min(agent_config.buffer_size, config.total_steps)),
            obs_dim=obs_dim,
            action_dim=1 if self.interface.discrete else action_dim,
            members=len(self.seeds),
            device=self.device,
        )
        if agent_config.gradient_steps and not self.total_updates:
            raise ValueError(
                f"no gradient step falls due in total_steps = {config.total_steps}: learning_starts"
                f" is {agent_config.learning_starts}, and from there {agent_config.gradient_steps} "
                f"gradient steps come every {agent_config.train_every} environment steps"
            )
        sampling = Streams(Purpose.REPLAY, self.seeds, self.device)
        self.learner = Learner(
            self.agent,
            self.replay,
            sampling,
            compiled=config.compile,
            build=build_for(self.device),
        )
        self.explorer = Explorer(
            self.agent,
            (len(self.seeds), config.n_envs, *self.interface.obs_shape),
            self.device,
            compiled=config.compile,
            build=build_for(self.device),
        )
        if config.compile and agent_config.tau_end is not None:
            for target in self.agent.targets.values():  # a number would be read once
                target.tau = torch.full((), agent_config.tau, device=self.device)
        self.rates = [(o, o.param_groups[0]["lr"]) for o in self.agent.descent.optimizers.values()]

        self.evaluator = Evaluator(
            config.env_id,
            self.interface,
            self.device,
            config.wrap,
            config.max_episode_steps,
            config.eval_processes,
        )
        twentieth = max(1, config.total_steps // 20)
        self.eval_every = twentieth if config.eval_every is None else config.eval_every
        self.eval_seeds = np.stack(
            [evaluation_seeds(config.env_id, seed, config.eval_episodes) for seed in self.seeds]
        )
        self.schemes: dict[str, Callable[[], Mapping[str, Tensor] | None]] = {
            "last": lambda: dict(self.agent.policy.named_parameters())
        }
        self.diagnostics: list[Callable[[], Mapping[str, Tensor]]] = []
        self.stopping = False

        self.step = 0
        self.updates = 0
        self.skipped = 0
        self.losses: dict[str, Tensor] = {}
        self.evaluations: dict[str, Evaluation] = {}  # the newest [S, E] of each scheme
        self.evaluated_at = 0
        self.logged_at = (0, time.perf_counter())  # step and time of the last reading

        n = len(self.seeds) * config.n_envs
        first = [episode_seed(s, i, 0) for s in self.seeds for i in range(config.n_envs)]
        observed, _ = self.envs.reset(seed=first)  # type: ignore[arg-type]
        self.obs = self._observations(observed)  # [S, n_envs, *obs_shape]
        self.ended, self._all = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
        self.episode_return = np.zeros(n)
        self.episode_length = np.zeros(n, dtype=np.int64)
        self.latest_return = np.full(len(self.seeds), np.nan)
        self.episode_logged_at = np.zeros(len(self.seeds), dtype=np.int64)  # the newest one's step

    def run(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Train to the last step, calling `on_step` after each; evaluate at the end."""
        if self.eval_every and crossings(self.evaluated_at, self.step, self.eval_every):
            self.evaluate()  # which a stop had cut short
        while self.step < self.config.total_steps and not self.stopping:
            self.advance()
            on_step()
        self.require_finite()
        if self.eval_every and self.evaluated_at < self.step >= self.config.total_steps:
            self.evaluate()

    def advance(self) -> None:
        """Step every environment once, and do what falls due between the old and the new step."""
        before = self.step
        self._interact()
        if due := self._updates_due(before, self.step):
            self.learn(due)
        if self.logs and crossings(before, self.step, self.config.log_every):
            self._log_diagnostics()
        if self.eval_every and crossings(before, self.step, self.eval_every):
            self.evaluate()

    def learn(self, count: int) -> None:
        """Take so many gradient steps."""
        if self.config.compile:
            self._require_as_recorded()
        self.learner.begin(count)
        with flushed():
            for _ in range(count):
                self._gradient_step()

    def _gradient_step(self) -> None:
        if self.config.lr_decay == "linear":
            for optimizer, rate in self.rates:
                optimizer.param_groups[0]["lr"] = rate * self._decay()
        if (end := self.agent.config.tau_end) is not None:
            for target in self.agent.targets.values():
                if isinstance(target.tau, Tensor):
                    target.tau.fill_(self._tau(end))
                else:
                    target.tau = self._tau(end)
        if self.agent.descent.watch.full:
            self.require_finite()
        self.losses |= self.learner.step()  # what is rarer, TD3's actor loss, stays
        self.agent.descent.watch.count(self.step, noted=self.config.compile)
        self.updates += 1

    def require_finite(self) -> None:
        """Read what the agent's guard has noticed; called at log lines and before checkpoints.

        Raises:
            NonFiniteError: A gradient was not finite, and `on_nonfinite` is "stop".
        """
        first_update = self.updates - len(self.agent.descent.watch.env_steps) + 1
        bad = self.agent.descent.watch.read()
        if bad and self.config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"the gradient of {bad[0].network} of seed {self.seeds[bad[0].member]} was not "
                f"finite at gradient step {first_update + bad[0].row}, environment step "
                f"{bad[0].env_step}"
            )
        self.skipped += len({gradient.row for gradient in bad})

    def evaluate(self) -> None:
        """Play the evaluation episodes with the policy of every scheme, or give up if stopped.

        Raises:
            EnvironmentFault: As in `agents.evaluation.play`.
            NonFiniteError: A gradient was not finite.
        """
        weights = {scheme: give() for scheme, give in self.schemes.items()}
        states = {scheme: state for scheme, state in weights.items() if state is not None}
        try:
            self.evaluations = self.play(states, self.eval_seeds)
        except Stopped:
            return  # `run` makes up for it
        for scheme, (returns, lengths) in self.evaluations.items():
            for member, log in enumerate(self.logs):
                log.evaluation(self.step, scheme, returns[member], lengths[member])
        self.evaluated_at = self.step

    def play(
        self, states: Mapping[str, Mapping[str, Tensor]], episodes: NDArray[Any]
    ) -> dict[str, Evaluation]:
        """Play the same episodes with several sets of policy weights, all in one batch.

        Args:
            states: Name -> policy weights [S, ...] by name.
            episodes: Their seeds [S, E].

        Returns:
            Name -> returns and lengths [S, E].

        Raises:
            EnvironmentFault: As in `agents.evaluation.play`.
            NonFiniteError: A gradient was not finite.
            Stopped: `stopping` was set meanwhile.
        """
        self.require_finite()
        policy = stack_members(self.agent.policy, list(states.values()))
        seeds = np.tile(episodes, (len(states), 1))
        result = self.evaluator.evaluate(policy, seeds, lambda: self.stopping)
        shape = (len(states), *episodes.shape)
        both = zip(result.returns.reshape(shape), result.lengths.reshape(shape), strict=True)
        return {name: Evaluation(*each) for name, each in zip(states, both, strict=True)}

    def close(self) -> None:
        """Close every environment."""
        self.envs.close()
        self.evaluator.close()

    @property
    def total_updates(self) -> int:
        """Gradient steps of the whole run."""
        return self._updates_due(0, self.config.total_steps)

    def _updates_due(self, before: int, after: int) -> int:
        """Gradient steps that fall due in the environment steps (before, after]."""
        c = self.agent.config
        first, last = max(before, c.learning_starts), max(after, c.learning_starts)
        return crossings(first, last, c.train_every) * int(c.gradient_steps)

    def _interact(self) -> None:
        obs, skip = self.obs, self.config.on_nonfinite == "skip"
        if self.step == 0 and not skip:
            require_finite(self.envs, 0, obs, obs, np.zeros(len(self.ended)), self.ended)
        seen = np.nan_to_num(obs, posinf=0, neginf=0) if skip else obs
        action = self.explorer(seen, self.step)
        observed, reward, terminated, truncated, info = self.envs.step(
            self.interface.to_env(action.reshape(-1, *action.shape[2:]))
        )
        self.obs = next_obs = self._observations(observed)
        ended = terminated | truncated
        some_ended = np.count_nonzero(ended) > 0
        real = self._all
        if self.autoreset == AutoresetMode.NEXT_STEP:
            real = ~self.ended  # the step after an end only resets: it is no transition at all
        elif some_ended:
            # `observed` already begins the next episode there; the transition ends in the old one
            next_obs, final = next_obs.copy(), info.get("final_obs")
            if final is None:
                raise EnvironmentFault(
                    "a vector environment that resets in the same step must return the last "
                    'observation of an episode in info["final_obs"], and there is none'
                )
            with np.errstate(over="ignore"):  # as in `_observations`
                for i in np.flatnonzero(ended):
                    next_obs.reshape(observed.shape)[i] = final[i]

        stored = real
        if skip:
            stored = real & finite(obs) & finite(next_obs) & finite_reward(reward)
            self.skipped += int((real & ~stored).sum())
            reward = np.nan_to_num(reward, posinf=0, neginf=0)
        else:
            require_finite(self.envs, self.step, self.obs, next_obs, reward, ended)
        by_seed = action.shape[:2]
        ends = reward.reshape(by_seed), terminated.reshape(by_seed)
        transitions: Any = (obs, action, *ends, next_obs)
        if stored is not self._all:  # of one seed
            transitions = [field[:, stored] for field in transitions]
        if transitions[0].size:
            self.replay.add(*transitions)
        self.step += int(np.count_nonzero(real)) // len(self.seeds)
        self.episode_return += reward * real
        self.episode_length += real
        self.ended = ended
        if some_ended:
            self._finish_episodes()

    def _finish_episodes(self) -> None:
        for i in np.flatnonzero(self.ended):
            member = int(i) // self.config.n_envs
            self.latest_return[member] = self.episode_return[i]
            if self.logs and self._episode_shown(member):
                values = {
                    "charts/episodic_return": float(self.episode_return[i]),
                    "charts/episodic_length": float(self.episode_length[i]),
                }
                self.logs[member].scalars(self.step, values)
        self.episode_return[self.ended] = 0
        self.episode_length[self.ended] = 0

    def _episode_shown(self, member: int) -> bool:
        """Whether an episode that ends now is logged: of longer runs some 10,000 are."""
        spacing = self.config.total_steps // EPISODES_SHOWN
        before = int(self.episode_logged_at[member])
        if spacing > 1 and not crossings(before, self.step, spacing):
            return False
        self.episode_logged_at[member] = self.step
        return True

    def _require_as_recorded(self) -> None:
        """Raise RuntimeError where a program would go on with what has been changed."""
        for optimizer, rate in self.rates:
            for group in optimizer.param_groups:
                if group["lr"] != rate:
                    raise RuntimeError(
                        f"compile needs a constant learning rate: it was {rate}, now {group['lr']}"
                    )
                for parameter in group["params"]:
                    _ = parameter.grad  # raises where the network was changed

    def _decay(self) -> float:
        """The share of the learning rate that a linear decay leaves at the next gradient step."""
        c = self.config
        left = 1 - self.updates / (c.lr_decay_until * self.total_updates)
        return max(c.lr_floor, left)

    def _tau(self, end: float) -> float:
        """The weight in the next update of a soft target: on a line from `tau` to its end."""
        tau = self.agent.config.tau
        return tau + self.updates / max(1, self.total_updates) * (end - tau)

    def _log_diagnostics(self) -> None:
        step, now = self.logged_at
        charts = self.agent.charts(self.step)
        if self.config.on_nonfinite == "skip":
            charts["charts/skipped"] = self.skipped
        charts["charts/SPS"] = (self.step - step) / (time.perf_counter() - now)
        if (end := self.agent.config.tau_end) is not None:
            charts["charts/tau"] = self._tau(end)
        self.require_finite()
        tensors = {tag: x.reshape(len(x), -1).mean(1) for tag, x in self.losses.items()}
        for name, target in self.agent.targets.items():
            lag = target.lag(members=True)  # twin critics are two members of a seed
            tensors[f"target/lag/{name}"] = lag.view(len(self.seeds), -1).mean(1)
        for diagnose in self.diagnostics:
            tensors |= {tag: x.float() for tag, x in diagnose().items()}
        columns = list(tensors.values())  # none before the first gradient step without a target
        rows = torch.stack(columns, dim=1).tolist() if columns else [[]] * len(self.seeds)
        self._require_finite_losses(rows)
        for log, row in zip(self.logs, rows, strict=True):
            log.scalars(self.step, charts | dict(zip(tensors, row, strict=True)))
        self.logged_at = (self.step, time.perf_counter())

    def _require_finite_losses(self, rows: Sequence[Sequence[float]]) -> None:
        """Raise NonFiniteError for the newest losses [S][tags], which come first; or let be."""
        for seed, row in zip(self.seeds, rows, strict=True):
            for tag, value in zip(self.losses, row, strict=False):
                if not math.isfinite(value) and self.config.on_nonfinite == "stop":
                    raise NonFiniteError(
                        f"{tag} of seed {seed} is {value} at gradient step {self.updates}, "
                        f"environment step {self.step}"
                    )

    def _observations(self, observed: NDArray[Any]) -> NDArray[Any]:
        dtype, shape = self.interface.obs_dtype, self.interface.obs_shape
        observed = np.asarray(observed)
        if observed.dtype == dtype:
            obs = observed.copy()
        else:
            with np.errstate(over="ignore"):  # what is infinite in float32 is looked for later
                obs = np.array(observed, dtype=dtype)
        return obs.reshape(len(self.seeds), self.config.n_envs, *shape)


def _check_seeds(seeds: tuple[int, ...], logs: tuple[Log, ...], own_envs: bool) -> None:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different integers from 0 up, got {seeds}")
    if logs and len(logs) != len(seeds):
        raise ValueError(f"there must be one log per seed, {len(seeds)}, got {len(logs)}")
    if own_envs and len(seeds) > 1:
        raise ValueError(f"a vector environment of your own trains one seed, got {len(seeds)}")


def _check_compile(config: TrainConfig, device: torch.device) -> None:
    if config.lr_decay != "constant":
        raise ValueError(f"compile needs a constant learning rate, got {config.lr_decay!r}")
    if device.type == "cpu":
        require_compiler()
