import csv
import gc
import json
import sys
import weakref
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.utils as sb3_utils
import stable_baselines3.dqn.dqn as sb3_dqn
import stable_baselines3.sac.sac as sb3_sac
import stable_baselines3.td3.td3 as sb3_td3
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn

from polyak_rl import Between, Choice, Ema, Tail, Uniform
from polyak_rl.sb3 import (
    AveragedEvalCallback,
    PolyakAveragingCallback,
    acting_network,
    averages_of,
    fast_polyak_update,
    save_averaged,
    ship,
)

OFF_POLICY = {"learning_starts": 20, "batch_size": 16, "buffer_size": 1000}

# algorithm, environment, options, environment steps, gradient steps of the network that acts
CASES = {
    "ppo": (PPO, "CartPole-v1", {"n_steps": 32, "batch_size": 16, "n_epochs": 3}, 96, 18),
    "a2c": (A2C, "CartPole-v1", {"n_steps": 5}, 60, 12),
    "dqn": (DQN, "CartPole-v1", {**OFF_POLICY, "target_update_interval": 7}, 80, 15),
    "sac": (SAC, "Pendulum-v1", OFF_POLICY, 60, 40),
    "td3": (TD3, "Pendulum-v1", OFF_POLICY, 60, 20),
    "ddpg": (DDPG, "Pendulum-v1", OFF_POLICY, 60, 40),
}


def make(case, env=None, **options):
    algorithm, env_id, own, *_ = CASES[case]
    small = {"policy_kwargs": {"net_arch": [16, 16]}, "device": "cpu", "seed": 3}
    return algorithm("MlpPolicy", env or env_id, **{**small, **own, **options})


def eval_env(case, n_envs=1):
    return make_vec_env(CASES[case][1], n_envs)


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def same(ours, theirs):
    """Equal bit for bit, at any depth."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours == theirs


def record_steps(model):
    """The weights after each optimizer step, by a way of its own: the step itself is wrapped."""
    network, optimizer = acting_network(model)
    iterates, step = [], optimizer.step

    def recorded(*args, **kwargs):
        result = step(*args, **kwargs)
        iterates.append({name: w.double() for name, w in weights(network).items()})
        return result

    optimizer.step = recorded
    return iterates


def mean(iterates):
    return {name: torch.stack([x[name] for x in iterates]).mean(0) for name in iterates[0]}


def assert_close(network, expected):
    assert dict(network.named_parameters()).keys() == expected.keys()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-7
        )


def next_draws(model):
    """What training would draw next."""
    return [
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),  # noqa: NPY002
        model.action_space.sample().tolist(),
    ]


class Interrupt(BaseCallback):
    """Ctrl-C after some calls."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def _on_step(self):
        if self.n_calls == self.after:
            raise KeyboardInterrupt
        return True


class Midway(BaseCallback):
    """Does something to the model after some calls."""

    def __init__(self, after, what):
        super().__init__()
        self.after, self.what = after, what

    def _on_step(self):
        if self.n_calls == self.after:
            self.what(self.model)
        return True


class Parity(gym.Env):
    """Five steps; only the action that the mask leaves gives a reward."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        reward = float(self.action_masks()[action])
        self.time += 1
        return np.full(1, self.time / 5, dtype=np.float32), reward, self.time == 5, False, {}

    def action_masks(self):
        return np.arange(5) == self.time % 5


class Coin(gym.Env):
    """Five tosses; the reward is random inside the episode, and guessing right is a success."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.tosses = 0
        return self.observation_space.low, {}

    def step(self, action):
        self.tosses += 1
        toss = self.np_random.random()
        obs = np.array([toss, -toss], dtype=np.float32)
        return obs, float(toss), self.tosses == 5, False, {"is_success": bool(toss > 0.5)}


# --- what is averaged ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_of_the_weights_after_each_step_of_the_acting_network(case):
    *_, steps, updates = CASES[case]
    model, averaging = make(case), PolyakAveragingCallback()
    iterates = record_steps(model)
    model.learn(steps, callback=averaging)

    assert len(iterates) == updates == averaging.averages.clock
    online = weights(averaging.averages.network)
    with averaging.averages.applied("uniform") as network:
        assert_close(network, mean(iterates))
    with averaging.averages.applied("tail50") as network:
        assert_close(network, mean(iterates[-(updates // 2) :]))
    with averaging.averages.applied(Tail(1 / updates)) as network:
        assert_close(network, iterates[-1])
    assert same(weights(averaging.averages.network), online)


def test_what_acts_is_the_actor_the_q_network_or_the_whole_policy():
    sac, dqn, ppo = make("sac"), make("dqn"), make("ppo")
    assert acting_network(sac) == (sac.actor, sac.actor.optimizer)
    assert acting_network(dqn) == (dqn.q_net, dqn.policy.optimizer)
    assert acting_network(ppo) == (ppo.policy, ppo.policy.optimizer)
    del ppo.policy.optimizer
    with pytest.raises(ValueError, match="the policy of PPO has no optimizer"):
        acting_network(ppo)


def test_an_iterate_is_taken_at_every_nth_gradient_step():
    model = make("sac")
    iterates = record_steps(model)
    model.learn(60, callback=PolyakAveragingCallback({"mean": Uniform()}, every=7, timeline=False))
    with averages_of(model).applied("mean") as network:
        assert_close(network, mean(iterates[6::7]))


# --- training is not touched ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "deterministic"), [*((case, True) for case in CASES), ("dqn", False), ("sac", False)]
)
def test_training_is_bit_identical_with_and_without_the_callbacks(case, deterministic):
    ends = []
    for averaged in (False, True):
        env = eval_env(case)  # make_vec_env draws a random number: before the model sets the seeds
        model, callbacks = make(case), None
        if averaged:
            evaluation = AveragedEvalCallback(
                env,
                eval_freq=25,
                n_eval_episodes=2,
                verbose=0,
                deterministic=deterministic,
            )
            callbacks = [PolyakAveragingCallback(), evaluation]
        model.learn(CASES[case][3], callback=callbacks)
        ends.append((model.get_parameters(), next_draws(model)))
    assert len(evaluation.averaged["ema"]["results"]) >= 2
    assert same(*ends)


@pytest.mark.parametrize(
    ("algorithm", "env_id", "steps"),
    [(PPO, "CartPole-v1", 2048), (DQN, "CartPole-v1", 400), (SAC, "Pendulum-v1", 130)],
)
def test_the_documentation_s_examples_gain_averaging_by_three_lines(
    algorithm, env_id, steps, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ends = []
    for averaged in (False, True):
        env = gym.make(env_id)
        model = algorithm("MlpPolicy", env, verbose=0, seed=0, device="cpu")
        if averaged:
            model.learn(total_timesteps=steps, callback=PolyakAveragingCallback())
            save_averaged(model, "tail50", "averaged")
        else:
            model.learn(total_timesteps=steps)
        ends.append((model.get_parameters(), next_draws(model)))
    assert same(*ends)
    assert averages_of(model).clock > 0
    algorithm.load("averaged", device="cpu")


def test_the_hook_leaves_with_training_and_an_interrupted_training_does_not_count_twice():
    model, averaging = make("sac"), PolyakAveragingCallback(timeline=False, rules={"m": Uniform()})
    iterates = record_steps(model)
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=[averaging, Interrupt(after=40)])
    model.learn(60, callback=averaging)
    assert averaging.averages.clock == len(iterates) > 40
    with averaging.averages.applied("m") as network:
        assert_close(network, mean(iterates))
    taken = averaging.averages.clock
    model.train(gradient_steps=1, batch_size=4)
    assert averaging.averages.clock == taken


@pytest.mark.parametrize("case", ["sac", "ppo"])
def test_an_optimizer_that_is_replaced_while_the_model_learns_goes_on_being_counted(case):
    def replace(model):
        network, optimizer = acting_network(model)
        owner = network if hasattr(network, "optimizer") else model.policy
        owner.optimizer = torch.optim.AdamW(network.parameters(), lr=optimizer.defaults["lr"])
        iterates.extend(before)
        after.extend([record_steps(model)])

    model, averaging = make(case), PolyakAveragingCallback()
    before, iterates, after = record_steps(model), [], []
    *_, steps, updates = CASES[case]
    model.learn(steps, callback=[averaging, Midway(after=50, what=replace)])
    iterates += after[0]
    assert 0 < len(before) < len(iterates) == updates == averaging.averages.clock
    with averaging.averages.applied("uniform") as network:
        assert_close(network, mean(iterates))


def test_other_optimizers_and_other_models_are_not_counted():
    model, other, averaging = make("sac"), make("sac", seed=4), PolyakAveragingCallback()
    learn = Midway(after=30, what=lambda model: other.learn(40))
    model.learn(60, callback=[averaging, learn])
    assert averaging.averages.clock == CASES["sac"][4]


def test_a_later_learn_without_the_callback_is_not_counted_after_an_interrupted_one():
    model, averaging = make("sac"), PolyakAveragingCallback()
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=[averaging, Interrupt(after=40)])
    taken = averaging.averages.clock
    assert taken > 0
    model.learn(60)
    assert averaging.averages.clock == taken


def test_a_network_that_is_replaced_while_the_model_learns_is_refused():
    def replace(model):
        model.actor = model.policy.actor = model.policy.make_actor()
        model.actor.optimizer = torch.optim.Adam(model.actor.parameters())

    with pytest.raises(ValueError, match="the network that acts was replaced"):
        make("sac").learn(60, callback=[PolyakAveragingCallback(), Midway(30, replace)])


def test_a_large_policy_gets_fewer_segments_by_default():
    model = make("ppo", policy_kwargs={"net_arch": [560, 560]}, n_steps=16)
    model.learn(16, callback=PolyakAveragingCallback())
    size = sum(p.numel() for p in model.policy.parameters())
    timeline = averages_of(model).timeline
    assert timeline.capacity < 256
    assert timeline.nbytes <= 1 << 30 < timeline.nbytes + 16 * size


def test_a_model_with_averages_is_collected():
    model = make("ppo")
    model.learn(32, callback=PolyakAveragingCallback())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "which"),
    [
        ("ppo", "uniform"),
        ("ppo", "ema"),
        ("dqn", "tail50"),
        ("sac", Ema(half_life=5)),
        ("td3", Tail(0.25)),
    ],
)
def test_the_averaged_zip_evaluates_to_the_same_numbers(case, which, tmp_path):
    algorithm, _, _, steps, _ = CASES[case]
    model = make(case, learning_rate=0.01)
    model.learn(steps, callback=PolyakAveragingCallback())
    before = model.get_parameters()
    before = {
        name: {k: torch.as_tensor(v).clone() for k, v in state.items()}
        for name, state in before.items()
        if name == "policy"
    }
    save_averaged(model, which, tmp_path / "averaged")
    assert same(model.get_parameters()["policy"], before["policy"])
    assert "get_parameters" not in vars(model)

    loaded = algorithm.load(tmp_path / "averaged", device="cpu")
    env, results = eval_env(case), []
    with averages_of(model).applied(which):
        expected = weights(averages_of(model).network)
        for agent in (model, loaded):
            env.seed(5)
            results.append(evaluate_policy(agent, env, 2, return_episode_rewards=True))
    assert results[0] == results[1]

    acting = weights(acting_network(loaded)[0])
    assert same(acting, expected)
    assert not same(acting, weights(acting_network(model)[0]))
    rest = ("critic.", "critic_target.", "actor_target.", "q_net_target.")
    for name, tensor in loaded.policy.state_dict().items():
        if name.startswith(rest):
            assert torch.equal(tensor, before["policy"][name])
    assert same(loaded.get_parameters().keys(), model.get_parameters().keys())
    loaded.set_env(env)
    loaded.learn(40)  # an ordinary model: it trains on


class Hidden(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=8)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()
        )

    def forward(self, observations):
        return self.net(observations)


def test_a_shared_features_extractor_is_averaged_under_all_its_names(tmp_path):
    model = make(
        "sac",
        policy_kwargs={
            "net_arch": [8],
            "features_extractor_class": Hidden,
            "share_features_extractor": True,
        },
    )
    model.learn(60, callback=PolyakAveragingCallback())
    save_averaged(model, "uniform", tmp_path / "averaged.zip")
    loaded = SAC.load(tmp_path / "averaged.zip", device="cpu")
    with averages_of(model).applied("uniform"):
        expected = weights(model.actor)
        for save in (
            model.save,
            model.critic.save,
            lambda path: save_averaged(model, "uniform", path),
        ):
            with pytest.raises(RuntimeError, match=r"inside applied\(\).* save_averaged\(\)"):
                save(tmp_path / "never.zip")
    assert not (tmp_path / "never.zip").exists()
    assert same(weights(loaded.actor), expected)
    assert loaded.critic.features_extractor is loaded.actor.features_extractor
    statistics = dict(model.actor.features_extractor.named_buffers())
    assert same(dict(loaded.actor.features_extractor.named_buffers()), statistics)


def test_vec_normalize_statistics_are_those_of_the_moment_and_saved_beside_the_zip(tmp_path):
    def normalized(**options):
        return VecNormalize(make_vec_env("Pendulum-v1", seed=1), **options)

    ends = []
    for averaged in (False, True):
        env, callbacks = normalized(), None
        model = make("sac", env, learning_starts=45)
        if averaged:
            evaluation = AveragedEvalCallback(
                normalized(training=True, norm_reward=False),
                eval_freq=30,
                n_eval_episodes=1,
                verbose=0,
            )
            callbacks = [PolyakAveragingCallback(), evaluation]
        model.learn(60, callback=callbacks)
        ends.append((model.get_parameters(), env.obs_rms.mean.tolist(), env.obs_rms.count))
    # At 30 steps nothing was learnt: all policies are one, though the environment's own statistics
    # move as it is evaluated on.
    first = [kept["results"][0] for kept in evaluation.averaged.values()]
    assert first[0] == first[1] == first[2]
    assert same(*ends)

    save_averaged(model, "uniform", tmp_path / "averaged.zip")
    statistics = tmp_path / "averaged_vecnormalize.pkl"
    loaded_env = VecNormalize.load(statistics, make_vec_env("Pendulum-v1"))
    loaded_env.training = loaded_env.norm_reward = False
    assert loaded_env.obs_rms.mean.tolist() == env.obs_rms.mean.tolist()
    loaded = SAC.load(tmp_path / "averaged", loaded_env, device="cpu")
    loaded_env.seed(evaluation.seed)
    # The last evaluation was at the last step, before its gradient step: evaluate anew.
    ours, _ = evaluate_policy(loaded, loaded_env, 2, return_episode_rewards=True)
    env.training = env.norm_reward = False
    env.seed(evaluation.seed)
    with averages_of(model).applied("uniform"):
        theirs, _ = evaluate_policy(model, env, 2, return_episode_rewards=True)
    assert ours == theirs


# --- evaluation -----------------------------------------------------------------------------------


def test_last_and_averages_are_logged_and_filed_by_name(tmp_path):
    model = make("ppo", learning_rate=0.05)
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    evaluation = AveragedEvalCallback(
        eval_env("ppo"),
        eval_freq=40,
        n_eval_episodes=3,
        verbose=0,
        log_path=str(tmp_path / "eval"),
        best_model_save_path=str(tmp_path / "best"),
    )
    # The order of the callbacks does not matter.
    model.learn(96, callback=[evaluation, PolyakAveragingCallback()])

    files = {
        name: np.load(tmp_path / "eval" / name / "evaluations.npz")
        for name in ("", "uniform", "tail50", "ema")
    }
    for name, file in files.items():
        assert sorted(file) == ["ep_lengths", "results", "timesteps"], name
        assert file["timesteps"].tolist() == [40, 80]
        assert file["results"].shape == file["ep_lengths"].shape == (2, 3)
    assert not np.array_equal(files[""]["results"], files["uniform"]["results"])

    with open(tmp_path / "log" / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/mean_reward"]]
    assert [row["time/total_timesteps"] for row in rows] == ["40", "80"]
    for name, file in files.items():
        tag = f"eval/{name}/" if name else "eval/"
        for key, values in (("mean_reward", "results"), ("mean_ep_length", "ep_lengths")):
            logged = [float(row[tag + key]) for row in rows]
            assert logged == pytest.approx(file[values].mean(1).tolist())
    PPO.load(tmp_path / "best" / "best_model", device="cpu")
    model.logger.close()


@pytest.mark.parametrize(("case", "deterministic"), [("ppo", True), ("ppo", False), ("dqn", False)])
def test_all_policies_meet_the_same_episodes_and_every_run_its_own(case, deterministic):
    results = {}
    for run in (3, 3, 4):
        late = {"n_steps": 64} if case == "ppo" else {"learning_starts": 64}
        model = make(case, seed=run, **late)
        evaluation = AveragedEvalCallback(
            eval_env(case, 2),
            eval_freq=20,
            n_eval_episodes=4,
            verbose=0,
            deterministic=deterministic,
        )
        model.learn(20, callback=[PolyakAveragingCallback(), evaluation])
        runs = [kept["results"] for kept in evaluation.averaged.values()]
        assert runs[0] == runs[1] == runs[2]
        assert evaluation.last_mean_reward == np.mean(runs[0])
        assert results.setdefault(run, (runs[0], evaluation.seed)) == (runs[0], evaluation.seed)
    assert results[3][1] != results[4][1]


def test_episodes_with_random_numbers_inside_are_common_with_a_sub_environment_for_each(tmp_path):
    def env(n_envs):
        return DummyVecEnv([lambda: Monitor(Coin())] * n_envs)

    model = make("ppo", env(1), n_steps=20, batch_size=20, learning_rate=0.1)
    evaluation = AveragedEvalCallback(
        env(3), eval_freq=30, n_eval_episodes=3, verbose=0, seed=7, log_path=str(tmp_path)
    )
    model.learn(80, callback=[PolyakAveragingCallback(), evaluation])
    last = np.load(tmp_path / "evaluations.npz")
    averaged = np.load(tmp_path / "ema" / "evaluations.npz")
    assert len(set(last["results"][0])) == 3  # other tosses in each
    assert np.array_equal(last["results"], averaged["results"])
    assert np.array_equal(last["successes"], averaged["successes"])
    assert "eval/ema/success_rate" not in model.logger.name_to_value  # dumped already


def test_an_average_that_cannot_be_given_yet_is_left_out_of_the_evaluation():
    contrib = pytest.importorskip("sb3_contrib")
    model = contrib.QRDQN("MlpPolicy", "CartPole-v1", seed=3, device="cpu", **OFF_POLICY)
    averaging = PolyakAveragingCallback({"tail50": Tail(0.5), "m": Uniform()}, capacity=16)
    evaluation = AveragedEvalCallback(eval_env("dqn"), eval_freq=4, n_eval_episodes=1, verbose=0)
    model.learn(200, callback=[averaging, evaluation])
    evaluated = {name: len(kept["results"]) for name, kept in evaluation.averaged.items()}
    assert evaluated["m"] == 50 > evaluated["tail50"] > 5


def test_masked_actions_are_never_taken_where_last_and_averages_are_evaluated():
    contrib = pytest.importorskip("sb3_contrib")
    model = contrib.MaskablePPO("MlpPolicy", Parity(), n_steps=20, batch_size=20, device="cpu")
    env = DummyVecEnv([lambda: Monitor(Parity())] * 2)
    evaluation = AveragedEvalCallback(env, eval_freq=20, n_eval_episodes=4, verbose=0)
    model.learn(40, callback=[PolyakAveragingCallback(), evaluation])
    assert evaluation.last_mean_reward == 5.0
    assert {float(np.min(kept["results"])) for kept in evaluation.averaged.values()} == {5.0}
    assert "predict" not in vars(model)
    unmasked = AveragedEvalCallback(eval_env("ppo"), verbose=0)
    with pytest.raises(ValueError, match=r"MaskablePPO acts by masks: the environment .* needs"):
        model.learn(40, callback=[PolyakAveragingCallback(), unmasked])


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ppo", "dqn", "sac"])
def test_a_loaded_model_goes_on_with_its_averages(case, tmp_path):
    algorithm, env_id, _, steps, _ = CASES[case]
    model = make(case)
    averaging = PolyakAveragingCallback(
        {"uniform": Uniform(), "tail": Tail(0.5), "ema": Ema(half_life=4.0)}, capacity=64
    )
    iterates = record_steps(model)
    model.learn(steps, callback=averaging)
    model.save(tmp_path / "model")
    averaging.save(tmp_path / "averages.pt")

    model = algorithm.load(tmp_path / "model", env=gym.make(env_id), device="cpu")
    resumed = PolyakAveragingCallback.load(tmp_path / "averages.pt", model)
    assert resumed.rules == averaging.rules
    with averages_of(model).applied("ema"), averaging.averages.applied("ema") as network:
        assert same(weights(acting_network(model)[0]), weights(network))
    more = record_steps(model)
    model.learn(steps, callback=resumed, reset_num_timesteps=False)
    iterates += more
    assert more
    assert resumed.averages.clock == len(iterates)
    with averages_of(model).applied("uniform") as network:
        assert_close(network, mean(iterates))
    with averages_of(model).applied("tail") as network:
        assert_close(network, mean(iterates[-(len(iterates) // 2) :]))


def test_a_second_learn_with_the_same_callback_goes_on():
    model, averaging = make("ppo"), PolyakAveragingCallback()
    iterates = record_steps(model)
    for _ in range(3):
        model.learn(32, callback=averaging)
    with averages_of(model).applied("uniform") as network:
        assert_close(network, mean(iterates))


# --- errors ---------------------------------------------------------------------------------------


def test_mistakes_are_said_in_a_sentence(tmp_path):
    model = make("ppo")
    with pytest.raises(ValueError, match="the model has no averages: train it with"):
        save_averaged(model, "uniform", tmp_path / "never")
    with pytest.raises(ValueError, match="the model has no averages"):
        model.learn(32, callback=AveragedEvalCallback(eval_env("ppo"), verbose=0))
    with pytest.raises(ValueError, match="'half' is a Tail, which needs timeline=True"):
        model.learn(32, callback=PolyakAveragingCallback({"half": Tail(0.5)}, timeline=False))
    with pytest.raises(ValueError, match="nothing to average: give rules or timeline=True"):
        model.learn(32, callback=PolyakAveragingCallback({}, timeline=False))
    averaging = PolyakAveragingCallback({"mean": Uniform()}, timeline=False)
    model.learn(32, callback=averaging)
    with pytest.raises(ValueError, match="there is no average 'best'; the averages are mean"):
        save_averaged(model, "best", tmp_path / "never")
    with pytest.raises(ValueError, match="was not recorded: name it in rules"):
        save_averaged(model, Tail(0.5), tmp_path / "never")
    with pytest.raises(ValueError, match="this callback keeps the averages of another model"):
        make("ppo").learn(32, callback=averaging)
    with pytest.raises(ValueError, match=r"averages of this model stand still in this learn\(\)"):
        model.learn(32, callback=AveragedEvalCallback(eval_env("ppo"), verbose=0))
    averaging.save(tmp_path / "averages.pt")
    with pytest.raises(ValueError, match="the saved averages are of another network"):
        PolyakAveragingCallback.load(tmp_path / "averages.pt", make("sac"))
    torch.save({"format": "other"}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a file of tensors")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is (not averages|damaged, or no file)"):
            PolyakAveragingCallback.load(tmp_path / name, model)
    assert not [*tmp_path.glob("never*")]


# --- shipping -------------------------------------------------------------------------------------


def test_what_is_shipped_is_the_winner_valued_on_episodes_that_chose_nothing(tmp_path):
    model = make("ppo", learning_rate=0.05)
    model.learn(640, callback=PolyakAveragingCallback({"mean": Uniform()}))
    before = weights(model.policy)
    choice = ship(model, eval_env("ppo", 3), episodes=60, path=tmp_path / "shipped.zip")
    assert same(weights(model.policy), before)
    windows = {f"window{p}" for p in range(95, 50, -5)}
    assert {"last", "mean", "tail5", "tail10", "tail25", "tail50", *windows} == {*choice.choosing}
    assert sum(map(len, choice.choosing.values())) <= 60
    assert choice.prior == "tail25"

    record = json.loads((tmp_path / "shipped.json").read_text())
    assert Choice(**record) == choice
    shipped = PPO.load(tmp_path / "shipped", device="cpu")
    percent = int(choice.winner.removeprefix("window"))  # with these seeds
    with averages_of(model).applied(Between((percent - 5) / 100, percent / 100)) as network:
        assert same(weights(shipped.policy), weights(network))
    again = ship(model, eval_env("ppo"), episodes=60)  # one environment in place of three
    assert again == choice
    other = ship(model, eval_env("ppo"), episodes=0, start=choice.next_start)
    assert (other.winner, other.episodes) == ("tail25", 0)


def test_shipping_takes_masks_and_the_statistics_of_training():
    contrib = pytest.importorskip("sb3_contrib")
    model = contrib.MaskablePPO("MlpPolicy", Parity(), n_steps=20, batch_size=20, device="cpu")
    model.learn(40, callback=PolyakAveragingCallback(capacity=20))
    choice = ship(model, Parity(), episodes=40)
    assert {x for row in (choice.choosing | choice.valuing).values() for x in row} == {5.0}
    assert choice.winner == "tail25"  # all are tied
    with pytest.raises(ValueError, match=r"MaskablePPO acts by masks: the environment .* needs"):
        ship(model, gym.make("CartPole-v1"), episodes=0)

    env = VecNormalize(make_vec_env("Pendulum-v1", seed=1))
    model = make("sac", env)
    model.learn(60, callback=PolyakAveragingCallback())
    with pytest.raises(ValueError, match="that of training is a VecNormalize and env is none"):
        ship(model, make_vec_env("Pendulum-v1"), episodes=0)
    with pytest.raises(ValueError, match="wrap env as the environment of training is"):
        ship(model, VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1")), 2), episodes=0)
    mean, count = env.obs_rms.mean.copy(), env.obs_rms.count
    plain = VecNormalize(make_vec_env("Pendulum-v1"))
    choice = ship(model, plain, episodes=40)
    assert max(map(max, choice.valuing.values())) < -100  # as they are, not normalised
    assert plain.obs_rms.mean.tolist() == mean.tolist()
    assert env.obs_rms.count == count
    assert env.training


# --- fast_polyak_update ---------------------------------------------------------------------------

SB3_UPDATE = sb3_utils.polyak_update
PLACES = (sb3_utils, sb3_dqn, sb3_sac, sb3_td3)


def test_the_fast_update_passes_sb3_s_own_test():
    """One parameter moves by tau, the other stays; the formula of SB3's test is the oracle."""
    online, target = nn.Parameter(torch.ones(5, 5)), nn.Parameter(torch.zeros(5, 5))
    with fast_polyak_update():
        sb3_utils.polyak_update([online], [target], 0.1)
    assert torch.equal(online, torch.ones(5, 5))
    torch.testing.assert_close(target.detach(), torch.full((5, 5), 0.1 * 1.0 + 0.9 * 0.0))


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 1.0])
def test_the_fast_update_agrees_with_sb3_s_on_a_twin_critic(tau):
    model, twin = make("sac"), make("sac", seed=4)
    ours, theirs, exact = (
        twin.critic,
        make("sac", seed=4).critic,
        make("sac", seed=4).critic.double(),
    )
    with fast_polyak_update():
        for _ in range(50):
            sb3_sac.polyak_update(model.critic.parameters(), ours.parameters(), tau)
    for _ in range(50):
        SB3_UPDATE(model.critic.parameters(), theirs.parameters(), tau)
    keep = (1 - tau) ** 50
    for x, a, b, start in zip(
        *(c.parameters() for c in (model.critic, ours, theirs, exact)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            a.double(), keep * start + (1 - keep) * x.double(), rtol=1e-5, atol=1e-6
        )
        if tau in (0.0, 1.0):
            assert torch.equal(a, start.float() if tau == 0.0 else x)


@pytest.mark.parametrize("case", ["sac", "td3", "dqn"])
def test_training_with_the_fast_update_agrees_and_copies_batch_norm_statistics(case):
    options = (
        {"features_extractor_class": Hidden, "net_arch": [8]}
        if case != "dqn"
        else {"net_arch": [8]}
    )
    ends = []
    for fast in (False, True):
        model = make(case, policy_kwargs=options)
        if fast:
            with fast_polyak_update():
                model.learn(CASES[case][3])
        else:
            model.learn(CASES[case][3])
        ends.append(model.policy.state_dict())
    slow, fast = ends
    for name, tensor in slow.items():
        torch.testing.assert_close(fast[name], tensor, rtol=1e-4, atol=1e-5)
    if case != "dqn":
        statistics = "features_extractor.net.2.running_mean"
        assert torch.equal(fast[f"critic_target.{statistics}"], fast[f"critic.{statistics}"])
        assert fast[f"critic.{statistics}"].abs().sum() > 0


def test_every_importer_is_served_and_gets_its_own_back():
    mine = ModuleType("mine")
    mine.polyak_update, mine.other = SB3_UPDATE, SB3_UPDATE
    unrelated = ModuleType("unrelated")
    unrelated.polyak_update = max
    sys.modules.update(mine=mine, unrelated=unrelated, gap=None)
    try:
        with fast_polyak_update():
            replacement = sb3_utils.polyak_update
            assert replacement is not SB3_UPDATE
            assert {p.polyak_update for p in (*PLACES, mine)} == {replacement}
            late = sys.modules["late"] = ModuleType("late")
            late.polyak_update = sb3_utils.polyak_update  # imported meanwhile
            with fast_polyak_update():
                assert sb3_sac.polyak_update is replacement
            assert sb3_sac.polyak_update is replacement  # the outer block goes on
        assert {p.polyak_update for p in (*PLACES, mine, late)} == {SB3_UPDATE}
        assert unrelated.polyak_update is max
    finally:
        for name in ("mine", "unrelated", "late", "gap"):
            sys.modules.pop(name, None)


def test_an_exception_undoes_the_replacement_too():
    with pytest.raises(KeyboardInterrupt), fast_polyak_update():
        make("dqn").learn(20, callback=Interrupt(after=5))
    assert {place.polyak_update for place in PLACES} == {SB3_UPDATE}


def test_called_as_a_function_it_stays_until_undone():
    fast = fast_polyak_update()
    try:
        assert sb3_td3.polyak_update is not SB3_UPDATE
    finally:
        fast.undo()
    assert sb3_td3.polyak_update is SB3_UPDATE


def test_the_fast_update_follows_moved_parameters_and_refuses_what_does_not_match():
    online, target = nn.Linear(2, 2), nn.Linear(2, 2)
    with fast_polyak_update():
        update = sb3_utils.polyak_update
        update(online.parameters(), target.parameters(), 0.5)
        online.double(), target.double()  # other memory, other dtype, the same parameters
        before = target.weight.detach().clone()
        update(online.parameters(), target.parameters(), 0.25)
        torch.testing.assert_close(
            target.weight.detach(), 0.25 * online.weight.detach() + 0.75 * before
        )
        update([], [], 1.0)
        with pytest.raises(ValueError, match="same tensor names"):
            update(online.parameters(), [*target.parameters()][:1], 0.5)
        with pytest.raises(ValueError, match="must have one shape"):
            update([torch.ones(1, 2)], [torch.ones(2, 2)], 0.5)
        with pytest.raises(ValueError, match="tau must be in"):
            update(online.parameters(), target.parameters(), 1.5)
        shared = torch.ones(3)
        with pytest.raises(ValueError, match="shares memory"):
            update([shared[:2]], [shared[1:]], 0.5)
