"""Somebody's own agent, with only its update lines replaced."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from polyak_rl import AverageBank, Ema, TargetNetwork, Uniform, soft_update

TAU = 0.005


def lerp_lines(target, online):
    with torch.no_grad():
        for t, o in zip(target.parameters(), online.parameters(), strict=True):
            t.lerp_(o, TAU)


def sum_lines(target, online):
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.data.copy_(TAU * o.data + (1 - TAU) * t.data)


class Agent:
    """A DDPG of twenty lines, as people write it."""

    def __init__(self, update):
        torch.manual_seed(0)
        self.actor = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_target = copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-3)
        self.update_target = update

    def train(self, steps):
        torch.manual_seed(1)
        for _ in range(steps):
            s, a, r, s_next = (torch.randn(8, n) for n in (3, 1, 1, 3))
            with torch.no_grad():
                a_next = self.actor_target(s_next)
                y = r + 0.99 * self.critic_target(torch.cat((s_next, a_next), 1))
            critic_loss = (self.critic(torch.cat((s, a), 1)) - y).square().mean()
            self.critic_optimizer.zero_grad()
            critic_loss.backward()
            self.critic_optimizer.step()
            actor_loss = -self.critic(torch.cat((s, self.actor(s)), 1)).mean()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            self.update_target(self.critic_target, self.critic)
            self.update_target(self.actor_target, self.actor)

    def weights(self):
        networks = (self.actor, self.critic, self.actor_target, self.critic_target)
        return [p.detach() for network in networks for p in network.parameters()]


class Normed(nn.Module):
    """A network whose batch norm has statistics, two of floats and one that counts."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def train_once(self):
        with torch.no_grad():
            self.layers(torch.randn(8, 3) * 2 + 1)
            for p in self.parameters():
                p.add_(torch.randn_like(p))

    def state(self):
        return {name: x.detach().double().clone() for name, x in self.state_dict().items()}


def differing(ours, theirs):
    """The names whose values differ by more than rounding."""
    return [
        n for n in theirs if not torch.allclose(ours[n].double(), theirs[n].double(), 1e-4, 1e-5)
    ]


BUFFERS = ["layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked"]


@pytest.mark.parametrize("lines", [lerp_lines, sum_lines], ids=["SB3", "CleanRL"])
def test_their_target_lines_leave_batch_norm_behind_and_ours_copy_it(lines):
    online, theirs = Normed(0), Normed(1)
    ours = copy.deepcopy(theirs)
    for _ in range(3):
        online.train_once()
        lines(theirs, online)
        soft_update(ours, online, TAU)
    assert differing(ours.state(), theirs.state()) == BUFFERS
    assert all(torch.equal(ours.state()[name], online.state()[name]) for name in BUFFERS)


@pytest.mark.parametrize("rule", ["ema", "uniform"])
def test_averaged_model_copies_batch_norm_and_so_does_ours(rule):
    network = Normed(0)
    if rule == "ema":
        theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        bank = AverageBank(network, {rule: Ema(tau=0.01)})
    else:
        theirs, bank = AveragedModel(network), AverageBank(network, {rule: Uniform()})
    for _ in range(4):
        network.train_once()
        theirs.update_parameters(network)
        bank.update()
    ours = bank.module(rule).state_dict()
    assert differing(ours, theirs.module.state_dict()) == []
    assert all(torch.equal(ours[name], network.state_dict()[name]) for name in BUFFERS)


def test_ema_pytorch_averages_float_buffers_as_ours_does_where_it_is_told_to():
    """Its first update copies, every other one goes by 1 - beta; integers are copied."""
    network = Normed(0)
    theirs = None
    bank = AverageBank(network, {"ema": Ema(tau=0.01)}, buffers="average")
    for _ in range(4):
        network.train_once()
        bank.update()
        state = network.state()
        theirs = theirs or state
        theirs = {n: x if "num_batches" in n else theirs[n].lerp(x, 0.01) for n, x in state.items()}
    assert differing(bank.module("ema").state_dict(), theirs) == []
    plain = AverageBank(network, {"ema": Ema(tau=0.01)})
    plain.update()
    network.train_once()
    plain.update()
    left = plain.module("ema").state_dict()
    assert all(torch.equal(left[name], network.state_dict()[name]) for name in BUFFERS)


def our_line(target, online):
    soft_update(target, online, TAU)


def test_replacing_lerp_lines_leaves_training_bit_identical():
    theirs, ours = Agent(lerp_lines), Agent(our_line)
    theirs.train(300)
    ours.train(300)
    assert all(torch.equal(a, b) for a, b in zip(theirs.weights(), ours.weights(), strict=True))


def test_a_target_network_leaves_training_bit_identical():
    theirs, ours = Agent(lerp_lines), Agent(our_line)
    twins = {}
    for name in ("critic", "actor"):
        twin = TargetNetwork(getattr(ours, name), TAU)
        setattr(ours, f"{name}_target", twin)
        twins[id(twin)] = twin
    ours.update_target = lambda target, online: twins[id(target)].update()
    theirs.train(300)
    ours.train(300)
    assert all(torch.equal(a, b) for a, b in zip(theirs.weights(), ours.weights(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_each_update_is_within_one_ulp_of_the_sum_form(seed):
    """tau a + (1 - tau) b rounds three times, a lerp less: one unit in the last place apart."""
    torch.manual_seed(seed)
    online, target = (nn.Linear(300, 300) for _ in range(2))
    twin = copy.deepcopy(target)
    sum_lines(twin, online)
    soft_update(target, online, TAU)
    for ours, theirs in zip(target.parameters(), twin.parameters(), strict=True):
        scale = ours.detach().abs().max()
        ulp = torch.nextafter(scale, scale + 1) - scale
        assert (ours - theirs).abs().max() <= ulp
        assert not torch.equal(ours, theirs)  # it is not the same arithmetic
