import pytest
import torch
from torch import nn

from polyak_rl import (
    AverageBank,
    Between,
    Ema,
    PolicyAverages,
    Power,
    Tail,
    Timeline,
    Uniform,
    Window,
    flatten_,
)

RULES = {"uniform": Uniform(), "tail50": Tail(0.5), "ema": Ema(tau=0.1), "lawa": Window(2, 3)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def flatten_and_return(policy):
    flatten_(policy)
    return policy


def train(policy, steps, *recorders):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        for record in recorders:
            record()


def test_each_rule_is_answered_by_what_can_give_it_and_all_agree_with_their_weights():
    policy, iterates = network(), []
    averages = PolicyAverages(policy, RULES, capacity=60)
    train(policy, 40, averages.record, lambda: iterates.append(policy[0].weight.detach().clone()))
    assert list(averages.bank.rules) == ["uniform", "ema", "lawa"]
    for which in (*RULES, Between(0.2, 0.7), Power(gamma=2.0), Uniform(start=7)):
        rule = RULES.get(which, which) if isinstance(which, str) else which
        mean = sum(w * x.double() for w, x in zip(rule.weights(40), iterates, strict=True))
        torch.testing.assert_close(averages.average(which)["0.weight"], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_a_bank_and_a_timeline_on_one_clock(every):
    policy = network()
    averages = PolicyAverages(policy, RULES, capacity=8, expected=50, every=every)
    bank = AverageBank(policy, averages.bank.rules, every=every)
    timeline = Timeline(policy, capacity=8, expected=50, every=every)
    train(policy, 50, averages.record, bank.update, timeline.record)
    assert averages.clock == averages.bank.clock == averages.timeline.clock == 50
    for name in bank.rules:
        assert torch.equal(averages.vector(name), bank.vector(name))
    assert torch.equal(averages.vector("tail50"), timeline.vector(Tail(0.5)))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("expected", [None, 90])
def test_reading_and_saving_move_no_bit(every, expected):
    policy, generator = network(), torch.Generator().manual_seed(3)
    options = {"capacity": 4, "expected": expected, "every": every, "max_weight_error": 1.0}
    read, unread = (PolicyAverages(policy, RULES, **options) for _ in range(2))

    def look():
        if torch.rand((), generator=generator) < 0.2:
            read.vector(list(RULES)[int(4 * torch.rand((), generator=generator))])
        if torch.rand((), generator=generator) < 0.1:
            read.state_dict()

    train(policy, 100 * every, read.record, unread.record, look)
    for which in (*RULES, Power(gamma=2.0)):
        assert torch.equal(read.vector(which), unread.vector(which)), which


@pytest.mark.parametrize("every", [1, 3])
def test_weights_that_a_step_writes_are_those_that_are_recorded_between_steps(every):
    policy = network()
    policy[1].eval()
    flatten_(policy)
    options = {"capacity": 8, "every": every, "max_weight_error": 1.0}
    written, recorded = (PolicyAverages(policy, RULES, **options) for _ in range(2))

    def step():
        written.expect()
        written.write()
        written.count()

    def interrupted():  # by what comes between the step and its count
        written.expect()
        written.write()

    for records in ([step], [interrupted, step], [written.record], [step]):
        train(policy, 40 * every + 1, recorded.record, *records)
        written.load_state_dict(written.state_dict())
    assert written.clock == recorded.clock
    for which in (*RULES, Uniform(start=100)):
        assert torch.equal(written.vector(which), recorded.vector(which)), which


def test_a_block_that_records_have_filled_is_taken_in_before_a_step_writes_to_it():
    policy = flatten_and_return(nn.Linear(1, 1, bias=False))
    averages = PolicyAverages(policy, {"uniform": Uniform()}, every=2)
    for step in range(1, 201):
        nn.init.constant_(policy.weight, step)
        if 2 <= step <= 65:  # a block of 32 iterates
            averages.record()
        else:
            averages.expect()
            averages.write()
            averages.count()
    assert averages.average("uniform")["weight"].item() == pytest.approx(101)  # of 2, 4, ..., 200


def test_only_a_step_that_was_expected_is_counted():
    policy = flatten_and_return(nn.Linear(1, 1))
    averages = PolicyAverages(policy, {"uniform": Uniform()})
    averages.record()
    with pytest.raises(RuntimeError, match=r"began with expect\(\): none has begun"):
        averages.count()
    for disturb in (averages.record, lambda: averages.load_state_dict(averages.state_dict())):
        averages.expect()
        averages.write()
        disturb()
        clock = averages.clock
        with pytest.raises(RuntimeError, match=r"began with expect\(\): none has begun"):
            averages.count()
        assert averages.clock == clock
    averages.expect()
    with averages.applied("uniform"), pytest.raises(RuntimeError, match="holds an average"):
        averages.count()


def test_weights_are_written_in_a_step_only_where_one_operation_can_do_it():
    policy = network()
    plain, guarded = PolicyAverages(policy, RULES), PolicyAverages(policy, RULES, guard="finite")
    for averages in (plain, guarded):
        averages.expect()
        with pytest.raises(RuntimeError, match="without a guard of a network in flat memory"):
            averages.write()
        flatten_(policy)


def test_a_part_is_recorded_and_loaded_with_the_whole_alone():
    policy = network()
    averages = PolicyAverages(policy, RULES)
    for call in (averages.bank.update, averages.timeline.record):
        with pytest.raises(RuntimeError, match="of a part of a PolicyAverages: call its record"):
            call()
    state = averages.timeline.state_dict()
    with pytest.raises(RuntimeError, match="of a part of a PolicyAverages: load the whole"):
        averages.timeline.load_state_dict(state)
    Timeline(policy).load_state_dict(state)  # saved it can be
    assert averages.clock == 0


def test_before_the_first_iterate_every_average_is_the_network_as_it_is():
    policy = network()
    averages = PolicyAverages(policy, RULES, every=5)
    train(policy, 4, averages.record)
    online = {name: x.detach().clone() for name, x in policy.named_parameters()}
    for which in (*RULES, "last", Tail(0.1)):
        assert averages.ready(which)
        assert all(torch.equal(x.float(), online[n]) for n, x in averages.average(which).items())
        with averages.applied(which) as inside:
            assert inside is policy
    assert all(torch.equal(x, online[name]) for name, x in averages.last().items())


def test_last_is_the_network_as_it_is_at_any_time():
    policy = network()
    averages = PolicyAverages(policy, {"uniform": Uniform()})
    train(policy, 5, averages.record)
    for name, parameter in policy.named_parameters():
        assert torch.equal(averages.average("last")[name].float(), parameter)
        assert torch.equal(averages.last()[name], parameter)
    with pytest.raises(ValueError, match="'last' is the network as it is"):
        PolicyAverages(policy, {"last": Uniform()})


def test_an_average_that_the_timeline_is_too_coarse_for_is_refused_and_known_not_to_be_ready():
    policy = network()
    averages = PolicyAverages(policy, {"tail10": Tail(0.1), "uniform": Uniform()}, capacity=2)
    train(policy, 40, averages.record)
    assert not averages.ready("tail10")
    assert averages.ready("uniform")
    with pytest.raises(ValueError, match="too coarse for Tail"):
        averages.average("tail10")
    assert list(averages.distances()) == ["uniform"]
    with pytest.raises(ValueError, match="there is no average 'tail11'"):
        averages.ready("tail11")


def test_distances_are_relative_and_of_each_member():
    policy = nn.Module()
    policy.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    averages = PolicyAverages(policy, {"uniform": Uniform()})
    averages.record()
    with torch.no_grad():
        policy.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    averages.record()
    torch.testing.assert_close(
        averages.distances(members=2)["uniform"], torch.tensor([2.0 / 3.0, 0.0]).double()
    )
    torch.testing.assert_close(
        averages.distances()["uniform"], torch.tensor([(4 / 10) ** 0.5]).double()
    )


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({}, 256),
        ({"expected": 10_000}, 256),
        ({"expected": 30}, 40),
        ({"expected": 30, "every": 10}, 20),
        ({"max_bytes": 16 * 8 * 23}, 16),
        ({"max_bytes": 1}, None),
        ({"capacity": 6, "expected": 30}, 6),
    ],
)
def test_the_capacity_is_what_the_run_needs_and_memory_holds(options, capacity):
    policy = nn.Linear(22, 1)  # 23 weights
    if capacity is None:
        with pytest.raises(ValueError, match="raise max_bytes"):
            PolicyAverages(policy, {}, **options)
    else:
        assert PolicyAverages(policy, {}, **options).timeline.capacity == capacity


def test_what_cannot_be_kept_is_refused():
    policy = network()
    with pytest.raises(ValueError, match="'half' is a Tail, which needs timeline=True"):
        PolicyAverages(policy, {"half": Tail(0.5)}, timeline=False)
    with pytest.raises(ValueError, match="nothing to average"):
        PolicyAverages(policy, {}, timeline=False)
    averages = PolicyAverages(policy, {"mean": Uniform()}, timeline=False)
    train(policy, 3, averages.record)
    with pytest.raises(ValueError, match="was not recorded: name it in rules"):
        averages.average(Tail(0.5))


def test_saved_averages_go_on_as_the_original_does(tmp_path):
    policy = network()
    averages = PolicyAverages(policy, RULES, capacity=8, expected=60, every=2)
    train(policy, 35, averages.record)
    averages.save(tmp_path / "averages")
    resumed = PolicyAverages.load(tmp_path / "averages", policy)
    assert resumed.rules == averages.rules
    train(policy, 25, averages.record, resumed.record)
    for which in RULES:
        assert torch.equal(averages.vector(which), resumed.vector(which))


def test_other_averages_are_refused(tmp_path):
    policy = network()
    averages = PolicyAverages(policy, RULES)
    for other in (
        PolicyAverages(policy, {"uniform": Uniform()}),
        PolicyAverages(policy, RULES, every=2),
        PolicyAverages(policy, RULES, capacity=8),
    ):
        with pytest.raises(ValueError, match="the saved averages differ in"):
            averages.load_state_dict(other.state_dict())
    torch.save({"weights": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is not averages of format"):
        PolicyAverages.load(tmp_path / "other", policy)
    (tmp_path / "other").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"is damaged, or no file of torch\.save"):
        PolicyAverages.load(tmp_path / "other", policy)


@pytest.mark.parametrize("kind", ["flat", "averaged buffers", "complex"])
def test_as_many_segments_as_memory_holds_are_counted_as_the_weights_lie_there(kind):
    policy = {
        "flat": lambda: flatten_and_return(nn.Linear(2, 3)),  # with room between the parameters
        "averaged buffers": network,
        "complex": lambda: nn.Linear(2, 3, dtype=torch.complex64),
    }[kind]()
    timeline = PolicyAverages(policy, {}, buffers="average", max_bytes=20_000).timeline
    two_segments = 2 * timeline.nbytes / timeline.capacity
    assert 20_000 - two_segments < timeline.nbytes <= 20_000
