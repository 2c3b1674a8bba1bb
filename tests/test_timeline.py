from itertools import pairwise

import pytest
import torch
from torch import nn

from polyak_rl import (
    AverageBank,
    Between,
    Ema,
    Polynomial,
    Power,
    Tail,
    Timeline,
    Uniform,
    Warmup,
    Window,
    flatten_,
)

EVERY_RULE = [
    Ema(tau=0.01),
    Ema(half_life=20.0),
    Ema(half_life=20.0, debias=True),
    Uniform(),
    Uniform(start=37),
    Tail(0.5),
    Tail(0.13),
    Between(0.3, 0.82),
    Polynomial(gamma=3),
    Power(sigma_rel=0.1),
    Window(size=3, every=11),
    Warmup(tau=0.05, inv_gamma=9, power=1),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def recorded(n, *, policy=None, every=1, **options):
    """A timeline over a random walk, and every iterate in float64."""
    policy = policy or network()
    generator = torch.Generator().manual_seed(n)
    options.setdefault("max_weight_error", 1.0)
    timeline, iterates = Timeline(policy, every=every, **options), []
    for step in range(1, n * every + 1):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        timeline.record()
        if step % every == 0:
            iterates.append(torch.cat([p.detach().double().flatten() for p in policy.parameters()]))
    return timeline, torch.stack(iterates)


def flat(average):
    return torch.cat([tensor.flatten() for tensor in average.values()])


def given_weights(timeline, rule):
    """Per iterate, from the segments."""
    weights = []
    for first, last, weight in timeline.weights(rule):
        weights += [weight / (last - first + 1)] * (last - first + 1)
    return torch.tensor(weights, dtype=torch.float64)


LENGTHS = [1, 5, 8, 9, 97, 100, 131, 256, 509]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("options", [{}, {"expected": 100}, {"every": 7}], ids=str)
def test_an_average_is_that_of_its_segment_constant_weights(n, options):
    timeline, iterates = recorded(n, capacity=8, **options)
    for rule in EVERY_RULE:
        asked = torch.tensor(rule.weights(n, timeline.every), dtype=torch.float64)
        given = given_weights(timeline, rule)
        for first, last, weight in timeline.weights(rule):
            assert weight == pytest.approx(asked[first - 1 : last].sum().item(), abs=1e-12)
        torch.testing.assert_close(flat(timeline.average(rule)), given @ iterates)
        error = (asked - given).abs().sum().item() / 2
        assert timeline.weight_error(rule) == pytest.approx(error, abs=1e-11)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("capacity", [2, 8, 60])
@pytest.mark.parametrize("expected", [None, 100])
def test_segments_never_outgrow_the_capacity_and_cover_the_run(n, capacity, expected):
    timeline, _ = recorded(n, capacity=capacity, expected=expected)
    segments = timeline.weights(Uniform())
    assert segments[0].first == 1
    assert segments[-1].last == n
    assert all(a.last + 1 == b.first for a, b in pairwise(segments))
    assert len(segments) <= capacity + 1  # the last is open
    if n > capacity and expected is None:
        assert len(segments) >= capacity // 2


@pytest.mark.parametrize("expected", [240, 1000, 997, 4801])
def test_an_expected_run_has_every_tail_of_the_protocol_exactly(expected):
    timeline, iterates = recorded(expected, expected=expected, max_weight_error=0.0)
    for fraction in (1.0, 0.9, 0.75, 0.5, 0.25, 0.1):
        rule = Tail(fraction)
        assert timeline.weight_error(rule) == 0
        mean = iterates[rule.first(expected) :].mean(0)
        torch.testing.assert_close(flat(timeline.average(rule)), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expected", [240, 1000, 4801])
def test_an_expected_run_has_every_window_of_five_per_cent_exactly(expected):
    timeline, iterates = recorded(expected, expected=expected, max_weight_error=0.0)
    for start in range(0, 100, 5):
        rule = Between(start / 100, (start + 5) / 100)
        mean = iterates[rule.first(expected) : rule.last(expected)].mean(0)
        torch.testing.assert_close(flat(timeline.average(rule)), mean, rtol=1e-12, atol=1e-12)


def test_uniform_from_a_border_is_exact_after_merging():
    timeline, iterates = recorded(64, capacity=8)
    borders = [segment.last for segment in timeline.weights(Uniform())]
    assert len(borders) < 64
    for start in borders[:-1]:
        assert timeline.weight_error(Uniform(start=start)) == 0
        average = flat(timeline.average(Uniform(start=start)))
        torch.testing.assert_close(average, iterates[start:].mean(0), rtol=1e-12, atol=1e-12)


def test_timeline_and_bank_agree_where_the_timeline_is_exact():
    policy = network()
    bank = AverageBank(policy, {"half": Uniform(start=60), "all": Uniform()})
    timeline = Timeline(policy, expected=120)
    for _ in range(120):
        nn.init.normal_(policy[0].weight)
        bank.update()
        timeline.record()
    for name, rule in (("half", Tail(0.5)), ("all", Uniform())):
        ours, theirs = flat(timeline.average(rule)), flat(bank.average(name))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_rule_too_fine_for_the_timeline_is_refused_with_what_it_can_give():
    timeline, _ = recorded(400, capacity=40, max_weight_error=0.05)
    with pytest.raises(
        ValueError, match=r"finest half-life is about \d+ .* shortest tail \d+ of 400"
    ):
        timeline.average(Ema(half_life=5.0))
    finest = timeline.finest_half_life()
    assert 5 < finest < 400
    assert timeline.weight_error(Ema(half_life=finest)) <= 0.05
    assert timeline.weight_error(Ema(half_life=finest / 1.05)) > 0.05
    timeline.average(Ema(half_life=finest))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0), (torch.float32, 1e-6)])
def test_a_saved_timeline_answers_the_same_questions(tmp_path, dtype, tolerance):
    timeline, _ = recorded(131, capacity=8)
    timeline.save(tmp_path / "timeline.pt", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.pt"]
    like = network()
    flatten_(like)
    loaded = Timeline.load(tmp_path / "timeline.pt", like, max_weight_error=1.0)
    for rule in EVERY_RULE:
        ours, theirs = loaded.average(rule), timeline.average(rule)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    for each in (timeline, loaded):
        each.record()
    assert loaded.weights(Uniform()) == timeline.weights(Uniform())


def test_a_file_that_is_no_timeline_is_refused(tmp_path):
    timeline, _ = recorded(30, capacity=8)
    path = tmp_path / "timeline.pt"
    timeline.save(path)
    with pytest.raises(ValueError, match="another network"):
        Timeline.load(path, nn.Linear(2, 3))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is damaged, or no file of torch\.save"):
        Timeline.load(path, network())
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a timeline of format"):
        Timeline.load(path, network())


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    torch.save({"format": Hostile()}, tmp_path / "timeline.pt")
    with pytest.raises(ValueError, match="is not a timeline"):
        Timeline.load(tmp_path / "timeline.pt", network())


def test_recording_inside_a_swap_is_refused_and_swapping_works():
    timeline, iterates = recorded(20, capacity=8)
    policy = timeline._vector.module
    with timeline.applied(Uniform()):
        swapped = torch.cat([p.detach().double().flatten() for p in policy.parameters()])
        torch.testing.assert_close(swapped, iterates.mean(0), rtol=0, atol=1e-6)
        with pytest.raises(RuntimeError, match=r"record\(\) inside applied\(\)"):
            timeline.record()
    assert timeline.clock == 20
    twin = timeline.module(Uniform())
    torch.testing.assert_close(twin[0].weight.double(), timeline.average(Uniform())["0.weight"])


def test_it_states_its_bytes_and_refuses_too_many():
    policy = nn.Linear(70_000, 1, bias=False)
    assert Timeline(policy).nbytes == 256 * 70_000 * 8  # 143 MB
    with pytest.raises(ValueError, match="over max_bytes = 1,000,000"):
        Timeline(policy, max_bytes=1_000_000)


def test_recording_is_one_copy_and_a_block_is_taken_in_by_few_operations():
    policy = network()
    flatten_(policy)
    timeline = Timeline(policy, expected=200, capacity=2)  # two segments of 100
    made = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(str(func).removeprefix("aten.").split(".")[0])
            return func(*args, **(kwargs or {}))

    def operations():
        made.clear()
        with Count():
            timeline.record()
        return [name for name in made if name not in ("slice", "select", "alias")]

    blocks = [[operations() for _ in range(32)] for _ in range(5)]
    assert {name for block in blocks for made in block[1:] for name in made} == {"copy_"}
    assert [block[0] for block in blocks] == [
        ["copy_"],
        ["_to_copy", "sum", "copy_"],
        ["_to_copy", "sum", "add_", "copy_"],
        ["_to_copy", "sum", "add_", "copy_"],
        # the first segment is closed, and then what is left of the block is summed
        ["_to_copy", "sum", "add_", "div_", "_to_copy", "sum", "copy_"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1}, "capacity must be a whole number of at least 2"),
        ({"capacity": 7}, "must be even"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"expected": 0}, "expected must be at least"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Timeline(network(), **options)


def test_an_empty_timeline_says_so():
    with pytest.raises(ValueError, match=r"empty: call record\(\)"):
        Timeline(network()).average(Uniform())
