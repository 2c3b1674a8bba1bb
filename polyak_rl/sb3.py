"""Stable-Baselines3: weight averaging for any of its algorithms, in three lines.

.. code-block:: python

    from polyak_rl.sb3 import PolyakAveragingCallback, save_averaged

    model = SAC("MlpPolicy", "Pendulum-v1")
    model.learn(10_000, callback=PolyakAveragingCallback())
    save_averaged(model, "tail50", "sac_pendulum_averaged")     # SAC.load opens it

What is averaged is the network that acts, after every step of its optimizer (a callback's
``_on_step`` would see the weights of before): the actor of SAC, TD3 and DDPG, the Q network of DQN,
and the whole policy of PPO and A2C, whose actor and critic may share layers and one optimizer.
Training is the same, bit for bit, with averaging and without.

``VecNormalize``: its statistics belong to the environment and are not averaged. An average is
evaluated and saved with the statistics of that moment, as the last policy is, and
:func:`save_averaged` writes them beside the zip.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import polyak_update as sb3_polyak_update
from stable_baselines3.common.vec_env import (
    VecEnv,
    sync_envs_normalization,
    unwrap_vec_normalize,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from polyak_rl.choose import Choice, choose, one_by_one
from polyak_rl.files import write_whole
from polyak_rl.pairing import unwrap, walk
from polyak_rl.recorder import PolicyAverages
from polyak_rl.rules import Between, Ema, Rule, Tail, Uniform
from polyak_rl.target import soft_update

_EVALUATION, _SHIPPING = 0x5B3, 0x5B4  # set these seeds apart from others made of the training seed
_TAILS = (5, 10, 25, 50)  # per cent of the run

RULES: Mapping[str, Rule] = {
    "uniform": Uniform(),
    "tail50": Tail(0.5),
    "ema": Ema(half_life=1000),
}
"""The averages that are kept where no others are asked for."""


def acting_network(model: BaseAlgorithm) -> tuple[nn.Module, Optimizer]:
    """The network that acts and the optimizer that trains it.

    Args:
        model: any algorithm of Stable-Baselines3 or sb3-contrib that has an optimizer.

    Raises:
        ValueError: the policy has no optimizer.

    Example:
        >>> from stable_baselines3 import DQN
        >>> model = DQN("MlpPolicy", "CartPole-v1", buffer_size=100, device="cpu")
        >>> network, optimizer = acting_network(model)
        >>> network is model.q_net
        True
    """
    policy = model.policy
    # SAC, TD3, DDPG; DQN; QR-DQN. Elsewhere one optimizer trains one network.
    named = (getattr(policy, name, None) for name in ("actor", "q_net", "quantile_net"))
    acting = next((network for network in named if isinstance(network, nn.Module)), policy)
    for owner in (acting, policy):
        optimizer = getattr(owner, "optimizer", None)
        if isinstance(optimizer, Optimizer):
            return acting, optimizer
    raise ValueError(
        f"the policy of {type(model).__name__} has no optimizer, whose steps averages count"
    )


# Not an attribute of the model, which model.save() would pickle. Nothing in PolicyAverages refers
# to the model, so that it can be collected.
_averages: weakref.WeakKeyDictionary[BaseAlgorithm, PolicyAverages] = weakref.WeakKeyDictionary()
# When the learn() began that last kept them.
_learns: weakref.WeakKeyDictionary[BaseAlgorithm, float] = weakref.WeakKeyDictionary()


def averages_of(model: BaseAlgorithm) -> PolicyAverages:
    """The averages that the last :class:`PolyakAveragingCallback` keeps of a model.

    Raises:
        ValueError: the model was never trained with one.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu")
        >>> _ = model.learn(64, callback=PolyakAveragingCallback())
        >>> list(averages_of(model).rules)
        ['uniform', 'tail50', 'ema']
    """
    if model not in _averages:
        raise ValueError(
            "the model has no averages: train it with "
            "model.learn(..., callback=PolyakAveragingCallback())"
        )
    return _averages[model]


class PolyakAveragingCallback(BaseCallback):
    """Keeps averages of the policy's weights while a model learns.

    .. math:: \\bar\\theta \\leftarrow \\bar\\theta + w\\,(\\theta - \\bar\\theta)
       \\quad\\text{after each step of the optimizer of the network that acts}

    The clock counts the steps of that optimizer: PPO's default is 320 of them a rollout, SAC's one
    an update, TD3's one every second update. Another ``learn`` of the same model with the same
    callback goes on where the last one ended.

    Args:
        rules: the averages by name; by default uniform over all iterates (``"uniform"``), uniform
            over the last half of the run so far (``"tail50"``), and exponential with a half-life of
            1000 gradient steps (``"ema"``).
        timeline: record the whole course of the weights, which answers for ``Tail``, ``Between``
            and rules chosen afterwards. It takes ``8 * capacity`` bytes a weight.
        capacity: the segments of the timeline; None: 256, or as many as 1 GiB holds.
        every: take an iterate at every N-th gradient step.

    Attributes:
        averages: the :class:`PolicyAverages`, from the start of ``learn`` on.

    Raises:
        ValueError: at the start of ``learn``: a model whose policy has no optimizer, rules that
            cannot be kept, or another model than before.

    References:
        Polyak & Juditsky 1992, SIAM Journal on Control and Optimization 30(4); Nikishin et al.
        2018, "Improving stability in deep reinforcement learning with weight averaging", UAI
        workshop on uncertainty in deep learning.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from polyak_rl.sb3 import PolyakAveragingCallback
        >>> averaging = PolyakAveragingCallback()
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu")
        >>> _ = model.learn(64, callback=averaging)
        >>> averaging.averages.clock                 # one minibatch of 64
        1
        >>> observation = model.get_env().reset()
        >>> with averaging.averages.applied("uniform"):
        ...     action, _ = model.predict(observation)
    """

    averages: PolicyAverages

    def __init__(
        self,
        rules: Mapping[str, Rule] = RULES,
        *,
        timeline: bool = True,
        capacity: int | None = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        self.rules = dict(rules)
        self._options: dict[str, Any] = {"timeline": timeline, "capacity": capacity, "every": every}
        self._unhook: Callable[[], object] = lambda: None
        self._learning: float = 0  # when the learn() began that this callback is part of

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the averages to a file of tensors and plain values, beside ``model.save``."""
        self.averages.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: BaseAlgorithm) -> PolyakAveragingCallback:
        """Read averages that :meth:`save` wrote, to go on with them as ``model`` learns.

        Args:
            path: the file. It is read as data; a pickle that would run code is refused.
            model: the model that they are of, as ``SAC.load`` and its like return it.

        Raises:
            ValueError: the file holds no averages, or those of another network.
        """
        averages = PolicyAverages.load(path, acting_network(model)[0])
        callback = cls(averages.rules)
        callback.averages = _averages[model] = averages
        return callback

    def _init_callback(self) -> None:
        network, _ = acting_network(self.model)
        if not hasattr(self, "averages"):
            self.averages = PolicyAverages(network, self.rules, **self._options)
        elif self.averages.network is not network:
            raise ValueError(
                "this callback keeps the averages of another model: make a new "
                "PolyakAveragingCallback, or read saved averages with its load()"
            )
        _averages[self.model], _learns[self.model] = self.averages, self.model.start_time

    def _on_training_start(self) -> None:
        self._unhook()  # a learn() that was interrupted has left it
        self._learning = self.model.start_time
        # Of every optimizer: the model's own may be replaced while it learns.
        # By a weak reference: an interrupted learn() must not keep the callback alive.
        after_step = weakref.WeakMethod(self._after_step)

        def hook(optimizer: Optimizer, *_: object) -> None:
            if (found := after_step()) is not None:
                found(optimizer)

        handle = register_optimizer_step_post_hook(hook)
        self._unhook = weakref.finalize(self, handle.remove)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._unhook()

    def _after_step(self, optimizer: Optimizer) -> None:
        """Take the weights in if the step was the acting network's, in this very ``learn``."""
        if self.model.start_time != self._learning:
            return  # ours was interrupted, and this is another one, without this callback
        network, current = acting_network(self.model)
        if optimizer is not current:
            return
        if network is not self.averages.network:
            raise ValueError(
                "the network that acts was replaced while the model learns: its averages are of "
                "the one before"
            )
        self.averages.record()


class AveragedEvalCallback(EvalCallback):
    """SB3's ``EvalCallback`` for the last policy and for every average, on common seeds.

    The last policy is evaluated, logged (``eval/mean_reward``) and saved as ``EvalCallback`` does
    it. For each average there are ``eval/<average>/mean_reward`` and ``mean_ep_length`` beside it,
    and ``<log_path>/<average>/evaluations.npz`` of the same format.

    Each evaluation seeds ``eval_env`` anew and alike, so that policies are compared episode by
    episode. An average that the timeline is too coarse for at that moment is left out of that
    evaluation. Action masks (sb3-contrib's ``MaskablePPO``) are those of ``eval_env``.

    In environments that draw random numbers between their resets this holds for the first
    episode of each sub-environment: give those as many sub-environments as episodes. Training's
    random numbers are not touched, also where ``deterministic=False``. ``VecNormalize``
    statistics are those of training at that moment, for all policies.

    Args:
        eval_env: another environment than the one trained on, wrapped as that one is.
        seed: of the evaluation episodes; by default it is made from the model's own seed, so
            that each run has episodes of its own.
        options: those of ``EvalCallback``.

    Raises:
        ValueError: at the start of ``learn`` without a :class:`PolyakAveragingCallback`, or where a
            model acts by masks and ``eval_env`` has none.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from stable_baselines3.common.env_util import make_vec_env
        >>> from polyak_rl.sb3 import AveragedEvalCallback, PolyakAveragingCallback
        >>> evaluation = AveragedEvalCallback(
        ...     make_vec_env("CartPole-v1"), eval_freq=64, n_eval_episodes=2, verbose=0
        ... )
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu")
        >>> _ = model.learn(64, callback=[PolyakAveragingCallback(), evaluation])
        >>> sorted(evaluation.averaged)
        ['ema', 'tail50', 'uniform']
    """

    def __init__(
        self, eval_env: gym.Env[Any, Any] | VecEnv, *, seed: int | None = None, **options: Any
    ) -> None:
        super().__init__(eval_env, **options)
        self.seed = seed
        self.averaged: dict[str, dict[str, list[Any]]] = {}  # what evaluations.npz holds, by name

    def _on_training_start(self) -> None:
        super()._on_training_start()
        averages_of(self.model)  # an error now rather than at the first evaluation
        if _learns.get(self.model) != self.model.start_time:
            raise ValueError(
                "the averages of this model stand still in this learn(): give it a "
                "PolyakAveragingCallback too"
            )
        _require_masks(self.model, self.eval_env)
        if self.seed is None:
            entropy = None if self.model.seed is None else (_EVALUATION, self.model.seed)
            self.seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq:
            return True
        averages = averages_of(self.model)
        for name in averages.rules:  # first, since EvalCallback dumps the log
            if averages.ready(name):
                self._evaluate(name)
        with self._common_start():
            return super()._on_step()

    def _evaluate(self, name: str) -> None:
        self._is_success_buffer = []
        with self._common_start(), averages_of(self.model).applied(name):
            rewards, lengths = evaluate_policy(
                self.model,
                self.eval_env,
                n_eval_episodes=self.n_eval_episodes,
                deterministic=self.deterministic,
                render=self.render,
                callback=self._log_success_callback,
                return_episode_rewards=True,
                warn=self.warn,
            )
        results: dict[str, Any] = {
            "timesteps": self.num_timesteps,
            "results": rewards,
            "ep_lengths": lengths,
        }
        self.logger.record(f"eval/{name}/mean_reward", float(np.mean(rewards)))
        self.logger.record(f"eval/{name}/mean_ep_length", float(np.mean(lengths)))
        if self._is_success_buffer:
            results["successes"] = self._is_success_buffer
            self.logger.record(f"eval/{name}/success_rate", float(np.mean(results["successes"])))
        kept = self.averaged.setdefault(name, {})
        for key, value in results.items():
            kept.setdefault(key, []).append(value)
        if self.log_path is not None:
            folder = Path(self.log_path).parent / name
            folder.mkdir(exist_ok=True)
            np.savez(folder / "evaluations.npz", **kept)  # type: ignore[arg-type]

    @contextmanager
    def _common_start(self) -> Iterator[None]:
        """Evaluation starts alike for every policy, and training goes on as if it had not been."""
        assert self.seed is not None
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        self.eval_env.seed(self.seed)
        actions = self.model.action_space.np_random.bit_generator  # DQN explores with it
        kept = random.getstate(), np.random.get_state(), actions.state  # noqa: NPY002
        device = self.model.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _masked(self.model, self.eval_env),
        ):
            random.seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002
            torch.manual_seed(self.seed)
            actions.state = np.random.PCG64(self.seed).state
            try:
                yield
            finally:
                random.setstate(kept[0])
                np.random.set_state(kept[1])  # noqa: NPY002
                actions.state = kept[2]


def _takes_masks(model: BaseAlgorithm) -> bool:
    return "action_masks" in inspect.signature(model.predict).parameters


def _require_masks(model: BaseAlgorithm, env: VecEnv) -> None:
    if _takes_masks(model) and not env.has_attr("action_masks"):
        raise ValueError(
            f"{type(model).__name__} acts by masks: the environment to evaluate in needs the "
            "method action_masks(), as sb3-contrib's ActionMasker adds it"
        )


@contextmanager
def _masked(model: BaseAlgorithm, env: VecEnv) -> Iterator[None]:
    """A model that acts by masks takes those of an environment, whoever asks it for actions."""
    if not _takes_masks(model):
        yield
        return
    predict: Callable[..., Any] = model.predict

    def masked(*args: Any, **options: Any) -> Any:
        return predict(*args, action_masks=np.stack(env.env_method("action_masks")), **options)

    model.predict = masked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.predict


def save_averaged(model: BaseAlgorithm, which: str | Rule, path: str | os.PathLike[str]) -> None:
    """Write a model with averaged weights as an ordinary SB3 zip, which ``SAC.load`` opens.

    Only the network that acts is averaged: critics, target networks and the state of the optimizers
    are those of the model, which is not touched. If its environment is a ``VecNormalize``, the
    statistics of now are written to ``<path>_vecnormalize.pkl``, because an SB3 zip does not hold
    them; ``VecNormalize.load`` reads them.

    Args:
        model: a model that was trained with :class:`PolyakAveragingCallback`.
        which: the name of an average, or a rule for the timeline.
        path: the zip; SB3 adds ``.zip`` where there is no suffix.

    Raises:
        ValueError: the model has no averages, or not this one.

    Example:
        >>> import tempfile
        >>> from stable_baselines3 import PPO
        >>> from polyak_rl.sb3 import PolyakAveragingCallback, save_averaged
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, device="cpu")
        >>> _ = model.learn(64, callback=PolyakAveragingCallback())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_averaged(model, "uniform", f"{folder}/averaged")
        ...     averaged = PPO.load(f"{folder}/averaged", device="cpu")
    """
    averages = averages_of(model)
    average = averages.average(which)
    averaged = {
        id(tensor): average[name].to(tensor.dtype)
        for name, tensor, *_ in walk(averages.network)
        if name in average
    }
    parameters = model.get_parameters()
    # By tensor, not by name: a policy may list a network, or a part that is shared, several times.
    for name, tensor in unwrap(model.policy).state_dict(keep_vars=True).items():
        if id(tensor) in averaged:
            parameters["policy"][name] = averaged[id(tensor)]
    twin = copy.copy(model)
    twin.get_parameters = lambda: parameters  # type: ignore[method-assign]
    twin.save(Path(path), exclude=["get_parameters"])
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        normalizer.save(f"{os.fspath(path).removesuffix('.zip')}_vecnormalize.pkl")


def ship(
    model: BaseAlgorithm,
    env: gym.Env[Any, Any] | VecEnv,
    *,
    episodes: int = 60,
    worst: float = 1.0,
    path: str | os.PathLike[str] | None = None,
    start: int = 0,
) -> Choice:
    """Choose which weights of a trained model to ship, and write them as an ordinary SB3 zip.

    Candidates are the last iterate, the averages that the model's callback keeps, the tails of 5,
    10, 25 and 50 % of the run, and the nine windows of 5 % before the last one, which stand for
    checkpoints; what the timeline is too coarse for is left out. :func:`polyak_rl.choose` does the
    rest: it keeps ``tail25`` unless that is beaten, and values the winner on fresh episodes.

    Each candidate acts deterministically, in episodes that are the same for all. Action masks are
    those of ``env``; rewards are those before any normalisation or shaping, as in SB3's evaluation.

    Args:
        model: trained with a :class:`PolyakAveragingCallback` that has a timeline.
        env: another environment than the one trained on, wrapped as that one is; its
            sub-environments play side by side. A ``VecNormalize`` gets the statistics of training.
        episodes: the budget to choose with, counted over all candidates; 0 takes ``tail25``.
        worst: the criterion is the mean of this share of the episodes, the worst ones.
        path: the zip, as in :func:`save_averaged`; the choice is written to ``<path>.json``. None
            writes nothing.
        start: the first episode; ``Choice.next_start`` of an earlier choice to play none twice.

    Returns:
        The choice; ``print`` shows it.

    Raises:
        ValueError: the model has no averages or no timeline, the environments are wrapped
            differently, a model that acts by masks gets none from ``env``, or what
            :func:`polyak_rl.choose` refuses.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from stable_baselines3.common.env_util import make_vec_env
        >>> from polyak_rl.sb3 import PolyakAveragingCallback, ship
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, seed=1, device="cpu")
        >>> _ = model.learn(256, callback=PolyakAveragingCallback())
        >>> choice = ship(model, make_vec_env("CartPole-v1"), episodes=0)
        >>> choice.winner
        'tail25'
    """
    averages = averages_of(model)
    rules: dict[str, str | Rule] = {"last": "last", **{f"tail{p}": Tail(p / 100) for p in _TAILS}}
    rules |= {f"window{p}": Between((p - 5) / 100, p / 100) for p in range(95, 50, -5)}
    rules |= {name: name for name in averages.rules}
    candidates: dict[str, Any] = {
        name: rule for name, rule in rules.items() if averages.ready(rule)
    }
    venv = model._wrap_env(env, monitor_wrapper=True)
    _require_masks(model, venv)
    _share_statistics(model, venv)
    entropy = (_SHIPPING, model.seed or 0)
    first = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)  # room to count on

    def play(which: str | Rule, numbers: range) -> list[float]:
        with averages.applied(which), _masked(model, venv):
            return _returns(model, venv, [first + number for number in numbers])

    prior = "tail25" if "tail25" in candidates else "last"
    choice = choose(
        candidates, one_by_one(play), budget=episodes, prior=prior, worst=worst, start=start
    )
    if path is not None:
        save_averaged(model, candidates[choice.winner], path)
        record = json.dumps(dataclasses.asdict(choice), indent=1) + "\n"
        with write_whole(f"{os.fspath(path).removesuffix('.zip')}.json") as file:
            file.write(record.encode())
    return choice


def _share_statistics(model: BaseAlgorithm, env: VecEnv) -> None:
    """Evaluate with training's normalisation of observations, and count rewards as they are."""
    normalizer = unwrap_vec_normalize(env)
    trained = model.get_vec_normalize_env()
    if (normalizer is None) != (trained is None):
        one, other = ("that of training", "env") if trained else ("env", "that of training")
        raise ValueError(f"{one} is a VecNormalize and {other} is none: wrap both alike")
    if normalizer is not None and trained is not None:
        try:
            sync_envs_normalization(trained, env)
        except AssertionError as error:
            raise ValueError(f"wrap env as the environment of training is: {error}") from error
        normalizer.training = normalizer.norm_reward = False


def _returns(model: BaseAlgorithm, env: VecEnv, seeds: Sequence[int]) -> list[float]:
    """The return of one deterministic episode for each seed, as many at once as there is room."""
    returns: list[float] = []
    while len(returns) < len(seeds):
        env.seed(seeds[len(returns)])  # and those after it
        obs: Any = env.reset()
        states, starts = None, np.ones(env.num_envs, dtype=bool)
        totals, ended = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=bool)
        wanted = slice(min(env.num_envs, len(seeds) - len(returns)))
        while not ended[wanted].all():
            actions, states = model.predict(
                obs, state=states, episode_start=starts, deterministic=True
            )
            obs, rewards, starts, infos = env.step(actions)
            totals += np.where(ended, 0.0, rewards)
            for i in np.flatnonzero(starts & ~ended):
                # a Monitor's is that of before any wrapper changed the rewards
                totals[i] = infos[i].get("episode", {"r": totals[i]})["r"]
            ended |= starts
        returns += totals[wanted].tolist()
    return returns


class fast_polyak_update:
    """Replaces SB3's ``polyak_update`` by :func:`polyak_rl.soft_update` until the block ends.

    .. math:: \\theta' \\leftarrow \\tau\\,\\theta + (1 - \\tau)\\,\\theta'

    Every module that has imported it is served, those of Stable-Baselines3 and others. Results
    agree up to rounding, and copies (``tau=1``) bit for bit. The tensors are matched and checked
    once for each pair of networks, then moved by one call instead of two a tensor.

    Called as a function it takes effect at once and stays until :meth:`undo`; as a context manager
    it is undone at the end of the block, also by an exception.

    Example:
        >>> import stable_baselines3.sac.sac as sac
        >>> original = sac.polyak_update
        >>> with fast_polyak_update():
        ...     sac.polyak_update is original       # model.learn(...) goes here
        False
        >>> sac.polyak_update is original
        True
    """

    def __init__(self) -> None:
        # soft_update keeps what it has checked by module. TD3 has four pairs: eight networks.
        self._network = lru_cache(maxsize=16)(_as_module)
        self._replacement = self._update
        _replace_everywhere(sb3_polyak_update, self._replacement)

    def __enter__(self) -> fast_polyak_update:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Put SB3's function back, also where the replacement was imported meanwhile."""
        _replace_everywhere(self._replacement, sb3_polyak_update)
        self._network.cache_clear()

    def _update(
        self, params: Iterable[Tensor], target_params: Iterable[Tensor], tau: float
    ) -> None:
        """SB3's signature: the online network comes first."""
        online, target = tuple(params), tuple(target_params)
        if online or target:  # batch-norm statistics of networks that have none
            soft_update(self._network(target), self._network(online), tau, buffers="average")


def _as_module(tensors: tuple[Tensor, ...]) -> nn.Module:
    """A module that holds these very tensors, under their positions as names."""
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(f"[{i}]", tensor)
    return module


def _replace_everywhere(old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        members = getattr(module, "__dict__", {})
        if members.get("polyak_update") is old:
            members["polyak_update"] = new
