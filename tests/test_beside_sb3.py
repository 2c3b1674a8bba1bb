import numpy as np
import pytest
import stable_baselines3
import torch

from agents.presets import preset
from scripts import beside_sb3
from scripts.bench_cases.rivals import sb3_agent

TINY = ["--seeds", "1", "--total-steps", "60", "--points", "3", "--episodes", "2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(beside_sb3, "PAIRS", (("sac", "Pendulum-v1"), ("td3", "Pendulum-v1")))
    monkeypatch.setattr(beside_sb3, "preset", small)


def small(algo, env_id):
    config, steps = preset(algo, env_id)
    return config.__class__(hidden=(8, 8), batch_size=4, learning_starts=20), steps


def test_each_run_is_made_once_and_by_both(tmp_path, capsys):
    assert beside_sb3.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = beside_sb3.read(tmp_path / "returns.csv")
    assert [r.step for r in rows] == [20, 40, 60] * 4
    assert {(r.library, r.algo) for r in rows} == {
        (library, algo) for library in beside_sb3.TRAIN for algo in ("sac", "td3")
    }
    assert all(-2000 < r.score < 0 for r in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    capsys.readouterr()
    (tmp_path / "curves.png").unlink()
    beside_sb3.write(tmp_path / "returns.csv", rows[:6])  # as if the others were not done
    assert beside_sb3.main([*TINY, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split(" seed")[0] for line in said.splitlines()[:-1]] == [
        "polyak_rl td3 Pendulum-v1",
        "Stable-Baselines3 td3 Pendulum-v1",
    ]
    assert beside_sb3.read(tmp_path / "returns.csv") == rows  # the same numbers


@pytest.mark.parametrize("algo", ["sac", "td3"])
def test_their_policy_acts_as_they_predict(algo):
    config, _ = preset(algo, "Pendulum-v1")
    model = sb3_agent(stable_baselines3, algo, "Pendulum-v1", config, 1, device="cpu")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with torch.inference_mode():
        actions = beside_sb3.Greedy(model.actor).act(torch.from_numpy(obs)[None])
    assert actions.shape == (1, 5, 1)
    predicted, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(2 * actions[0].numpy(), predicted, rtol=1e-6)  # torque up to 2


def test_what_asks_for_nothing_is_refused(tmp_path, capsys):
    assert beside_sb3.main(["--seeds", "0", "--out", str(tmp_path / "new")]) == 2
    assert "at least" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
