import math

import pytest
import torch
from torch import nn

from polyak_rl import AverageBank, Ema, TargetNetwork, Timeline, Uniform, Window, flatten_
from polyak_rl.guard import all_finite

BAD = [math.nan, math.inf, -math.inf]


def network(flat):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    if flat:
        flatten_(net)
    return net


def course(net, steps, bad_at, value):
    """Weights of each step; at the bad ones a single element is NaN or Inf."""
    generator = torch.Generator().manual_seed(1)
    for k in range(1, steps + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if k in bad_at:
                net[2].weight[1, 2] = value
        yield k


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("flat", [False, True])
def test_a_guarded_target_is_as_if_the_bad_steps_had_not_been(flat, value):
    bad = {2, 5, 6}
    guarded, plain = network(flat), network(flat)
    target = TargetNetwork(guarded, tau=0.3, guard="finite")
    reference = TargetNetwork(plain, tau=0.3)
    for k, _ in zip(course(guarded, 9, bad, value), course(plain, 9, bad, value), strict=True):
        target.update()
        if k not in bad:
            reference.update()
    for ours, theirs in zip(target.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (target.clock, target.skipped, reference.clock) == (6, 3, 6)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("flat", [False, True])
def test_guarded_averages_are_as_if_the_bad_steps_had_not_been(flat, value):
    rules = {"uniform": Uniform(), "ema": Ema(half_life=3.0), "window": Window(2, 2)}
    bad = {1, 7, 40, 41}
    guarded, plain = network(flat), network(flat)
    bank, reference = AverageBank(guarded, rules, guard="finite"), AverageBank(plain, rules)
    line, line_reference = (
        Timeline(guarded, capacity=8, guard="finite"),
        Timeline(plain, capacity=8),
    )
    for k, _ in zip(course(guarded, 70, bad, value), course(plain, 70, bad, value), strict=True):
        bank.update()
        line.record()
        if k not in bad:
            reference.update()
            line_reference.record()
    for name in rules:
        assert torch.equal(bank.vector(name), reference.vector(name)), name
    assert torch.equal(line.vector(Uniform()), line_reference.vector(Uniform()))
    assert (bank.clock, bank.skipped) == (line.clock, line.skipped) == (66, 4)


def test_without_a_guard_a_nan_gets_through():
    net = network(flat=True)
    target, bank = TargetNetwork(net, tau=0.3), AverageBank(net, {"uniform": Uniform()})
    for _ in course(net, 1, {1}, math.nan):
        target.update()
        bank.update()
    assert target.module[2].weight.isnan().any()
    assert bank.vector("uniform").isnan().any()


def test_bad_weights_between_two_recordings_do_not_count():
    net = network(flat=True)
    bank = AverageBank(net, {"uniform": Uniform()}, every=3, guard="finite")
    for _ in course(net, 9, {1, 2, 6}, math.nan):
        bank.update()
    # the call after the one left out takes its place: iterates 3, 7 and, at the 9th call, none yet
    assert (bank.clock, bank.skipped) == (8, 1)
    assert bank.vector("uniform").isfinite().all()


def test_what_the_guard_left_out_survives_saving():
    net = network(flat=False)
    keepers = (
        TargetNetwork(net, guard="finite"),
        AverageBank(net, {"uniform": Uniform()}, guard="finite"),
        Timeline(net, guard="finite"),
    )
    again = (
        TargetNetwork(net, guard="finite"),
        AverageBank(net, {"uniform": Uniform()}, guard="finite"),
        Timeline(net, guard="finite"),
    )
    for _ in course(net, 3, {2}, math.nan):
        for keeper in keepers[:2]:
            keeper.update()
        keepers[2].record()
    for ours, theirs in zip(keepers, again, strict=True):
        theirs.load_state_dict(ours.state_dict())
        assert (theirs.clock, theirs.skipped) == (2, 1)


def test_a_bad_statistic_of_batch_norm_counts_for_the_target_too():
    net = network(flat=False)
    target = TargetNetwork(net, guard="finite")
    net[1].running_var.fill_(math.nan)
    target.update()
    assert target.skipped == 1
    assert target.module[1].running_var.isfinite().all()


def test_large_finite_weights_are_no_reason_to_skip():
    assert all_finite([torch.full((4,), 3e38), torch.full((4,), 3e38, dtype=torch.float64)])
    assert all_finite([torch.full((4,), 6e4, dtype=torch.float16), torch.arange(3)])
    for value in BAD:
        assert not all_finite([torch.zeros(3), torch.tensor([0.0, value])])


def test_an_unknown_guard_is_refused():
    for keeper in (
        lambda net: TargetNetwork(net, guard="nan"),
        lambda net: AverageBank(net, {"uniform": Uniform()}, guard="nan"),
        lambda net: Timeline(net, guard="nan"),
    ):
        with pytest.raises(ValueError, match="guard must be 'finite' or None, got 'nan'"):
            keeper(network(flat=False))
