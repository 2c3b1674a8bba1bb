"""What runs on a CUDA device: launches and host waits as budgets, whole runs, and misuse.

Without a GPU the device is the one of `tests/pretended_cuda.py`, which alone can count.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agents.averaging import record_policy
from agents.checkpoint import Checkpoints, newest, restore
from agents.pixels import FrameReplay
from agents.presets import preset
from agents.replay import Upload
from agents.seeding import Purpose, Streams, ahead
from agents.training import TrainConfig, Training
from polyak_rl import (
    AverageBank,
    Ema,
    PolicyAverages,
    TargetNetwork,
    Timeline,
    Uniform,
    Window,
    flatten_,
)
from scripts.experiment.schemes import SHOWN, rules_of
from tests.pretended_cuda import CaptureError, Device, pretend

pytestmark = pytest.mark.cuda

needs_pretence = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not count")

ENVS = {"dqn": "CartPole-v1", "ddpg": "Pendulum-v1", "td3": "Pendulum-v1", "sac": "Pendulum-v1"}
SMALL = {
    "hidden": (16, 16),
    "batch_size": 16,
    "learning_starts": 10,
    "train_every": 1,
    "gradient_steps": 1,
    "target_update_every": 5,
}


def training(algo, seeds=1, steps=1000, agent=None, **options):
    """A small run on the device, a program unless told otherwise."""
    config = replace(preset(algo, ENVS[algo])[0], **SMALL | (agent or {}))
    options = {"device": "cuda", "compile": True, "eval_every": 0, "log_every": 50} | options
    return Training(algo, config, TrainConfig(ENVS[algo], steps, **options), range(1, seeds + 1))


def learning(algo, seeds, **options):
    """A training some steps after its programs were recorded."""
    one = training(algo, seeds, **options)
    while one.updates < 10:
        one.advance()
    return one


@pytest.fixture(autouse=True)
def to_the_bit(monkeypatch):
    """Programs launch the kernels of single operations; fused ones are in `test_program.py`."""
    monkeypatch.setattr("agents.training.build_for", lambda device: None)


# -------------------------------------------------------------------------- launches and waits


@needs_pretence
@pytest.mark.parametrize("seeds", [1, 20])
@pytest.mark.parametrize(("algo", "draws"), [("dqn", 1), ("ddpg", 1), ("td3", 2), ("sac", 2)])
def test_a_gradient_step_is_one_launch_whatever_the_number_of_seeds(cuda, algo, draws, seeds):
    one = learning(algo, seeds)
    cuda.clear()
    one.learn(64)
    assert cuda.graphs == 64 + 1  # and the draws of 64 steps
    # where each stream is, and how many transitions there are
    assert dict(cuda.launches) == {"fill_.Scalar": draws + 1}
    assert not cuda.waits


@needs_pretence
@pytest.mark.parametrize("seeds", [1, 20])
@pytest.mark.parametrize(("algo", "draws"), [("dqn", 1), ("ddpg", 1), ("td3", 2), ("sac", 2)])
def test_averages_are_part_of_the_launch_and_a_few_more_in_32_steps(cuda, algo, draws, seeds):
    one, averages = averaged(algo, seeds, 10_000)
    while one.updates < 10:
        one.advance()
    cuda.clear()
    one.learn(30)  # a first block, for which the weights of 2048 steps in an EMA are sent
    assert not cuda.waits
    cuda.clear()
    one.learn(64)
    assert averages.clock == 104
    assert cuda.graphs == 64 + 1  # and the draws of 64 steps
    block = ["_to_copy", "mul.out", "addmm_", "sum.IntList_out", "add_.Tensor"]
    assert dict(cuda.launches) == dict.fromkeys(block, 2) | {"fill_.Scalar": draws + 1 + 2}
    assert not cuda.waits


@needs_pretence
@pytest.mark.parametrize("seeds", [1, 20])
@pytest.mark.parametrize(
    ("algo", "launches"), [("dqn", 61), ("ddpg", 111), ("td3", 97), ("sac", 201)]
)
def test_a_gradient_step_without_a_program_waits_for_nothing(cuda, algo, launches, seeds):
    one = learning(algo, seeds, compile=False)
    cuda.clear()
    one.learn(8)
    assert cuda.launched / 8 <= launches
    assert not cuda.waits


@needs_pretence
@pytest.mark.parametrize("seeds", [1, 20])
@pytest.mark.parametrize(("compile", "launches"), [(True, 5), (False, 18)])
@pytest.mark.parametrize("algo", ENVS)
def test_an_environment_step_waits_for_its_actions_alone(cuda, algo, compile, launches, seeds):
    one = training(algo, seeds, agent={"gradient_steps": 0}, compile=compile)
    while one.step < 20:  # actions are the policy's
        one.advance()
    cuda.clear()
    for _ in range(64):
        one.advance()
    assert dict(cuda.waits) == {"agents/explorer.py __call__": 64}
    assert cuda.graphs == 64 * compile
    # As a program: observations there, the replay, actions back, and to store a transition two.
    assert cuda.launched <= 64 * launches + 40  # which make the draws of 64 steps


@pytest.mark.parametrize("algo", ENVS)
def test_a_program_acts_as_single_operations_do(algo):
    agent = {"learning_starts": 5} | ({"epsilon_end": 0.3} if algo == "dqn" else {})
    program, eager = (training(algo, 2, 150, agent, compile=c, n_envs=3).explorer for c in (1, 0))
    obs = np.random.default_rng(0).normal(size=(100, *program.shape)).astype(np.float32)
    for step, seen in enumerate(obs):  # the draws of more than one block, and all of a schedule
        assert np.array_equal(program(seen, step), eager(seen, step)), step
    assert len(program.program.recorded) == 1


@needs_pretence
def test_frames_are_stored_without_waiting(cuda):
    replay = FrameReplay(50, (4, 36, 36), members=2, device="cuda")
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(2, 40, 36, 36), dtype=np.uint8)
    for t in range(30):
        obs, next_obs = (frames[:, None, t + i : t + i + 4] for i in (0, 1))
        cuda.clear()
        replay.add(obs, np.zeros((2, 1)), np.full((2, 1), t), np.zeros((2, 1), bool), next_obs)
        assert not cuda.waits
        cuda.wait("as for the actions of every environment step")
    batch = replay.sample(8, Streams(Purpose.REPLAY, [1, 2], "cuda"))
    for member in range(2):
        for t, obs in zip(batch.reward[member].tolist(), batch.obs[member].cpu(), strict=True):
            assert (obs.numpy() == frames[member, int(t) : int(t) + 4]).all()


def test_memory_on_its_way_is_not_written_to(cuda):
    upload = Upload("cuda")
    sent = [upload(torch.full((3,), float(k))) for k in range(4)]
    assert [x.tolist() for x in sent] == [[float(k)] * 3 for k in range(4)]
    if cuda is not None:
        assert cuda.waits["agents/replay.py __call__"] == 3  # nothing else waited in between


# ----------------------------------------------------------------------------------- draws


def test_what_a_seed_draws_depends_on_nobody_beside_it_and_not_on_how_far_ahead():
    together, alone = (Streams(Purpose.UPDATE, seeds, "cuda") for seeds in ([3, 8], [8]))
    calls = [together.draw("normal", (5, 2))[1] for _ in range(70)]
    alone.tell()
    block = alone.after("normal", 70, (5, 2))
    assert torch.equal(torch.stack(calls), block[:, 0])
    assert not torch.equal(together.draw("normal", (5, 2))[0], together.draw("normal", (5, 2))[1])


def test_streams_go_on_from_the_middle_of_what_was_made_ahead():
    one = Streams(Purpose.EXPLORATION, [1, 2], "cuda")
    for _ in range(3):
        one.draw("uniform", (7,))
    other = Streams(Purpose.EXPLORATION, [1, 2], "cuda")
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.draw("uniform", (7,)), one.draw("uniform", (7,)))
    assert torch.equal(
        other.draw("normal", (3,)), one.draw("normal", (3,))
    )  # another law begins after it


def test_counted_numbers_follow_their_laws():
    streams = Streams(Purpose.PLACEBO, range(4), "cuda")
    normal = streams.draw("normal", (50_001,)).cpu().double()
    assert normal.mean(1).abs().max() < 0.02
    assert (normal.std(1) - 1).abs().max() < 0.02
    assert (normal.abs() > 1.959964).double().mean().item() == pytest.approx(0.05, abs=0.003)
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().max() < 0.02
    uniform = streams.draw("uniform", (50_001,)).cpu().double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert torch.histc(uniform, 10, 0, 1).div(4 * 50_001).sub(0.1).abs().max() < 0.003
    below = streams.below(3, 1000, 5).cpu()
    assert below.shape == (1000, 4, 5)
    assert torch.bincount(below.flatten()).div(20_000).sub(1 / 3).abs().max() < 0.02


def test_many_seeds_draw_less_far_ahead():
    assert ahead(1, (2, 256, 6)) == 64
    assert ahead(1024, (2, 256, 6)) == 5
    assert ahead(2**20, (256, 6)) == 1


# --------------------------------------------------------------------------------- whole runs


def state_of(one):
    networks = {"policy": one.agent.policy} | {k: t.module for k, t in one.agent.targets.items()}
    return {f"{n}.{k}": x.cpu() for n, net in networks.items() for k, x in net.state_dict().items()}


def assert_same(ours, theirs):
    for name, x in state_of(theirs).items():
        assert torch.equal(state_of(ours)[name], x), name


@pytest.mark.parametrize("algo", ENVS)
def test_a_program_takes_a_run_where_single_operations_take_it(algo):
    program, eager = (training(algo, 2, 50, compile=compile) for compile in (True, False))
    program.run()
    eager.run()
    assert_same(program, eager)


def test_a_program_follows_a_schedule_of_tau():
    agent = {"tau": 0.5, "tau_end": 0.1}
    ends = [training("sac", 2, 40, agent, compile=c) for c in (True, False)]
    for one in ends:
        one.run()
    program, eager = map(state_of, ends)
    for name, x in eager.items():
        torch.testing.assert_close(program[name], x, rtol=1e-4, atol=1e-5)
    assert ends[0].agent.targets["critic"].tau.item() == pytest.approx(0.5 - 0.4 * 29 / 30)


def test_a_seeds_run_is_the_same_beside_others():
    alone, together = training("sac", 1, 30), training("sac", 3, 30)
    alone.run()
    together.run()
    for ours, theirs in zip(
        together.agent.policy.parameters(), alone.agent.policy.parameters(), strict=True
    ):
        # cuBLAS chooses its kernels, and with them the order of sums, by the number of members.
        torch.testing.assert_close(ours[0].cpu(), theirs[0].cpu(), rtol=1e-3, atol=1e-4)


def averaged(*arguments, **options):
    one = training(*arguments, **options)
    return one, record_policy(one, rules_of(SHOWN, one.total_updates), capacity=20)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("algo", ["dqn", "sac"])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path, algo, compile):
    (whole, w), (first, f), (second, s) = (averaged(algo, 2, 50, compile=compile) for _ in "wfs")
    for one in (whole, first):
        while one.step < 25:  # in the middle of what is drawn ahead
            one.advance()
    Checkpoints(tmp_path, first, f).save()
    assert restore(newest(tmp_path)[0], second, s) == []
    for one in (whole, second):
        one.run()
    assert_same(second, whole)
    for name in w.rules:
        for key, x in w.average(name).items():
            assert torch.equal(s.average(name)[key].cpu(), x.cpu())


@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_another_device_and_says_so(tmp_path, there, here):
    first = training("sac", 2, 40, device=there, compile=False)
    while first.step < 25:
        first.advance()
    Checkpoints(tmp_path, first).save()
    second = training("sac", 2, 40, device=here, compile=False)
    (note,) = restore(newest(tmp_path)[0], second)
    assert note.startswith(f"device was {there}")
    assert_same(second, first)
    second.run()
    assert second.step == 40
    assert all(x.isfinite().all() for x in state_of(second).values())


# ---------------------------------------------------------------------------- memory, precision


@needs_pretence
def test_seeds_that_do_not_fit_are_refused(cuda):
    cuda.memory = 2**20
    message = (
        "the replay buffers of 20 seeds take 1 MiB, 0.06 each, and cuda(:0)? has 1 left: train at "
        "most 16 seeds at once, or choose a smaller buffer_size"
    )
    with pytest.raises(ValueError, match=message):
        training("dqn", 20, steps=1450)
    training("dqn", 16, steps=1450).close()


def test_products_are_float32_unless_tf32_is_asked_for():
    before = torch.get_float32_matmul_precision()
    try:
        for options, expected in (({"matmul_precision": "high"}, "high"), ({}, "highest")):
            training("dqn", **options)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(ValueError, match="matmul_precision 'high' is for CUDA only"):
        training("dqn", device="cpu", compile=False, matmul_precision="high")


# ------------------------------------------------------------------------------------ misuse


def test_a_captured_step_writes_for_averages_what_recording_takes():
    policy = nn.Linear(3, 2).cuda()
    flatten_(policy)
    rules = {"mean": Uniform(), "ema": Ema(tau=0.1), "lawa": Window(3, 5)}
    written, recorded = (PolicyAverages(policy, rules, capacity=8) for _ in range(2))

    def step():
        with torch.no_grad():
            policy.weight.mul_(1.01)
        written.write()

    written.expect()
    graph = captured(step)
    for _ in range(70):
        written.expect()
        graph.replay()
        written.count()
        recorded.record()
    for name in rules:
        assert torch.equal(written.vector(name), recorded.vector(name)), name


def test_averages_go_where_their_network_goes():
    rules = {"mean": Uniform(), "ema": Ema(tau=0.1), "lawa": Window(3, 5)}
    here = nn.Linear(3, 2)
    there = copy.deepcopy(here)
    stay, go = (PolicyAverages(policy, rules, capacity=8) for policy in (here, there))
    for step in range(90):
        if step == 40:
            there.cuda()
        for policy, averages in ((here, stay), (there, go)):
            nn.init.constant_(policy.weight, step % 7)
            averages.record()
    for which in (*rules, Uniform(start=64)):
        assert go.vector(which).device.type == "cuda"
        torch.testing.assert_close(go.vector(which).cpu(), stay.vector(which))


def captured(f):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph


@needs_pretence
def test_the_pretended_device_keeps_the_rules():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(x)
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        captured(lambda: x.sum().item())
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        captured(lambda: x.copy_(torch.zeros(3)))
    generator = torch.Generator("cuda")
    with pytest.raises(CaptureError, match="a generator that is not registered"):
        captured(lambda: torch.rand(3, generator=generator, device="cuda"))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")


@needs_pretence
def test_a_pretended_graph_runs_when_it_is_replayed_and_at_the_addresses_of_then(cuda):
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = captured(lambda: y.add_(2 * x))
    assert y.tolist() == [0, 0, 0]
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert y.tolist() == [20, 20, 20]
    assert cuda.graphs == 2


@needs_pretence
def test_pretended_copies_without_waiting_arrive_at_the_next_wait(cuda):
    host = torch.zeros(3, pin_memory=True)
    host.copy_(torch.ones(3, device="cuda"), non_blocking=True)
    assert host.tolist() == [0, 0, 0]
    torch.cuda.synchronize()
    assert host.tolist() == [1, 1, 1]
    torch.zeros(3, device="cuda").copy_(host, non_blocking=True)
    host.fill_(7)
    with pytest.raises(AssertionError, match="written to before the device had read it"):
        torch.cuda.synchronize()


def test_pretending_leaves_no_trace():
    before = torch.cuda.is_available, torch.tensor, torch.Generator
    with pretend() as device:
        assert isinstance(device, Device)
        assert torch.tensor([1.0], device="cuda").is_cuda
    assert (torch.cuda.is_available, torch.tensor, torch.Generator) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: TargetNetwork(net, 0.5, every=4).update, "every"),
        (lambda net: TargetNetwork(net, 0.5, guard="finite").update, "captur"),
        (lambda net: AverageBank(net, {"mean": Uniform()}).update, "AverageBank.update"),
        (lambda net: Timeline(net, expected=9).record, "Timeline.record"),
    ],
)
def test_what_counts_on_the_host_is_not_captured(make, message):
    update = make(nn.Linear(3, 2).cuda())
    with pytest.raises(RuntimeError, match=message):
        captured(update)
