"""PolyakSGDSolver against jaxopt's numbers, a slow float64 reference, and closed forms."""

import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from polyak_rl.solver import OptStep, PolyakSGDSolver, PolyakSGDState, conjugate_gradient

F64 = torch.float64


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0], dtype=dtype)


def walk(solver: PolyakSGDSolver, params: Tensor, updates: int) -> list[float]:
    """Return f after each update."""
    state, values = solver.init_state(params), []
    for _ in range(updates):
        params, state = solver.update(params, state)
        values.append(square(params).item())
    return values


def reference(updates: int, max_stepsize: float, delta: float, momentum: float) -> list[float]:
    """Minimise sum x^2 from (1, 2, 3) in plain Python floats; return f after each update."""
    x, v, values = [1.0, 2.0, 3.0], [0.0] * 3, []
    for _ in range(updates):
        f, g = sum(z * z for z in x), [2 * z for z in x]
        step = min(f / (sum(z * z for z in g) + delta), max_stepsize)
        v = [momentum * vi - step * gi for vi, gi in zip(v, g, strict=True)]
        x = [xi + vi for xi, vi in zip(x, v, strict=True)]
        values.append(sum(z * z for z in x))
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, [3.5, 0.875, 0.21875, 0.0546875, 0.01367188]),
        ({"variant": "SPS+"}, [3.5, 0.875, 0.21875, 0.0546875, 0.01367188]),
        ({"momentum": 0.9}, [3.5, 0.56, 7.460599, 9.925494, 3.811853]),
        ({"delta": 1.0}, [3.623884, 1.026677, 0.367034, 0.181176, 0.113045]),
        ({"max_stepsize": 0.1}, [8.96, 5.7344, 3.670016, 2.348810, 1.503238]),
    ],
)
def test_updates_follow_jaxopt_and_the_reference(options, values, dtype):
    walked = walk(PolyakSGDSolver(square, **options), start(dtype), 5)
    assert walked == pytest.approx(values, rel=1e-5, abs=1e-6)
    numbers = {"max_stepsize": 1.0, "delta": 0.0, "momentum": 0.0, **options}
    numbers.pop("variant", None)
    slow = reference(5, **numbers)
    assert walked == pytest.approx(slow, rel=1e-12 if dtype == F64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_run_stops_where_jaxopt_does(dtype):
    params, state = PolyakSGDSolver(square, tol=1e-3).run(start(dtype))
    assert state.iter_num == state.num_fun_eval == state.num_grad_eval == 14
    assert state.error.item() == pytest.approx(0.00091349, rel=1e-5)
    assert state.stepsize.item() == pytest.approx(0.25, rel=1e-5)
    # f falls by 4 an update, |g| by 2: state is that of the parameters before the last one.
    assert state.value.item() == pytest.approx(14 / 4**13, rel=1e-4)
    assert PolyakSGDSolver(square).l2_optimality_error(params).item() == pytest.approx(
        state.error.item() / 2, rel=1e-4
    )


def test_no_iterations_return_the_initial_parameters():
    x = start()
    params, state = PolyakSGDSolver(square, maxiter=0).run(x)
    assert params is x
    assert state.iter_num == 0
    assert state.error == math.inf


def test_run_takes_maxiter_updates_at_most():
    assert PolyakSGDSolver(square, maxiter=3, tol=0.0).run(start()).state.iter_num == 3


def test_an_exact_minimum_is_left_alone():
    solver = PolyakSGDSolver(square, momentum=0.9, tol=0.0, maxiter=3)
    x = torch.zeros(3)
    params, state = solver.update(x, solver.init_state(x))
    assert torch.equal(params, x)
    assert state.stepsize == 0
    assert torch.equal(solver.run(x).params, x)


def test_no_step_is_taken_uphill_where_f_is_below_its_minimum():
    solver = PolyakSGDSolver(lambda x: square(x) - 20, fun_min=0.0)
    params, state = solver.update(start(), solver.init_state(start()))
    assert torch.equal(params, start())
    assert state.value == -6
    assert state.stepsize == 0


def test_fun_min_shortens_the_step():
    solver = PolyakSGDSolver(square, fun_min=7.0)
    assert solver.update(start(), solver.init_state(start())).state.stepsize == 7 / 56


def test_sps_plus_stands_still_at_a_gradient_that_is_zero_to_rounding():
    x = torch.full((1,), 1e-5)  # |g|^2 = 4e-10 < 1.2e-7
    solver = PolyakSGDSolver(square, variant="SPS+")
    assert solver.update(x, solver.init_state(x)).state.stepsize == 0


def test_a_value_that_is_not_a_number_ends_the_run():
    _, state = PolyakSGDSolver(lambda x: square(x) * math.nan).run(start())
    assert state.iter_num == 1
    assert state.error.isnan()


def test_update_leaves_what_it_was_given_as_it_was():
    solver = PolyakSGDSolver(square, momentum=0.9)
    x = start()
    first = solver.update(x, solver.init_state(x))
    kept = first.params.clone(), first.state.velocity.clone()
    solver.update(*first)
    assert torch.equal(x, start())
    assert torch.equal(first.params, kept[0])
    assert torch.equal(first.state.velocity, kept[1])


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def test_parameters_are_any_pytree_and_the_norm_is_over_all_of_it():
    def fun(params: dict[str, Any]) -> Tensor:
        layer = params["layer"]
        return square(layer.weight) + square(layer.bias) + sum(square(x) for x in params["rest"])

    x = start()
    tree = {"layer": Layer(x[:1].reshape(1, 1), x[1]), "rest": [x[2:]]}
    solver = PolyakSGDSolver(fun, momentum=0.9, tol=0.0, maxiter=5)
    params, state = solver.run(tree)
    assert isinstance(params["layer"], Layer)
    assert params["layer"].weight.shape == (1, 1)
    flat, _ = PolyakSGDSolver(square, momentum=0.9, tol=0.0, maxiter=5).run(x)
    walked = [params["layer"].weight.item(), params["layer"].bias.item(), params["rest"][0].item()]
    assert walked == pytest.approx(flat.tolist(), rel=1e-12)
    assert isinstance(state.velocity["layer"], Layer)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("value_and_grad", [False, True])
def test_fun_may_return_its_gradient_and_something_beside_its_value(value_and_grad, has_aux):
    def fun(x: Tensor, scale: float, *, power: int) -> Any:
        value = scale * square(x)
        value = (value, {"moment": (x**power).sum()}) if has_aux else value
        return (value, 2 * scale * x) if value_and_grad else value

    solver = PolyakSGDSolver(fun, value_and_grad=value_and_grad, has_aux=has_aux)
    params, _ = solver.run(start(), 2.0, power=3)
    assert params.abs().max() < 1e-3
    _, state = solver.update(start(), solver.init_state(start()), 2.0, power=3)
    assert state.value == 28
    assert state.aux == ({"moment": 36.0} if has_aux else None)
    gradient = solver.optimality_fun(start(), 2.0, power=3)
    assert torch.equal(gradient, 4 * start())
    error = solver.l2_optimality_error(start(), 2.0, power=3)
    assert error.item() == pytest.approx(4 * math.sqrt(14))


def test_pre_update_runs_before_value_and_gradient():
    def onto_the_ball(params: Tensor, state: PolyakSGDState, radius: float) -> OptStep:
        return OptStep(params / params.norm() * radius, state)

    solver = PolyakSGDSolver(lambda x, radius: square(x), pre_update=onto_the_ball)
    params, state = solver.update(start(), solver.init_state(start()), 2.0)
    assert state.value.item() == pytest.approx(4)
    assert params.norm().item() == pytest.approx(1)


def batches(drawn: list[int], scales: list[float]) -> Iterator[float]:
    for n, scale in enumerate(scales):
        drawn.append(n)
        yield scale


def test_run_iterator_hands_each_batch_to_one_update():
    drawn: list[int] = []
    seen: list[tuple[float, float]] = []

    def fun(x: Tensor, weight: float, data: float) -> Tensor:
        seen.append((weight, data))
        return weight * data * square(x)

    solver = PolyakSGDSolver(fun, tol=0.0)
    _, state = solver.run_iterator(start(), batches(drawn, [1.0, 2.0, 3.0]), weight=0.5)
    assert state.iter_num == 3
    assert seen == [(0.5, 1.0), (0.5, 2.0), (0.5, 3.0)]


def test_run_iterator_draws_no_batch_that_it_does_not_use():
    drawn: list[int] = []
    solver = PolyakSGDSolver(lambda x, data: data * square(x), maxiter=2, tol=0.0)
    solver.run_iterator(start(), batches(drawn, [1.0] * 10))
    assert drawn == [0, 1]


def test_run_iterator_checks_tol():
    drawn: list[int] = []
    solver = PolyakSGDSolver(lambda x, data: data * square(x), tol=1e-3)
    _, state = solver.run_iterator(start(), batches(drawn, [1.0] * 100))
    assert state.iter_num == len(drawn) == 14


# Differentiating the solution

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
Y = X.sum(1) + torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=F64)
PROBE = torch.arange(1.0, 5.0, dtype=F64)


def ridge(w: Tensor, regulariser: Tensor) -> Tensor:
    return ((X @ w - Y).square().mean() + regulariser * w.square().sum()) / 2


def ridge_solution(regulariser: Tensor) -> Tensor:
    gram = X.T @ X / len(X)
    return torch.linalg.solve(gram + regulariser * torch.eye(4, dtype=F64), X.T @ Y / len(X))


def ridge_solver(**options: Any) -> PolyakSGDSolver:
    # The least loss of a ridge regression is above 0: the cap is the step size.
    return PolyakSGDSolver(ridge, max_stepsize=0.3, tol=1e-10, maxiter=3000, **options)


def regulariser() -> Tensor:
    return torch.tensor(0.3, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("options", [{"implicit_diff": True}, {}], ids=["implicit", "unrolled"])
def test_the_gradient_of_a_ridge_solution_is_the_closed_forms_and_that_of_differences(options):
    solver, lam = ridge_solver(**options), regulariser()
    params, state = solver.run(torch.zeros(4, dtype=F64), lam)
    assert state.error <= 1e-10
    torch.testing.assert_close(params, ridge_solution(lam), rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(params @ PROBE, lam)
    (closed,) = torch.autograd.grad(ridge_solution(lam) @ PROBE, lam)
    h = 1e-4
    up, down = (
        solver.run(torch.zeros(4, dtype=F64), lam.detach() + d).params @ PROBE for d in (h, -h)
    )
    assert gradient.item() == pytest.approx(closed.item(), rel=1e-6)
    assert gradient.item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-4)


def test_the_implicit_gradient_in_float32_is_right_to_1e_4():
    lam = torch.tensor(0.3, requires_grad=True)

    def ridge_32(w: Tensor, lam: Tensor) -> Tensor:
        return ((X.float() @ w - Y.float()).square().mean() + lam * w.square().sum()) / 2

    solver = PolyakSGDSolver(ridge_32, max_stepsize=0.3, tol=1e-6, implicit_diff=True)
    params, _ = solver.run(torch.zeros(4), lam)
    (gradient,) = torch.autograd.grad(params @ PROBE.float(), lam)
    exact = regulariser()
    (closed,) = torch.autograd.grad(ridge_solution(exact) @ PROBE, exact)
    assert gradient.item() == pytest.approx(closed.item(), rel=1e-4)


def test_the_implicit_gradient_reaches_keywords_captured_tensors_and_data():
    lam = regulariser()
    noise = torch.zeros(20, dtype=F64, requires_grad=True)

    def fun(params: dict[str, Tensor], *, y: Tensor) -> Tensor:
        w = torch.cat([params["a"], params["b"]])
        return ((X @ w - y).square().mean() + lam * w.square().sum()) / 2

    solver = PolyakSGDSolver(fun, max_stepsize=0.3, tol=1e-10, maxiter=3000, implicit_diff=True)
    half = torch.zeros(2, dtype=F64)
    params, _ = solver.run({"a": half, "b": half}, y=Y + noise)
    found = torch.autograd.grad(params["b"].sum(), (lam, noise))
    gram = X.T @ X / len(X) + lam * torch.eye(4, dtype=F64)
    w = torch.linalg.solve(gram, X.T @ (Y + noise) / len(X))
    for ours, closed in zip(found, torch.autograd.grad(w[2:].sum(), (lam, noise)), strict=True):
        torch.testing.assert_close(ours, closed, rtol=1e-6, atol=1e-9)


def test_the_implicit_gradient_works_inside_torch_func():
    def at(lam: Tensor) -> Tensor:
        return ridge_solver(implicit_diff=True).run(torch.zeros(4, dtype=F64), lam).params @ PROBE

    lam = regulariser()
    (closed,) = torch.autograd.grad(ridge_solution(lam) @ PROBE, lam)
    assert torch.func.grad(at)(lam.detach()).item() == pytest.approx(closed.item(), rel=1e-6)


def test_the_implicit_gradient_uses_the_solver_it_is_given():
    asked = []

    def dense(matvec, b):
        asked.append(b)
        columns = [matvec(e) for e in torch.eye(len(b), dtype=b.dtype)]
        return torch.linalg.solve(torch.stack(columns, 1), b)

    lam = regulariser()
    solver = ridge_solver(implicit_diff=True, implicit_diff_solve=dense)
    params, _ = solver.run(torch.zeros(4, dtype=F64), lam)
    (gradient,) = torch.autograd.grad(params @ PROBE, lam)
    (closed,) = torch.autograd.grad(ridge_solution(lam) @ PROBE, lam)
    assert gradient.item() == pytest.approx(closed.item(), rel=1e-6)
    assert torch.equal(asked[0], PROBE)


def test_the_implicit_gradient_works_where_fun_returns_its_own():
    def fun(w: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        return ridge(w, lam), X.T @ (X @ w - Y) / len(X) + lam * w

    lam = regulariser()
    solver = PolyakSGDSolver(
        fun, value_and_grad=True, max_stepsize=0.3, tol=1e-10, maxiter=3000, implicit_diff=True
    )
    (gradient,) = torch.autograd.grad(solver.run(torch.zeros(4, dtype=F64), lam).params.sum(), lam)
    (closed,) = torch.autograd.grad(ridge_solution(lam).sum(), lam)
    assert gradient.item() == pytest.approx(closed.item(), rel=1e-6)


def test_unrolled_iterations_are_differentiable_in_the_initial_parameters():
    solver = PolyakSGDSolver(square, maxiter=2, tol=0.0, max_stepsize=0.1)
    x = start().requires_grad_()
    (gradient,) = torch.autograd.grad(solver.run(x).params.sum(), x)
    assert gradient.tolist() == pytest.approx([0.8**2] * 3)


@pytest.mark.parametrize("options", [{"unroll": False}, {"implicit_diff": True}])
def test_iterations_that_are_not_unrolled_are_not_recorded(options):
    recorded = []

    def watched(params: Tensor, state: PolyakSGDState, scale: Tensor) -> OptStep:
        recorded.append(params.requires_grad)
        return OptStep(params, state)

    scale = torch.ones((), dtype=F64, requires_grad=True)
    solver = PolyakSGDSolver(square_scaled, pre_update=watched, **options)
    params, _ = solver.run(start(), scale)
    assert not any(recorded)
    assert params.requires_grad == ("implicit_diff" in options)


def square_scaled(x: Tensor, scale: Tensor) -> Tensor:
    return square(scale * x)


def test_no_gradient_is_prepared_where_none_is_wanted():
    evaluated = []

    def fun(x: Tensor) -> Tensor:
        evaluated.append(1)
        return square(x)

    solver = PolyakSGDSolver(fun, implicit_diff=True)
    with torch.no_grad():
        _, state = solver.run(start())
    assert len(evaluated) == state.iter_num


def test_conjugate_gradients_solve_what_is_definite_and_the_range_of_what_is_not():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(8, 5, generator=generator, dtype=F64)
    b = torch.randn(5, generator=generator, dtype=F64)
    definite, singular = factor.T @ factor, factor @ factor.T  # rank 5 both, of 5 and of 8
    x = conjugate_gradient(definite.mv, b)
    torch.testing.assert_close(x, torch.linalg.solve(definite, b), rtol=1e-8, atol=1e-10)
    within = singular @ torch.ones(8, dtype=F64)
    x = conjugate_gradient(singular.mv, within)
    torch.testing.assert_close(x, torch.linalg.pinv(singular) @ within, rtol=1e-8, atol=1e-9)
    assert torch.equal(conjugate_gradient(definite.mv, torch.zeros(5, dtype=F64)), 0 * b)
    assert torch.equal(conjugate_gradient(lambda v: 0 * v, b), 0 * b)


# The rest of the interface


def compile_eagerly(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trace as torch.compile does, but run the graph as it is: no C++ compiler is needed."""
    compiled, compile_ = [], torch.compile

    def traced(function: Any) -> Any:
        compiled.append(function)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    return compiled


def test_jit_compiles_one_update_and_changes_no_result(monkeypatch):
    compiled = compile_eagerly(monkeypatch)
    options = {"momentum": 0.9, "maxiter": 5, "tol": 0.0}
    eager = PolyakSGDSolver(square, **options).run(start())
    assert not compiled
    jitted = PolyakSGDSolver(square, jit=True, **options).run(start())
    assert len(compiled) == 1
    torch.testing.assert_close(jitted.params, eager.params, rtol=1e-12, atol=0)
    assert jitted.state.iter_num == 5


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own
def test_jit_compiles_for_this_machine():
    _, state = PolyakSGDSolver(square, jit=True).run(start())
    assert state.iter_num == 14


def test_verbose_prints_each_iteration_and_turns_jit_off(monkeypatch, capsys):
    compiled = compile_eagerly(monkeypatch)
    PolyakSGDSolver(square, verbose=True, jit=True, maxiter=2).run(start())
    assert not compiled
    assert capsys.readouterr().out.splitlines() == [
        "1: value 14, error 7.48331, step 0.25",
        "2: value 3.5, error 3.74166, step 0.25",
    ]


def test_the_arguments_of_jaxopt_come_in_its_order_and_can_be_read_back():
    names = (
        "fun value_and_grad has_aux max_stepsize delta momentum pre_update maxiter tol verbose "
        "implicit_diff implicit_diff_solve jit unroll"
    )
    solver = PolyakSGDSolver(square, max_stepsize=0.5)
    assert " ".join(solver.attribute_names()).startswith(names)
    values = dict(zip(solver.attribute_names(), solver.attribute_values(), strict=True))
    assert values["fun"] is square
    assert values["max_stepsize"] == 0.5
    assert values["delta"] == values["momentum"] == 0.0
    assert (values["maxiter"], values["tol"]) == (500, 1e-3)
    assert values["jit"] == values["unroll"] == "auto"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_stepsize": -1.0}, "max_stepsize must be at least 0, got -1.0"),
        ({"delta": math.inf}, "delta must be at least 0 and finite, got inf"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"maxiter": -1}, "maxiter must be at least 0, got -1"),
        ({"tol": math.nan}, "tol must be at least 0, got nan"),
        ({"variant": "sps"}, "variant must be 'SPS_max' or 'SPS\\+', got 'sps'"),
        ({"jit": "yes"}, "jit must be True, False or \"auto\", got 'yes'"),
        ({"implicit_diff": True, "unroll": True}, "two ways to differentiate"),
    ],
)
def test_nonsense_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        PolyakSGDSolver(square, **option)


@pytest.mark.parametrize(
    ("params", "found"), [({}, r"\[\]"), ([1.0], "float"), (torch.ones(2).long(), "torch.int64")]
)
def test_parameters_without_tensors_are_refused(params, found):
    with pytest.raises(ValueError, match=f"pytree of floating-point tensors, got .*{found}"):
        PolyakSGDSolver(square).run(params)


@pytest.mark.parametrize(
    "aux", [None, 1.5, "text", (1, None), {"a": [torch.ones(2), "b", None]}, [], object()]
)
@pytest.mark.parametrize("value_and_grad", [False, True])
def test_what_fun_returns_beside_its_value_may_be_anything(aux, value_and_grad):
    def fun(x):
        value = (x.square().sum(), aux)
        return (value, 2 * x) if value_and_grad else value

    solver = PolyakSGDSolver(fun, has_aux=True, value_and_grad=value_and_grad, maxiter=2)
    _, state = solver.run(torch.tensor([3.0, 4.0]))
    assert str(state.aux) == str(aux)
    assert type(state.aux) is type(aux)


def test_conjugate_gradients_do_not_follow_autocast():
    a = torch.tensor([[2.0, 1.0], [1.0, 3.001]])
    b = torch.tensor([1.0, 2.003])
    plain = conjugate_gradient(lambda v: (a * v).sum(1), b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conjugate_gradient(lambda v: (a * v).sum(1), b), plain)


def halves(x):
    return (x / 2).square().sum()


def test_a_solver_and_its_state_are_packed_and_go_on(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda *a: f(*a))  # no pickle takes a lambda
    solver = PolyakSGDSolver(halves, momentum=0.5, jit=True)
    x = torch.tensor([3.0, 4.0])
    step = solver.update(x, solver.init_state(x))
    packed_solver, packed_step = pickle.loads(pickle.dumps((solver, step)))
    ours, theirs = solver.update(*step), packed_solver.update(*packed_step)
    assert torch.equal(ours.params, theirs.params)
    assert str(ours.state) == str(theirs.state)
