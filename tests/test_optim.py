"""ASGD and PolyakSGD against published numbers, slow float64 references and worked edge cases."""

import copy
import io
import math
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from polyak_rl.optim import ASGD, PolyakSGD, polyak_stepsize
from polyak_rl.rules import Uniform

cuda = pytest.mark.cuda


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)


def descend(optimizer: PolyakSGD, x: Tensor, steps: int, offset: float = 0.0) -> list[float]:
    """Minimise sum x^2 + offset; return its value after each step."""
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = x.square().sum() + offset
        loss.backward()
        optimizer.step(loss=loss)
        values.append(x.square().sum().item() + offset)
    return values


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ASGD


def ramp(optimizer: ASGD, x: Tensor, steps: int) -> list[float]:
    """Take x through 1, 2, 3, ...; return the average after each step."""
    averages = []
    for _ in range(steps):
        x.grad = torch.full_like(x, -1.0)
        optimizer.step()
        with optimizer.averaged():
            averages.append(x.item())
    return averages


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("t0", "averages"),
    [
        (0, [1, 2, 2.5, 3, 3.5, 4, 4.5, 5]),
        (3, [1, 2, 3, 4, 5, 5.5, 6, 6.5]),
    ],
)
def test_asgd_averages_a_ramp_from_iterate_t0_plus_2(t0, averages, foreach):
    x = torch.zeros(1, requires_grad=True)
    optimizer = ASGD([x], lr=1.0, lambd=0.0, alpha=0.0, t0=t0, foreach=foreach)
    assert ramp(optimizer, x, 8) == pytest.approx(averages, rel=1e-6)
    assert x.item() == 8


def asgd_reference(steps: int, lr: float, lambd: float, alpha: float, t0: int):
    """Take the steps in plain Python; return the first coordinate and its average."""
    x, eta, iterates, averages = 1.0, lr, [], []
    for n in range(1, steps + 1):
        x = (1 - lambd * eta) * x - eta * 2 * x
        eta = lr / (1 + lambd * lr * n) ** alpha
        iterates.append(x)
        averaged = iterates[t0 + 1 :] or [x]
        averages.append(sum(averaged) / len(averaged))
    return iterates, averages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_asgd_walks_and_averages_as_published_and_as_the_reference(dtype):
    x = start(dtype)
    optimizer = ASGD([x], lr=0.1, lambd=0.01, alpha=0.75, t0=2)
    iterates, averages = [], []
    for _ in range(6):
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
        iterates.append(x[0].item())
        with optimizer.averaged():
            averages.append(x[0].item())

    published = [0.798999997, 0.6385213448, 0.5103707353, 0.4080164275, 0.3262503008, 0.2609188323]
    published_averages = [*published[:4], 0.3671333641, 0.3317285191]
    # torch keeps eta and mu in float32 whatever the parameters are.
    assert iterates == pytest.approx(published, rel=1e-5 if dtype == torch.float32 else 1e-8)
    assert averages == pytest.approx(
        published_averages, rel=1e-5 if dtype == torch.float32 else 1e-8
    )
    slow, slow_averages = asgd_reference(6, 0.1, 0.01, 0.75, 2)
    assert iterates == pytest.approx(slow, rel=1e-5)
    assert averages == pytest.approx(slow_averages, rel=1e-5)


def test_asgd_averages_by_default():
    assert ASGD([start()]).param_groups[0]["t0"] == 0
    assert torch.optim.ASGD([start()]).param_groups[0]["t0"] == 1e6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[list[Tensor]]:
    """Return the parameters after each step on random batches."""
    generator = torch.Generator().manual_seed(1)
    iterates = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 3, generator=generator)).square().mean()
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, PolyakSGD) else optimizer.step()
        iterates.append([p.detach().double() for p in model.parameters()])
    return iterates


def test_asgd_shows_the_mean_of_the_iterates_and_restores_the_last_bit_for_bit():
    model = network()
    optimizer = ASGD(model.parameters(), lr=0.1, t0=3)
    iterates = train(model, optimizer, 10)
    last = [p.detach().clone() for p in model.parameters()]
    means = [torch.stack(values[4:]).mean(0) for values in zip(*iterates, strict=True)]
    with optimizer.averaged():
        for p, mean in zip(model.parameters(), means, strict=True):
            torch.testing.assert_close(p.detach().double(), mean, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), last, strict=True))


@pytest.mark.parametrize("t0", [0, 3])
def test_asgd_averages_as_the_uniform_rule_does(t0):
    model = network()
    optimizer = ASGD(model.parameters(), lr=0.1, t0=t0)
    iterates = train(model, optimizer, 8)
    weights = Uniform(start=t0 + 1).weights(8)
    state = optimizer.averaged_state_dict(model)
    for i, (name, _) in enumerate(model.named_parameters()):
        expected = sum(w * iterate[i] for w, iterate in zip(weights, iterates, strict=True))
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_averaged_restores_on_an_exception_and_when_nested():
    x = torch.zeros(1, requires_grad=True)
    optimizer = ASGD([x], lr=1.0, lambd=0.0, alpha=0.0)
    ramp(optimizer, x, 4)
    with pytest.raises(KeyError, match="evaluation"), optimizer.averaged():
        raise KeyError("evaluation")
    assert x.item() == 4
    with optimizer.averaged():
        with optimizer.averaged():
            assert x.item() == 3
        assert x.item() == 3
    assert x.item() == 4


def test_a_step_inside_averaged_is_refused_and_a_step_after_it_is_not():
    x = torch.zeros(1, requires_grad=True)
    optimizer = ASGD([x], lr=1.0, lambd=0.0, alpha=0.0)
    ramp(optimizer, x, 4)
    with pytest.raises(RuntimeError, match="would train the average"), optimizer.averaged():
        optimizer.step()
    assert x.item() == 4
    optimizer.step()
    assert x.item() == 5


def test_there_is_no_average_before_the_first_step():
    model = network()
    optimizer = ASGD(model.parameters())
    with pytest.raises(RuntimeError, match="no average yet"), optimizer.averaged():
        pass
    with pytest.raises(RuntimeError, match="no average yet"):
        optimizer.averaged_state_dict(model)


def test_averaged_state_dict_is_an_independent_copy_with_the_buffers_of_the_model():
    model = network()
    optimizer = ASGD(model.parameters(), lr=0.1)
    train(model, optimizer, 5)
    state = optimizer.averaged_state_dict(model)
    with optimizer.averaged():
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        inside = optimizer.averaged_state_dict(model)
    assert not torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(state["1.running_mean"], model[1].running_mean)

    before = {k: v.clone() for k, v in state.items()}
    train(model, optimizer, 1)
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert all(torch.equal(inside[k], v) for k, v in before.items())
    network().load_state_dict(state)


def test_averaged_state_dict_keeps_frozen_weights_and_fills_tied_ones():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)
    model = nn.Sequential(first, second, frozen)
    optimizer = ASGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    state = optimizer.averaged_state_dict(model)
    with optimizer.averaged():
        assert torch.equal(state["0.weight"], first.weight)
        assert torch.equal(state["1.weight"], first.weight)
    assert torch.equal(state["2.weight"], frozen.weight)


def test_averaged_state_dict_refuses_a_stranger():
    model = network()
    optimizer = ASGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="Sequential has none of the parameters"):
        optimizer.averaged_state_dict(network())


def test_the_average_survives_a_checkpoint():
    model = network()
    optimizer = ASGD(model.parameters(), lr=0.1)
    train(model, optimizer, 4)
    average = optimizer.averaged_state_dict(model)
    twin = copy.deepcopy(model)
    loaded = ASGD(twin.parameters(), lr=0.1)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert all(torch.equal(loaded.averaged_state_dict(twin)[k], v) for k, v in average.items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"lambd": -1.0}, "lambd must be at least 0 and finite, got -1.0"),
        ({"alpha": -0.1}, "alpha must be at least 0 and finite, got -0.1"),
        ({"t0": math.inf}, "t0 must be at least 0 and finite, got inf"),
        ({"t0": -1}, "t0 must be at least 0 and finite, got -1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0 and finite, got nan"),
    ],
)
def test_asgd_refuses_nonsense_in_its_arguments_and_in_its_groups(option, message):
    with pytest.raises(ValueError, match=message):
        ASGD([start()], **option)
    with pytest.raises(ValueError, match=message):
        ASGD([{"params": [start()], **option}])


# Polyak's step size


@given(
    value=st.floats(-1e6, 1e6),
    squared_norm=st.floats(0, 1e6),
    max_stepsize=st.floats(0, 10),
    f_min=st.floats(-10, 10),
    delta=st.floats(0, 1),
)
def test_the_step_size_is_the_clamped_quotient_and_never_nan(
    value, squared_norm, max_stepsize, f_min, delta
):
    step = polyak_stepsize(
        torch.tensor(value, dtype=torch.float64),
        torch.tensor(squared_norm, dtype=torch.float64),
        max_stepsize,
        f_min=f_min,
        delta=delta,
    ).item()
    if squared_norm == 0 or value <= f_min:
        expected = 0.0
    else:
        quotient = (value - f_min) / (squared_norm + delta)
        expected = min(quotient, max_stepsize)
    assert step == pytest.approx(expected, rel=1e-12)
    assert 0 <= step <= max_stepsize


def test_the_step_size_has_a_finite_derivative_at_a_minimum():
    x = torch.zeros(3, requires_grad=True)
    value = x.square().sum()
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    step = polyak_stepsize(value, g.square().sum(), 1.0)
    assert torch.equal(torch.autograd.grad(step, x)[0], torch.zeros(3))


# PolyakSGD


def reference(
    steps: int,
    *,
    max_stepsize: float = 1.0,
    delta: float = 0.0,
    momentum: float = 0.0,
    variant: str = "sps_max",
    c: float = 1.0,
    growth: float = math.inf,
) -> list[float]:
    """Minimise sum x^2 from (1, 2, 3) in plain Python floats; return f after each step."""
    x, v, previous, values = [1.0, 2.0, 3.0], [0.0] * 3, math.inf, []
    for _ in range(steps):
        f, g = sum(z * z for z in x), [2 * z for z in x]
        step = min(f / (c * sum(z * z for z in g) + delta), max_stepsize)
        if variant == "sps_smooth":
            step = min(step, growth * previous)
        previous = step
        v = [momentum * vi - step * gi for vi, gi in zip(v, g, strict=True)]
        if variant == "alig":
            x = [xi - step * gi + momentum * vi for xi, gi, vi in zip(x, g, v, strict=True)]
        else:
            x = [xi + vi for xi, vi in zip(x, v, strict=True)]
        values.append(sum(z * z for z in x))
    return values


HALVES = [3.5, 0.875, 0.21875, 0.0546875, 0.01367188]
CAPPED = [8.96, 5.7344, 3.670016, 2.348810, 1.503238]
PUBLISHED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "default": ({}, HALVES),
    "momentum": ({"momentum": 0.9}, [3.5, 0.56, 7.460599, 9.925494, 3.811853]),
    "delta": ({"delta": 1.0}, [3.623884, 1.026677, 0.367034, 0.181176, 0.113045]),
    "capped": ({"max_stepsize": 0.1}, CAPPED),
    "SPS+": ({"variant": "sps+"}, HALVES),
    "SPS, c 2": ({"c": 2.0}, [14 * 0.75 ** (2 * n) for n in range(1, 6)]),
    "SPS, c 1/2, capped": ({"c": 0.5, "max_stepsize": 0.1}, CAPPED),
    "SPS smooth": ({"variant": "sps_smooth"}, HALVES),
    "ALI-G": (
        {"variant": "alig", "max_stepsize": 0.1, "momentum": 0.9, "delta": 1e-5},
        [5.3816, 0.692465, 0.164362, 1.477140, 2.419495],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("options", "values"), PUBLISHED.values(), ids=PUBLISHED)
def test_polyak_sgd_follows_the_published_sequences_and_the_reference(options, values, dtype):
    x = start(dtype)
    walked = descend(PolyakSGD([x], **options), x, 5)
    assert walked == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert walked == pytest.approx(
        reference(5, **options), rel=1e-12 if dtype == torch.float64 else 1e-5
    )


def test_polyak_sgd_follows_optax_from_the_start():
    x = start()
    sequence = [x.square().sum().item(), *descend(PolyakSGD([x]), x, 5)]
    assert sequence == pytest.approx([14, 3.5, 0.875, 0.21875, 0.0546875, 0.013671875], rel=1e-12)


def test_the_smooth_variant_grows_by_its_factor_at_most():
    # f = |x|: the gradient stays 1 and the step size is |x|, so that growth is what limits it.
    x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = PolyakSGD([x], max_stepsize=10.0, variant="sps_smooth", growth=1.5)
    taken = []
    for position in (1.0, 100.0, 100.0, 0.5, 100.0):
        with torch.no_grad():
            x.fill_(position)
        descend_once(optimizer, x, torch.abs)
        taken.append(optimizer.param_groups[0]["stepsize"].item())
    assert taken == pytest.approx([1.0, 1.5, 2.25, 0.5, 0.75])


def descend_once(optimizer: PolyakSGD, x: Tensor, f: Callable[[Tensor], Tensor]) -> None:
    optimizer.zero_grad()
    loss = f(x).sum()
    loss.backward()
    optimizer.step(loss=loss)


def test_one_zero_gradient_does_not_freeze_the_smooth_variant():
    x = start()
    optimizer = PolyakSGD([x], variant="sps_smooth")
    descend_once(optimizer, x, torch.square)
    descend_once(optimizer, x, lambda z: 0 * z)  # loss and gradient are zero once
    assert optimizer.param_groups[0]["stepsize"].item() == 0
    before = x.square().sum().item()
    assert descend(optimizer, x, 1)[0] == pytest.approx(before / 4)


def test_the_smooth_variant_respects_the_cap_and_f_min():
    x = start()
    optimizer = PolyakSGD([x], max_stepsize=0.1, variant="sps_smooth")
    descend(optimizer, x, 3)
    assert optimizer.param_groups[0]["stepsize"].item() == pytest.approx(0.1)
    y = start()
    assert descend(PolyakSGD([y], f_min=14.0, variant="sps_smooth"), y, 1) == [14.0]


VARIANTS = ["sps_max", "sps+", "sps_smooth", "alig"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_exact_minimum_is_left_alone(variant, momentum):
    x = torch.zeros(3, requires_grad=True)
    descend(PolyakSGD([x], variant=variant, momentum=momentum), x, 3)
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_is_taken_uphill_where_the_loss_is_below_f_min(variant):
    x = start()
    optimizer = PolyakSGD([x], variant=variant)
    assert descend(optimizer, x, 1, offset=-20.0) == [-6.0]
    assert optimizer.param_groups[0]["stepsize"].item() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_to_its_cap(variant):
    x = start()
    optimizer = PolyakSGD([x], max_stepsize=0.01, variant=variant)
    descend(optimizer, x, 1)
    assert optimizer.param_groups[0]["stepsize"].item() == pytest.approx(0.01)


def test_sps_plus_stands_still_at_a_gradient_that_is_zero_to_rounding():
    x = torch.full((1,), 1e-5, requires_grad=True)  # |g|^2 = 4e-10 < 1.2e-7
    descend(PolyakSGD([x], variant="sps+"), x, 1)
    assert x.item() == pytest.approx(1e-5)
    descend(PolyakSGD([x]), x, 1)
    assert x.item() == pytest.approx(5e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("poison", ["loss", "gradient", "infinite gradient"])
def test_a_step_that_is_not_finite_is_skipped_on_request(variant, momentum, poison):
    x = start()
    optimizer = PolyakSGD([x], variant=variant, momentum=momentum, skip_nonfinite=True)
    descend(optimizer, x, 2)
    before, velocity = x.detach().clone(), copy.deepcopy(optimizer.state[x].get("velocity"))
    loss = torch.tensor(math.nan if poison == "loss" else 1.0)
    if poison != "loss":
        x.grad[1] = math.inf if poison == "infinite gradient" else math.nan
    optimizer.step(loss=loss)
    assert torch.equal(x, before)
    assert optimizer.param_groups[0]["stepsize"].item() == 0
    if momentum:
        assert torch.equal(optimizer.state[x]["velocity"], velocity)
    assert all(map(math.isfinite, descend(optimizer, x, 2)))


def test_nan_spreads_where_it_is_not_refused():
    x = start()
    optimizer = PolyakSGD([x])
    x.grad = torch.ones_like(x)
    optimizer.step(loss=torch.tensor(math.nan))
    assert x.isnan().all()


def test_skipping_changes_no_finite_step():
    x, y = start(), start()
    assert descend(PolyakSGD([x], momentum=0.9), x, 5) == descend(
        PolyakSGD([y], momentum=0.9, skip_nonfinite=True), y, 5
    )


def test_f_min_may_be_a_function_or_a_tensor():
    x, y, z = start(), start(), start()
    asked = []

    def f_min() -> float:
        asked.append(1)
        return 7.0

    half_way = descend(PolyakSGD([x], f_min=7.0), x, 1)
    assert half_way == pytest.approx([14 * (1 - 2 / 8) ** 2])
    assert descend(PolyakSGD([y], f_min=f_min), y, 1) == half_way
    assert descend(PolyakSGD([z], f_min=torch.tensor(7.0)), z, 1) == half_way
    assert len(asked) == 1


def test_the_norm_is_taken_over_all_groups_and_each_group_has_its_cap():
    x, y = torch.ones(2, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    optimizer = PolyakSGD([{"params": [x]}, {"params": [y], "max_stepsize": 0.1}])
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    loss = x.square().sum() + y.square().sum()  # f = 14, |g|^2 = 4 f
    loss.backward()
    optimizer.step(loss=loss)
    assert [g["stepsize"].item() for g in optimizer.param_groups] == pytest.approx([0.25, 0.1])
    assert x.tolist() == pytest.approx([0.5] * 2)
    assert y.tolist() == pytest.approx([1.6] * 3)


def test_many_tensors_step_as_one_vector():
    x = start()
    parts = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (1, 2, 3)]
    unused = torch.ones(1, requires_grad=True)
    whole = PolyakSGD([x], momentum=0.5)
    split = PolyakSGD([*parts, unused], momentum=0.5)
    for _ in range(4):
        descend(whole, x, 1)
        split.zero_grad()
        loss = sum(part.square().sum() for part in parts)
        loss.backward()
        split.step(loss=loss)
    assert torch.cat(parts).tolist() == pytest.approx(x.tolist(), rel=1e-12)
    assert unused.item() == 1


def test_parameters_of_several_dtypes_share_one_step_size():
    tensors = [
        torch.ones(2, dtype=dtype, requires_grad=True)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    optimizer = PolyakSGD(tensors)
    loss = sum(t.double().square().sum() for t in tensors)
    loss.backward()
    optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["stepsize"].dtype == torch.float64
    for t in tensors:
        assert t.tolist() == pytest.approx([0.5, 0.5], rel=1e-6)


def test_the_squared_norm_of_half_precision_gradients_does_not_overflow():
    x = torch.full((4,), 300.0, dtype=torch.float16, requires_grad=True)  # |g|^2 = 1.44e6 > 65504
    optimizer = PolyakSGD([x])
    x.grad = 2 * x.detach()
    optimizer.step(loss=4 * 300.0**2)
    assert x.tolist() == [150.0] * 4


def test_a_scheduler_moves_the_cap():
    x = start()
    optimizer = PolyakSGD([x], max_stepsize=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    caps = []
    for _ in range(3):
        descend(optimizer, x, 1)
        scheduler.step()
        caps.append(optimizer.param_groups[0]["stepsize"].item())
    assert caps == pytest.approx([0.1, 0.05, 0.025])


def test_a_one_cycle_scheduler_moves_cap_and_momentum():
    x = start()
    optimizer = PolyakSGD([x], momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    for _ in range(9):
        descend(optimizer, x, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.01
    assert optimizer.param_groups[0]["momentum"] != 0.9


def test_a_tensor_as_cap_is_followed():
    x = start()
    cap = torch.tensor(0.1)
    optimizer = PolyakSGD([x], max_stepsize=cap)
    descend(optimizer, x, 1)
    cap.fill_(0.05)
    descend(optimizer, x, 1)
    assert optimizer.param_groups[0]["stepsize"].item() == pytest.approx(0.05)


def test_a_closure_gives_the_loss_and_is_returned():
    x = start()
    optimizer = PolyakSGD([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 14
    assert x.square().sum().item() == pytest.approx(3.5)


def test_grad_scaler_is_given_the_unscaled_loss_and_skips_what_overflows():
    x = start(torch.float32)
    optimizer = PolyakSGD([x])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = x.square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer, loss=loss)
    scaler.update()
    assert x.square().sum().item() == pytest.approx(3.5)

    x.grad.fill_(math.inf)
    scaler.step(optimizer, loss=loss)
    scaler.update()
    assert x.square().sum().item() == pytest.approx(3.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(variant):
    options = {"variant": variant, "momentum": 0.9, "growth": 1.1, "max_stepsize": 0.1}
    x = start()
    whole = descend(PolyakSGD([x], **options), x, 8)

    y = start()
    optimizer = PolyakSGD([y], **options)
    first = descend(optimizer, y, 4)
    resumed = PolyakSGD([y], **options)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert first + descend(resumed, y, 4) == whole


def test_a_deep_copy_keeps_f_min():
    copied = copy.deepcopy(PolyakSGD([start()], f_min=7.0))
    (x,) = copied.param_groups[0]["params"]
    assert descend(copied, x, 1) == pytest.approx([14 * (1 - 2 / 8) ** 2])


def test_the_optimizer_follows_a_model_that_changes_its_dtype():
    model = nn.Linear(3, 1)
    optimizer = PolyakSGD(model.parameters())
    train(model, optimizer, 1)
    model.double()
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3, dtype=torch.float64)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["stepsize"].dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_step_reads_nothing_back_from_the_device(variant, skip_nonfinite):
    # Tensors on the meta device have no values: reading one raises.
    x = torch.ones(3, device="meta", requires_grad=True)
    optimizer = PolyakSGD([x], variant=variant, momentum=0.9, skip_nonfinite=skip_nonfinite)
    with pytest.raises(RuntimeError, match="item"):
        x.sum().item()
    descend_once(optimizer, x, torch.square)
    descend_once(optimizer, x, torch.square)
    assert optimizer.param_groups[0]["stepsize"].device.type == "meta"


def test_the_step_size_stays_in_one_tensor():
    x = start()
    optimizer = PolyakSGD([x])
    descend(optimizer, x, 1)
    stepsize = optimizer.param_groups[0]["stepsize"]
    descend(optimizer, x, 1)
    assert optimizer.param_groups[0]["stepsize"] is stepsize


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_stepsize": -1.0}, "max_stepsize must be at least 0, got -1.0"),
        ({"max_stepsize": math.nan}, "max_stepsize must be at least 0, got nan"),
        ({"delta": -1.0}, "delta must be at least 0 and finite, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"variant": "sps"}, "variant must be one of .*, got 'sps'"),
        ({"c": 0.0}, "c must be positive and finite, got 0.0"),
        ({"growth": 0.5}, "growth must be at least 1 and finite, got 0.5"),
    ],
)
def test_polyak_sgd_refuses_nonsense_in_its_arguments_and_in_its_groups(option, message):
    with pytest.raises(ValueError, match=message):
        PolyakSGD([start()], **option)
    with pytest.raises(ValueError, match=message):
        PolyakSGD([{"params": [start()], **option}])


def test_polyak_sgd_refuses_an_f_min_that_is_not_finite():
    with pytest.raises(ValueError, match="f_min must be finite or a function, got nan"):
        PolyakSGD([start()], f_min=math.nan)


def test_the_loss_is_asked_for_once_and_must_be_one_number():
    x = start()
    optimizer = PolyakSGD([x])
    x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="takes the loss once"):
        optimizer.step()
    with pytest.raises(ValueError, match="takes the loss once"):
        optimizer.step(lambda: 1.0, loss=1.0)
    with pytest.raises(ValueError, match="closure must return the loss"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match=r"one number, got shape \(3,\)"):
        optimizer.step(loss=torch.ones(3))
    x.grad = torch.ones_like(x).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step(loss=1.0)


def test_without_gradients_nothing_moves():
    x = start()
    assert PolyakSGD([x]).step(loss=1.0) == 1.0
    assert x.tolist() == [1, 2, 3]


@cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_polyak_step_equals_an_eager_one(variant):
    options = {"variant": variant, "momentum": 0.9, "max_stepsize": 0.1, "skip_nonfinite": True}
    x, y = (start().detach().cuda().requires_grad_() for _ in range(2))
    eager = descend(PolyakSGD([x], **options), x, 6)

    optimizer = PolyakSGD([y], **options)
    y.grad = torch.zeros_like(y)
    loss = torch.zeros((), dtype=y.dtype, device="cuda")

    def backward() -> None:  # by hand, in place, so that the graph holds the optimizer alone
        with torch.no_grad():
            loss.copy_(y.square().sum())
            y.grad.copy_(2 * y)

    backward()
    optimizer.step(loss=loss)
    backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(loss=loss)
    values = [y.square().sum().item()]
    for _ in range(5):
        backward()
        graph.replay()
        values.append(y.square().sum().item())
    assert values == pytest.approx(eager, rel=1e-9)


@cuda
def test_capturing_the_first_polyak_step_is_refused():
    x = torch.ones(3, device="cuda", requires_grad=True)
    x.grad = torch.ones_like(x)
    optimizer, loss = PolyakSGD([x]), torch.ones((), device="cuda")
    with (
        pytest.raises(RuntimeError, match="take one PolyakSGD step before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step(loss=loss)


@cuda
def test_a_capturable_asgd_averages_as_an_eager_one():
    averages = []
    for capturable in (False, True):
        x = torch.zeros(1, device="cuda", requires_grad=True)
        optimizer = ASGD([x], lr=1.0, lambd=0.0, alpha=0.0, capturable=capturable)
        averages.append(ramp(optimizer, x, 8))
    assert averages[0] == pytest.approx(averages[1])


# What holds for both


class Interrupt:
    """KeyboardInterrupt at the n-th line that polyak_rl/optim.py runs."""

    def __init__(self, line: int) -> None:
        self.line, self.ran = line, 0

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith("polyak_rl/optim.py"):
            return None
        if event == "line":
            self.ran += 1
            if self.ran == self.line:
                raise KeyboardInterrupt
        return self.trace

    def run(self, act: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            act()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)


@pytest.mark.parametrize(
    "options",
    [
        {"max_stepsize": 0.5},
        {"momentum": 0.5, "skip_nonfinite": True},
        {"variant": "sps_smooth", "momentum": 0.5},
        {"variant": "alig", "momentum": 0.5, "delta": 1e-5},
    ],
)
def test_an_interrupt_leaves_all_of_a_polyak_step_or_nothing(options):
    def make():
        parameters = [start(torch.float32), start()]
        optimizer = PolyakSGD(parameters, **options)
        for _ in range(2):
            take(optimizer, parameters)
        loss = ready(parameters)
        return optimizer, parameters, loss

    def ready(parameters):
        for p in parameters:
            p.grad = None
        loss = sum(p.double().square().sum() for p in parameters)
        loss.backward()
        return loss

    def take(optimizer, parameters):
        optimizer.step(loss=ready(parameters))

    def state(optimizer, parameters):
        velocity = [optimizer.state[p].get("velocity", torch.zeros(3)).tolist() for p in parameters]
        group = optimizer.param_groups[0]
        sizes = [group[name].item() for name in ("stepsize", "last_positive_stepsize")]
        return [p.tolist() for p in parameters], velocity, sizes

    optimizer, parameters, loss = make()
    allowed = [state(optimizer, parameters)]
    count = Interrupt(0)
    count.run(lambda: optimizer.step(loss=loss))
    allowed.append(state(optimizer, parameters))
    assert allowed[0] != allowed[1]
    for line in range(1, count.ran + 1):
        optimizer, parameters, loss = make()
        Interrupt(line).run(partial(optimizer.step, loss=loss))
        assert state(optimizer, parameters) in allowed


def test_an_interrupt_in_averaged_brings_the_parameters_back_and_steps_go_on():
    def make():
        x = start()
        optimizer = ASGD([x], lr=0.1)
        for _ in range(3):
            x.grad = torch.ones(3, dtype=x.dtype)
            optimizer.step()
        return optimizer, x

    def show(optimizer, x):
        with optimizer.averaged():
            pass

    optimizer, x = make()
    last = x.tolist()
    count = Interrupt(0)
    count.run(lambda: show(optimizer, x))
    assert count.ran > 10
    for line in range(1, count.ran + 1):
        optimizer, x = make()
        Interrupt(line).run(partial(show, optimizer, x))
        assert x.tolist() == last
        optimizer.step()


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    names: list[str]
    NONE = ("aten::detach", "aten::view", "profiler::_record_function_enter_new")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in self.NONE:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("options", "most"), [({}, 15), ({"momentum": 0.9}, 17)])
def test_a_polyak_step_is_a_few_launches_whatever_the_number_of_tensors(options, most):
    parameters = [nn.Parameter(torch.randn(3, i)) for i in range(1, 9)]
    optimizer = PolyakSGD(parameters, **options)
    launches = Launches()
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        launches.names = []
        with launches:
            optimizer.step(loss=loss)
    assert len(launches.names) <= most, launches.names


@pytest.mark.parametrize("variant", ["sps_max", "sps+", "sps_smooth", "alig"])
def test_a_cap_of_one_element_is_one_number_and_one_of_two_is_refused(variant):
    cap, x, y = torch.tensor([0.1], dtype=torch.float64), start(), start()
    ours = descend(PolyakSGD([x], max_stepsize=cap, variant=variant), x, 3)
    assert ours == descend(PolyakSGD([y], max_stepsize=0.1, variant=variant), y, 3)
    z = start()
    shifted = descend(PolyakSGD([z], 0.1, f_min=torch.tensor([0.0]), variant=variant), z, 3)
    assert shifted == ours
    with pytest.raises(ValueError, match=r"max_stepsize must be one number, got shape \(2,\)"):
        PolyakSGD([x], max_stepsize=torch.ones(2))


def test_the_smooth_variant_starts_from_its_first_size():
    for options, size in (
        ({}, 2.0),
        ({"init_stepsize": 0.5}, 1.0),
        ({"init_stepsize": math.inf}, 7),
    ):
        x = torch.tensor([1.0], requires_grad=True)
        optimizer = PolyakSGD([x], math.inf, variant="sps_smooth", **options)
        x.grad = torch.ones(1)
        optimizer.step(loss=7.0)
        assert optimizer.param_groups[0]["stepsize"].item() == size
    with pytest.raises(ValueError, match="init_stepsize must be positive, got 0"):
        PolyakSGD([x], init_stepsize=0)


def trained(kind):
    x = start()
    optimizer = kind([x], momentum=0.5) if kind is PolyakSGD else kind([x], lr=0.1)
    for _ in range(3):
        x.grad = torch.ones(3, dtype=x.dtype)
        optimizer.step(loss=torch.tensor(2.0)) if kind is PolyakSGD else optimizer.step()
    return optimizer, x


SPOILT = {
    "groups": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "parameters": lambda s: s["param_groups"][0].update(params=[0, 1]),
    "no groups": lambda s: s.pop("param_groups"),
    "an option": lambda s: s["param_groups"][0].update(lr=-1.0),
    "an option of another type": lambda s: s["param_groups"][0].update(lr=[1]),
    "no mapping": lambda s: (s.clear(), s.update(x=1)),
    "an option too few": lambda s: s["param_groups"][0].pop("lr"),
    "two numbers for one": lambda s: s["param_groups"][0].update(
        {k: torch.ones(2) for k in ("lambd", "stepsize") if k in s["param_groups"][0]}
    ),
    "a number that is written into": lambda s: s["param_groups"][0].update(
        {k: 1.0 if k == "stepsize" else "yes" for k in ("stepsize", "maximize")}
    ),
    "half a parameter's state": lambda s: s["state"].update({0: {"other": 1}}),
    "groups of something else": lambda s: s.update(param_groups=[3]),
    "a sparse tensor": lambda s: [
        s["state"][0].update({k: torch.ones(3).to_sparse()})
        for k in ("ax", "velocity")
        if k in s["state"][0]
    ],
    "no values": lambda s: [
        s["state"][0].update({k: torch.ones(3, device="meta")})
        for k in ("ax", "velocity")
        if k in s["state"][0]
    ],
    "a shape": lambda s: [
        s["state"][0].update({k: torch.ones(2)}) for k in ("ax", "velocity") if k in s["state"][0]
    ],
    "no tensor": lambda s: [
        s["state"][0].update({k: 1.0}) for k in ("ax", "velocity") if k in s["state"][0]
    ],
}


@pytest.mark.parametrize("kind", [ASGD, PolyakSGD])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_state_that_does_not_fit_an_optimizer_is_refused_whole(kind, spoil):
    (optimizer, _), (other, _) = trained(kind), trained(kind)
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    before = str(other.state_dict())
    with pytest.raises(ValueError):  # noqa: PT011
        other.load_state_dict(state)
    assert str(other.state_dict()) == before
    for _ in range(2):  # at the first torch adds an option to the defaults
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", [ASGD, PolyakSGD])
@pytest.mark.parametrize(
    "trip",
    [
        copy.deepcopy,
        lambda both: pickle.loads(pickle.dumps(both)),
        lambda both: pickle.loads(cloudpickle.dumps(both)),
    ],
    ids=["deepcopy", "pickle", "cloudpickle"],
)
def test_an_optimizer_that_was_packed_with_its_network_goes_on(kind, trip):
    ours = trained(kind)
    theirs = trip(ours)
    for optimizer, x in (ours, theirs):
        for _ in range(3):
            x.grad = torch.full((3,), 0.5, dtype=x.dtype)
            optimizer.step(loss=torch.tensor(2.0)) if kind is PolyakSGD else optimizer.step()
    assert ours[1].tolist() == theirs[1].tolist()
    assert str(ours[0].state_dict()) == str(theirs[0].state_dict())


@pytest.mark.parametrize("mode", ["autocast", "default dtype", "default device", "inference"])
def test_a_polyak_step_does_not_follow_the_modes_of_its_caller(mode):
    def run(inside):
        x, w = start(torch.float32), torch.ones(2, 2, requires_grad=True)
        before = torch.get_default_dtype()
        if inside and mode == "default dtype":
            torch.set_default_dtype(torch.float64)
        around = {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "default device": lambda: torch.device("meta"),
            "inference": torch.inference_mode,
        }.get(mode, torch.enable_grad)
        try:
            with around() if inside else torch.enable_grad():
                optimizer = PolyakSGD([x, w], momentum=0.5, variant="sps_smooth")
            for _ in range(3):
                optimizer.zero_grad()
                loss = x.square().sum() + w.square().sum()
                loss.backward()
                with torch.enable_grad() if mode == "inference" or not inside else around():
                    optimizer.step(loss=loss)
        finally:
            torch.set_default_dtype(before)
        size = optimizer.param_groups[0]["stepsize"]
        return size.dtype, size.item(), x.tolist(), w.tolist()

    assert run(True) == run(False)
