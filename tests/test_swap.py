"""Whatever happens inside applied(), no weights are mixed without a word."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from polyak_rl import (
    AverageBank,
    Ema,
    PolicyAverages,
    Tail,
    TargetNetwork,
    Timeline,
    Uniform,
    flatten_,
    hard_update,
    soft_update,
)
from polyak_rl.swap import swaps
from tests.interrupts import interrupted_at


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(policy=None, steps=7):
    policy = policy or network()
    bank = AverageBank(policy, {"uniform": Uniform(), "ema": Ema(tau=0.1)})
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        bank.update()
    return policy, bank


def snapshot(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def refused(what):
    return pytest.raises(RuntimeError, match=rf"{what}.* inside applied\(\)")


@pytest.mark.parametrize("flat", [False, True])
def test_updates_of_targets_are_refused_inside_and_go_on_after_it(flat):
    policy, bank = trained()
    if flat:
        flatten_(policy)
    other, unrelated = network(1), network(2)
    target = TargetNetwork(policy, tau=0.5)
    state = snapshot(target)
    with bank.applied("uniform"):
        for update in (
            lambda: soft_update(other, policy, 0.5),
            lambda: hard_update(policy, other),
            lambda: soft_update(dict(other.named_parameters()), dict(policy.named_parameters()), 1),
            lambda: bank.copy_to("ema", other),
            target.update,
            target.sync,
            bank.update,
            Timeline(policy).record,
            PolicyAverages(policy, {"uniform": Uniform()}).record,
            target.lag,
        ):
            with refused(""):
                update()
        soft_update(other, unrelated, 0.5)
    assert target.clock == 0
    assert equal(snapshot(target), state)
    target.update()
    bank.update()


def test_the_last_iterate_is_not_read_inside_where_an_average_is_in_its_place():
    policy = network()
    averages = PolicyAverages(policy, {"uniform": Uniform()})
    averages.record()
    with averages.applied("uniform"):
        for read in (
            averages.last,
            averages.distances,
            lambda: averages.average("last"),
            lambda: averages.module("last"),
            lambda: AverageBank(policy, {"uniform": Uniform()}).average("uniform"),
        ):
            with refused("reading the last iterate"):
                read()
    averages.last()


def test_copies_made_inside_have_the_average_and_nothing_hangs_on_them():
    policy, bank = trained()
    with bank.applied("uniform"):
        averaged = snapshot(policy)
        copies = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
        for twin in copies:
            assert equal(twin.state_dict().values(), averaged)
    for twin in copies:
        assert equal(twin.state_dict().values(), averaged)
        assert equal(pickle.loads(pickle.dumps(twin)).state_dict().values(), averaged)
        twin.load_state_dict(policy.state_dict())
    assert nn.Module.state_dict.__module__ == "torch.nn.modules.module"
    assert not hasattr(nn.Module.state_dict, "__wrapped__")


def test_blocks_left_in_another_order_say_so_and_the_last_one_brings_the_weights_back():
    policy, bank = trained()
    before = snapshot(policy)
    outer, inner = bank.applied("uniform"), bank.applied("ema")
    outer.__enter__()
    inner.__enter__()
    average = snapshot(policy)
    with pytest.raises(RuntimeError, match="reverse order of entering"):
        outer.__exit__(None, None, None)
    assert equal(snapshot(policy), average)
    with refused("state_dict"):
        policy.state_dict()
    inner.__exit__(None, None, None)
    assert equal(snapshot(policy), before)
    policy.state_dict()


def test_blocks_of_networks_that_share_an_encoder_may_be_left_in_any_order():
    encoder = nn.Linear(3, 4)
    actor, critic = (nn.Sequential(encoder, nn.Linear(4, n)) for n in (2, 1))
    banks = [trained(each)[1] for each in (actor, critic)]
    before = snapshot(actor), snapshot(critic)
    first, second = (bank.applied("uniform") for bank in banks)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="reverse order of entering"):
        first.__exit__(None, None, None)
    assert equal(snapshot(actor[1]), before[0][2:])  # what the other does not hold is back
    second.__exit__(None, None, None)
    assert equal(snapshot(actor), before[0])
    assert equal(snapshot(critic), before[1])


def test_a_second_thread_is_refused_and_the_first_goes_on():
    policy, bank = trained()
    before, errors = snapshot(policy), []

    def evaluate():
        try:
            with bank.applied("ema"):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with bank.applied("uniform"):
        average = snapshot(policy)
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert equal(snapshot(policy), average)
    assert "two threads at once" in errors[0]
    assert equal(snapshot(policy), before)
    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_a_layer_replaced_inside_is_left_and_the_old_one_gets_its_weights_back():
    policy, bank = trained()
    before, old, new = snapshot(policy), policy[0], nn.Linear(3, 4)
    values = snapshot(new)
    with (
        pytest.raises(RuntimeError, match=r"'0.weight', '0.bias' was replaced inside applied\(\)"),
        bank.applied("uniform"),
    ):
        policy[0] = new
    assert equal(snapshot(new), values)
    assert equal(snapshot(old) + snapshot(policy[2]), before)
    assert not swaps


def test_a_tensor_of_another_shape_put_in_inside_is_left_and_said():
    policy, bank = trained()
    before = snapshot(policy)
    with pytest.raises(RuntimeError, match=r"'2\.bias' was replaced"), bank.applied("uniform"):
        policy[2].bias.data = torch.zeros(5)
    assert equal(snapshot(policy)[:3], before[:3])
    assert policy[2].bias.shape == (5,)


def test_a_network_moved_inside_gets_its_weights_back_whoever_else_holds_the_old_tensors():
    policy, bank = trained()
    before, old = snapshot(policy), policy[0].weight
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with bank.applied("uniform"):
            policy.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)
    assert policy[0].weight is not old
    assert equal(snapshot(policy), [x.double() for x in before])
    assert torch.equal(old, before[0])


@pytest.mark.parametrize("nested", [False, True])
def test_an_interrupt_at_any_line_of_entering_and_leaving_brings_the_weights_back(nested):
    policy, bank = trained()
    before = snapshot(policy)

    def evaluate():
        with bank.applied("uniform"):
            if nested:
                with bank.applied("ema"):
                    pass

    n = 1
    while interrupted_at(n, evaluate):
        assert equal(snapshot(policy), before), n
        assert not swaps, n
        assert not hasattr(nn.Module.state_dict, "__wrapped__"), n
        n += 1
    assert n > 60


def test_an_interrupted_record_leaves_all_or_nothing():
    """At every line of several steps that close, join and take in, with all kinds of rules."""
    rules = {"uniform": Uniform(), "ema": Ema(tau=0.3), "tail": Tail(0.5)}

    def new():
        policy = nn.Linear(1, 1, bias=False)
        return policy, PolicyAverages(policy, rules, capacity=2, max_weight_error=1.0)

    def record(averages, policy, value):
        nn.init.constant_(policy.weight, value)
        averages.record()

    def values(averages):
        segments = [segment[:2] for segment in averages.timeline.weights(Uniform())]
        return segments, [averages.average(which)["weight"].item() for which in rules]

    policy, averages = new()
    states = []
    for step in range(12):
        record(averages, policy, float(step))
        states.append((averages.clock, values(averages)))
    for step in (2, 4, 8):
        n = 1
        while True:
            policy, averages = new()
            for i in range(step):
                record(averages, policy, float(i))
            nn.init.constant_(policy.weight, float(step))
            if not interrupted_at(n, averages.record):
                break
            clock = averages.clock
            assert averages.bank.clock == averages.timeline.clock
            assert clock in (step, step + 1)
            assert values(averages)[0] == states[clock - 1][1][0], (step, n)
            assert values(averages)[1] == pytest.approx(states[clock - 1][1][1], abs=1e-12)
            for i in range(clock, 12):
                record(averages, policy, float(i))
            assert averages.clock == 12
            assert values(averages)[0] == states[-1][1][0], (step, n)
            assert values(averages)[1] == pytest.approx(states[-1][1][1], abs=1e-12)
            n += 1
        assert n > 25
