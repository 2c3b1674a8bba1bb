"""Optimizers: SGD that hands you its average, and SGD with Polyak step sizes.

`ASGD` is `torch.optim.ASGD` with its Polyak-Ruppert average made usable. `PolyakSGD` takes its step
size from the loss itself. They share a name and nothing else: the first averages iterates, the
second chooses how far to step.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import call
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from polyak_rl.flat import lasting
from polyak_rl.guard import damage_is_a_value_error, is_capturing

Variant = Literal["sps_max", "sps+", "sps_smooth", "alig"]
VARIANTS = ("sps_max", "sps+", "sps_smooth", "alig")
_NOTED = {"stepsize", "last_positive_stepsize"}  # what a step writes into the group


def polyak_stepsize(
    value: Tensor,
    squared_norm: Tensor,
    max_stepsize: float | Tensor,
    *,
    f_min: float | Tensor = 0.0,
    delta: float = 0.0,
    eps: float = 0.0,
) -> Tensor:
    r"""Polyak's step size, clamped to [0, max_stepsize], and 0 where the gradient is.

        step = min(max(f - f_min, 0) / (|g|^2 + delta), max_stepsize)

    Nothing is read back from the device, and the derivative is finite at a minimum too.

    Args:
        value: f at the current parameters.
        squared_norm: |g|^2, the squared norm of the gradient over all parameters.
        max_stepsize: the cap, >= 0; 0 stands still, infinity leaves the step uncapped.
        f_min: the smallest value of f. Too low a guess makes steps too long (up to the cap);
            below it, the step is 0.
        delta: added to |g|^2, >= 0.
        eps: gradients with |g|^2 <= eps count as zero.

    References:
        Polyak, Introduction to Optimization, 1987, section 5.3.

    Example:
        >>> polyak_stepsize(torch.tensor(14.0), torch.tensor(56.0), max_stepsize=1.0)
        tensor(0.2500)
    """
    # A zero gradient is given the harmless fraction 0 / 1: 0 / 0 would be NaN, and so would its
    # derivative even where the value is masked afterwards. NaN itself is not <= eps, and shows.
    flat = squared_norm <= eps
    gap = value if isinstance(f_min, float) and f_min == 0 else value - f_min
    denominator = squared_norm + delta if delta else squared_norm
    step = torch.where(flat, 0.0, gap) / torch.where(flat, 1.0, denominator)
    if isinstance(max_stepsize, Tensor):
        return step.clamp_min(0.0).clamp_max(max_stepsize)
    return step.clamp(0.0, max_stepsize)


class ASGD(torch.optim.ASGD):
    r"""Averaged SGD whose average can be evaluated and saved.

    The arithmetic is `torch.optim.ASGD`'s. Step n moves the parameters x and their average xbar:

        x    <- (1 - lambd eta) x - eta (g + weight_decay x),  eta = lr / (1 + lambd lr n)^alpha
        xbar <- xbar + mu (x - xbar),                          mu = 1 / max(1, n - t0)

    where step n + 1 uses the eta and mu of n, so that xbar is the plain mean of the iterates
    x_{t0+2} ... x_n, which is `Uniform(start=t0 + 1)`, and equals x_n before.

    What differs from torch: `t0` is 0 (torch's 1e6 averages nothing for a million steps), `lr`
    must be positive, every argument is validated, and the average has two doors, `averaged` and
    `averaged_state_dict`. The average has the dtype of the parameters: in float32 it stops moving
    after some 1e6 steps; `AverageBank` keeps one in float64 for any optimizer.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: step size, > 0.
        lambd: decay of the parameters and of the step size, >= 0; 0 keeps both.
        alpha: power of the step size's decay, >= 0; 0 keeps it constant.
        t0: steps to wait before averaging, >= 0; half the run is a good choice where its length
            is known.
        weight_decay: L2 penalty, >= 0.
        foreach, maximize, differentiable, capturable: as in torch.

    Raises:
        ValueError: an argument is out of its range.

    References:
        Polyak & Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control
        Optim. 30(4), 1992, https://doi.org/10.1137/0330046. Ruppert, Efficient estimations from a
        slowly convergent Robbins-Monro process, Cornell ORIE report 781, 1988.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = ASGD(model.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 2)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> with optimizer.averaged():
        ...     prediction = model(torch.ones(8, 2))
        >>> torch.save(optimizer.averaged_state_dict(model), path)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        self._check(
            {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        )
        super().__init__(
            params,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    @staticmethod
    def _check(options: dict[str, Any]) -> None:
        if not 0 < float(options["lr"]) < math.inf:
            raise ValueError(f"lr must be positive and finite, got {options['lr']}")
        for name in ("lambd", "alpha", "t0", "weight_decay"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {options[name]}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, its options validated like the constructor's."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state; one that does not fit raises ValueError and changes nothing."""
        _require_fitting(self, state_dict, "ax", ("step", "eta", "mu"))
        super().load_state_dict(state_dict)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the parameters for the length of a `with` block.

        The parameters come back bit for bit, on an exception too, and blocks may be nested.
        Parameters that have had no step keep their values, and so do buffers: statistics of batch
        normalisation stay those of the last iterate.

        Raises:
            RuntimeError: no step has been taken yet, or one is taken inside the block.
        """
        averages = self._averages()
        parameters = [p.detach() for p in averages]
        last, inside = [p.clone() for p in parameters], True
        hooks: list[Any] = []

        def refuse(*_: Any) -> None:
            if inside:
                raise RuntimeError(
                    "step() inside averaged() would train the average: leave it first"
                )

        def leave() -> None:
            nonlocal inside
            torch._foreach_copy_(parameters, last)
            inside = False
            for hook in hooks:
                hook.remove()

        try:
            try:
                hooks.append(self.register_step_pre_hook(refuse))
                torch._foreach_copy_(parameters, [*averages.values()])
                yield
            finally:
                leave()
        finally:  # once more: an interrupt may have come in between
            leave()

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return a copy of `model.state_dict()` that holds the average in place of the parameters.

        Parameters of the model without an average, and its buffers, are as they are in the model.

        Raises:
            RuntimeError: no step has been taken yet.
            ValueError: the model has none of the parameters that were averaged.
        """
        averages = self._averages()
        named = {name: averages[p] for name, p in model.named_parameters() if p in averages}
        if not named:
            raise ValueError(
                f"{type(model).__name__} has none of the parameters that this optimizer averages: "
                "give the model it was built for"
            )
        state: dict[str, Any] = copy.deepcopy(model.state_dict())
        for name, average in named.items():
            state[name].copy_(average)  # tied entries share memory in the copy too
        return state

    def _averages(self) -> dict[Tensor, Tensor]:
        averages = {p: state["ax"] for p, state in self.state.items() if "ax" in state}
        if not averages:
            raise RuntimeError("there is no average yet: take a step() first")
        return averages


class PolyakSGD(Optimizer):
    r"""SGD with Polyak step sizes: the loss says how far to go.

        step = min(max(f - f_min, 0) / (c |g|^2 + delta), cap),    x <- x - step g

    with |g| over all parameter groups. It suits models that can fit every sample (interpolation),
    where `f_min` is known: 0 for a squared error or a cross-entropy without label noise. Where the
    loss cannot reach `f_min` the steps stay long; then the cap is the learning rate.

    | variant | step size | with momentum m: v <- m v - step g and |
    |---|---|---|
    | "sps_max" | as above (Loizou et al. 2021) | x <- x + v |
    | "sps+" | as above, 0 where c abs(g)^2 <= the dtype's eps (Garrigos et al. 2023) | x <- x + v |
    | "sps_smooth" | as above, at most `growth` times the last positive step | x <- x + v |
    | "alig" | as above (Berrada et al. 2020, with delta=1e-5) | x <- x - step g + m v |

    Every variant is clamped to [0, cap]. The papers' SPS+ has no cap: `max_stepsize=math.inf`.

    The cap is `group["lr"]`, so that learning-rate schedulers move it; `max_stepsize` is its
    initial value. `group["stepsize"]` is the step size last taken, a tensor on the device:
    `writer.add_scalar("charts/stepsize", optimizer.param_groups[0]["stepsize"].item(), n)`.

    Nothing is read back from the device and state stays in place, so `step(loss=loss)` can be
    captured in a CUDA graph after one eager step. (A scheduler then needs a tensor as
    `max_stepsize`.) `GradScaler` works as `scaler.step(optimizer, loss=loss)`, with the unscaled
    loss. In data-parallel training give the loss averaged over the ranks, or they drift apart.

    Args:
        params: tensors, named tensors or parameter groups; a group may set `lr` (or
            `max_stepsize`), `delta`, `c`, `momentum`, `variant`, `growth`, `init_stepsize` and
            `skip_nonfinite`.
        max_stepsize: initial cap, >= 0; 0 stands still, infinity leaves the step uncapped.
        f_min: smallest value of the loss, a number, or a function called without arguments at
            each step (under a CUDA graph it should return a device tensor that is kept current).
            Code rather than state: it is not part of `state_dict`.
        delta: added to c |g|^2, >= 0.
        momentum: in [0, 1); 0 has no velocity.
        variant: see the table.
        c: > 0; SPS's constant, 0.5 doubles the step.
        growth: >= 1, for "sps_smooth": 2 ** (1 / batches per epoch) in the paper; 1 never grows.
        init_stepsize: > 0, for "sps_smooth": what the first step grows from; 1 in the authors'
            code, infinity leaves the first step to the cap.
        skip_nonfinite: leave parameters and velocity untouched at a step whose loss or gradient
            is not finite (a step size of 0 is shown); otherwise NaN spreads, as in SGD.

    Raises:
        ValueError: an argument is out of its range; `step` was not given the loss exactly once.

    References:
        Loizou et al., Stochastic Polyak step-size for SGD, AISTATS 2021,
        https://arxiv.org/abs/2002.10542. Berrada et al., Training neural networks for and by
        interpolation, ICML 2020, https://arxiv.org/abs/1906.05661. Garrigos et al., Function value
        learning, 2023, https://arxiv.org/abs/2307.14528 (SPS+).

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> optimizer = PolyakSGD([x])
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     _ = optimizer.step(loss=loss)
        ...     print(f"{loss:.4f} {optimizer.param_groups[0]['stepsize']:.4f}")
        14.0000 0.2500
        3.5000 0.2500
        0.8750 0.2500
        0.2188 0.2500
    """

    def __init__(
        self,
        params: ParamsT,
        max_stepsize: float | Tensor = 1.0,
        f_min: float | Tensor | Callable[[], float | Tensor] = 0.0,
        delta: float = 0.0,
        momentum: float = 0.0,
        variant: Variant = "sps_max",
        *,
        c: float = 1.0,
        growth: float = 2.0,
        init_stepsize: float = 1.0,
        skip_nonfinite: bool = False,
    ) -> None:
        if not callable(f_min) and not math.isfinite(f_min):
            raise ValueError(f"f_min must be finite or a function, got {f_min}")
        self.f_min = f_min
        defaults = {
            "lr": max_stepsize,
            "delta": delta,
            "momentum": momentum,
            "variant": variant,
            "c": c,
            "growth": growth,
            "init_stepsize": init_stepsize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles three attributes only.
        return {**super().__getstate__(), "f_min": self.f_min}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, its options validated like the constructor's."""
        if "max_stepsize" in param_group:
            param_group["lr"] = param_group.pop("max_stepsize")
        self._check(options := {**self.defaults, **param_group})
        with lasting():
            for name, start in (
                ("stepsize", 0.0),
                ("last_positive_stepsize", options["init_stepsize"]),
            ):
                param_group.setdefault(name, torch.tensor(start, dtype=torch.float32, device="cpu"))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state; one that does not fit raises ValueError and changes nothing."""
        _require_fitting(self, state_dict, "velocity")
        super().load_state_dict(state_dict)

    @staticmethod
    def _check(options: dict[str, Any]) -> None:
        cap = options["lr"]
        if isinstance(cap, Tensor) and cap.numel() != 1:
            raise ValueError(f"max_stepsize must be one number, got shape {tuple(cap.shape)}")
        if not float(cap) >= 0:
            raise ValueError(f"max_stepsize must be at least 0, got {cap}")
        if not 0 <= options["delta"] < math.inf:
            raise ValueError(f"delta must be at least 0 and finite, got {options['delta']}")
        if not 0 <= options["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {options['momentum']}")
        if options["variant"] not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {options['variant']!r}")
        if not 0 < options["c"] < math.inf:
            raise ValueError(f"c must be positive and finite, got {options['c']}")
        if not 1 <= options["growth"] < math.inf:
            raise ValueError(f"growth must be at least 1 and finite, got {options['growth']}")
        if not options["init_stepsize"] > 0:
            raise ValueError(f"init_stepsize must be positive, got {options['init_stepsize']}")
        for name in _NOTED & options.keys():
            number = options[name]
            if not isinstance(number, Tensor) or number.numel() != 1 or not float(number) >= 0:
                raise ValueError(f"{name} must be a tensor of one number >= 0, got {number}")

    @torch.no_grad()
    def step(  # type: ignore[override]  # the loss may be given in place of a closure
        self,
        closure: Callable[[], float | Tensor] | None = None,
        *,
        loss: float | Tensor | None = None,
    ) -> float | Tensor:
        """Take one step and return the loss.

        Args:
            closure: clears the gradients, computes the loss, calls backward, returns the loss.
            loss: the loss whose gradients are in place, where there is no closure.
        """
        if (closure is None) == (loss is None):
            raise ValueError("step() takes the loss once: either as a closure or as loss=...")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is None:
            raise ValueError("the closure must return the loss, got None")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"the loss must be one number, got shape {tuple(loss.shape)}")

        gradients = [g for group in self.param_groups for g in _gradients(group["params"])]
        if not gradients:
            return loss
        squared_norm = _squared_norm(gradients)
        value = torch.as_tensor(loss, dtype=squared_norm.dtype, device=squared_norm.device)
        gap = value.detach().reshape(())
        f_min = self.f_min() if callable(self.f_min) else self.f_min
        if isinstance(f_min, Tensor):
            gap = gap - f_min.reshape(())
        elif f_min != 0:
            gap = gap - f_min
        guarded = any(group["skip_nonfinite"] for group in self.param_groups)
        finite = gap.isfinite() & squared_norm.isfinite() if guarded else None
        writes: list[Callable[[], object]] = []
        for group in self.param_groups:
            stepsize, counted = _stepsize(group, gap, squared_norm, finite)
            writes += counted + self._moves(group, stepsize, finite)
        # One call of C: an interrupt is served before or after all of it, never in between.
        [*map(call, writes)]
        return loss

    def _moves(
        self, group: dict[str, Any], stepsize: Tensor, finite: Tensor | None
    ) -> list[Callable[[], object]]:
        """The calls that write the group's new parameters and velocities, which are ready."""
        params = [p for p in group["params"] if p.grad is not None]
        momentum = group["momentum"]
        velocities = [self._velocity(p) for p in params] if momentum != 0 else []
        writes: list[Callable[[], object]] = []
        new: Sequence[Tensor]
        for x, g, *velocity in _buckets(params, _gradients(params), velocities):
            step_g = torch._foreach_mul(g, stepsize.to(x[0].device))
            if momentum == 0:
                written, new = x, torch._foreach_sub(x, step_g)
            else:
                (v,) = velocity
                new_v = torch._foreach_mul(v, momentum)  # v <- m v - step g
                torch._foreach_sub_(new_v, step_g)
                if group["variant"] == "alig":  # x <- x - step g + m v
                    new_x = torch._foreach_sub(x, step_g)
                    torch._foreach_add_(new_x, new_v, alpha=momentum)
                else:  # x <- x + v
                    new_x = torch._foreach_add(x, new_v)
                written, new = x + v, [*new_x, *new_v]
            if group["skip_nonfinite"] and finite is not None:
                kept = finite.to(x[0].device)
                new = [torch.where(kept, a, b) for a, b in zip(new, written, strict=True)]
            writes.append(partial(torch._foreach_copy_, written, new))
        return writes

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _buckets(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Split parallel lists into those of one device and dtype, for one launch each."""
    filled: list[list[Tensor | None]] = [[*tensors] for tensors in lists if tensors]
    for bucket, _ in Optimizer._group_tensors_by_device_and_dtype(filled).values():
        yield cast(list[list[Tensor]], bucket)


def _squared_norm(gradients: list[Tensor]) -> Tensor:
    """Return |g|^2 over all tensors, in float32 at least, on the first tensor's device."""
    if any(g.is_sparse for g in gradients):
        raise ValueError("PolyakSGD takes dense gradients, got a sparse one")
    squares = []
    for (bucket,) in _buckets(gradients):
        # A squared norm soon leaves the range of float16, and bfloat16 has 3 digits for it.
        wide = torch.float32 if bucket[0].dtype.itemsize == 2 else None
        norms = torch._foreach_norm(bucket, 2, wide)
        norm = torch.stack(norms) if len(norms) > 1 else norms[0].reshape(1)
        squares.append(norm.dot(norm))
    total, *others = squares
    for square in others:
        total = total + square.to(total.device)
    return total


def _stepsize(
    group: dict[str, Any], gap: Tensor, squared_norm: Tensor, finite: Tensor | None
) -> tuple[Tensor, list[Callable[[], object]]]:
    """This step's size, and the calls that note it in the group: in place, for a CUDA graph."""
    for name in _NOTED:
        if group[name].device != gap.device or group[name].dtype != gap.dtype:
            if is_capturing():
                raise RuntimeError("take one PolyakSGD step before capturing a CUDA graph")
            group[name] = group[name].to(gap)  # the first step, or a model that has moved

    cap, last = group["lr"], group["last_positive_stepsize"]
    if isinstance(cap, Tensor):
        cap = cap.reshape(())
    if group["variant"] == "sps_smooth":
        cap = (group["growth"] * last).clamp_max(cap)
    stepsize = polyak_stepsize(
        gap,
        squared_norm if group["c"] == 1 else group["c"] * squared_norm,
        cap,
        delta=group["delta"],
        eps=torch.finfo(gap.dtype).eps if group["variant"] == "sps+" else 0.0,
    )
    if group["skip_nonfinite"] and finite is not None:
        stepsize = torch.where(finite, stepsize, 0.0)
    writes: list[Callable[[], object]] = [partial(group["stepsize"].copy_, stepsize)]
    if group["variant"] == "sps_smooth":
        # A zero step says nothing about the next one: growing from 0 would stand still for ever.
        writes.append(partial(last.copy_, torch.where(stepsize > 0, stepsize, last)))
    return stepsize, writes


def _require_fitting(
    optimizer: ASGD | PolyakSGD, saved: StateDict, per_element: str, numbers: Iterable[str] = ()
) -> None:
    """Raise ValueError where torch would load a state that does not fit, and fail at a step."""
    with damage_is_a_value_error("optimizer state"):
        ours, theirs = optimizer.param_groups, saved["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state is of groups of {sizes[1]} parameters, not of {sizes[0]}")
        for group, saved_group in zip(ours, theirs, strict=True):
            needed = group.keys() & (optimizer.defaults.keys() | _NOTED)
            if lacking := sorted(needed - saved_group.keys()):
                raise ValueError(f"the state lacks the options {lacking}")
            optimizer._check(saved_group)
            for name in needed:
                default, value = optimizer.defaults.get(name), saved_group[name]
                switch = name not in _NOTED and isinstance(default, bool | None)
                if switch and not isinstance(value, bool | type(default)):
                    raise ValueError(f"{name} must be True or False, got {value!r}")
            for parameter, i in zip(group["params"], saved_group["params"], strict=True):
                if not isinstance(state := saved["state"].get(i, {}), dict):
                    raise ValueError(f"the state of parameter {i} must be a dict, got {state!r}")
                if not state:  # it has had no step
                    continue
                _require_dense(f"{per_element!r} of parameter {i}", state[per_element], parameter)
                for name in numbers:
                    number = state[name]
                    one = isinstance(number, int | float) or number.numel() == 1
                    if not one or not 0 <= float(number) < math.inf:
                        raise ValueError(f"{name!r} of parameter {i} must be a number >= 0")


def _require_dense(name: str, tensor: object, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have the shape {shape}, got {tuple(getattr(tensor, 'shape', ()))}"
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} must be dense, got {tensor.layout} on {tensor.device}")
