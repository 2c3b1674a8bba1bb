"""Polyak step sizes as a functional solver, with jaxopt's interface in terms of `torch.func`.

Parameters and state go in, parameters and state come out. The torch optimizer is `PolyakSGD`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from polyak_rl.optim import polyak_stepsize

# A pytree: tensors in nested dicts, lists, tuples and named tuples.
Tree = Any
Matvec = Callable[[Tensor], Tensor]


class PolyakSGDState(NamedTuple):
    """What `PolyakSGDSolver` carries from one update to the next.

    `value`, `error` and `aux` belong to the parameters before the last update.

    Example:
        >>> solver = PolyakSGDSolver(lambda x: x.square().sum())
        >>> x = torch.tensor([3.0, 4.0])
        >>> x, state = solver.update(x, solver.init_state(x))
        >>> state.iter_num, state.value, state.error, state.stepsize
        (1, tensor(25.), tensor(10.), tensor(0.2500))
    """

    iter_num: int
    error: Tensor  # |grad f|
    value: Tensor
    stepsize: Tensor
    velocity: Tree  # None without momentum
    aux: Any
    num_fun_eval: int
    num_grad_eval: int


class OptStep(NamedTuple):
    """Parameters and the state that belongs to them.

    Example:
        >>> solver = PolyakSGDSolver(lambda x: x.square().sum(), maxiter=1)
        >>> step = solver.run(torch.tensor([3.0, 4.0]))
        >>> step.params, step.state.iter_num
        (tensor([1.5000, 2.0000]), 1)
    """

    params: Tree
    state: PolyakSGDState


def conjugate_gradient(matvec: Matvec, b: Tensor) -> Tensor:
    r"""Solve A x = b for a symmetric positive semi-definite A, given v -> A v.

    Stops at |b - A x| <= 10 eps |b|, or after 1000 products. Where A is singular and b in its
    range, x is the solution of smallest norm.

    References:
        Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
        https://doi.org/10.6028/jres.049.044.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x = conjugate_gradient(lambda v: A @ v, torch.tensor([3.0, 4.0]))
        >>> torch.allclose(x, torch.ones(2))
        True
    """
    x = torch.zeros_like(b)
    residual = direction = b
    rr = residual.dot(residual)  # not @, which autocast would take to 16 bits
    tolerance = (10 * torch.finfo(b.dtype).eps) ** 2 * rr
    for _ in range(1000):
        if rr <= tolerance:
            break
        product = matvec(direction)
        curvature = direction.dot(product)
        if curvature <= 0:  # a direction in which f is flat: as far as A can go
            break
        step = rr / curvature
        x = x + step * direction
        residual = residual - step * product
        rr, previous = residual.dot(residual), rr
        direction = residual + rr / previous * direction
    return x


@dataclasses.dataclass(eq=False)
class PolyakSGDSolver:
    r"""Minimise `fun(params, *args, **kwargs)` by SGD with Polyak step sizes.

        step = min(max(f - fun_min, 0) / (|g|^2 + delta), max_stepsize),  |g| over the whole tree
        v <- momentum v - step g;  x <- x + v

    | jaxopt.PolyakSGD | here |
    |---|---|
    | `fun`, `value_and_grad`, `has_aux`, `max_stepsize`, `delta`, `momentum` | the same |
    | `pre_update`, `maxiter`, `tol` | the same |
    | `variant`, `fun_min` | the same; they come last |
    | `verbose` | prints iteration, value, error and step size; turns `jit` off |
    | `implicit_diff` | the same, for `run`; reaches tensors that `fun` captures as well |
    | `implicit_diff_solve(matvec, b)` | b is one vector: the parameters, flattened in tree order |
    | `jit="auto"` | "auto" is False; True compiles one update by `torch.compile`, in seconds |
    | `unroll="auto"` | whether autograd records the iterations; "auto": unless `implicit_diff` |
    | `init_state`, `update`, `run`, `run_iterator` | the same |
    | `optimality_fun`, `l2_optimality_error` | the same |
    | `attribute_names`, `attribute_values` | the same |

    Deviations. The step is never negative (jaxopt's climbs where f < fun_min), and 0 at an exact
    minimum (jaxopt's parameters become NaN). `run_iterator` checks `tol` and spends no batch on
    `init_state`, which does not call `fun`: `aux` is None before the first update. "SPS+" has
    `delta` and the cap as well, which jaxopt ignores there: `delta=0, max_stepsize=math.inf` are
    jaxopt's.

    Each iteration of `run` and `run_iterator` reads `error` back from the device.

    Args:
        fun: `fun(params, *args, **kwargs)` returns a scalar tensor; `params` is any pytree of
            floating-point tensors. With `has_aux` it returns (value, aux); with `value_and_grad`
            it returns (value, gradient), or with both ((value, aux), gradient).
        value_and_grad: whether fun returns its gradient.
        has_aux: whether fun returns something beside its value, a pytree of tensors and whatever
            else, kept in `state.aux`.
        max_stepsize: cap of the step size, >= 0.
        delta: added to |g|^2, >= 0.
        momentum: in [0, 1); 0 has no velocity.
        pre_update: `params, state = pre_update(params, state, *args, **kwargs)`, called before
            value and gradient are computed.
        maxiter: most updates, >= 0; 0 returns the initial parameters.
        tol: stop when |g| <= tol, >= 0.
        verbose: whether to print each iteration.
        implicit_diff: differentiate the solution through grad f(x*) = 0 rather than through the
            iterations. It takes the point that `run` reached for the minimum: `tol` sets its
            precision, the initial parameters get no gradient, and second derivatives none.
        implicit_diff_solve: `solve(matvec, b)` returns x with A x = b, where A is the Hessian of
            fun and `matvec(v)` is A v; by default `conjugate_gradient`.
        jit: whether to compile the update.
        unroll: whether autograd records the iterations; its memory grows with them. False
            returns detached parameters.
        variant: "SPS_max", or "SPS+": no step where |g|^2 <= the dtype's eps.
        fun_min: the smallest value of fun.

    Raises:
        ValueError: an argument is out of its range, or the parameters hold no tensors.

    References:
        Loizou et al., Stochastic Polyak step-size for SGD, AISTATS 2021,
        https://arxiv.org/abs/2002.10542. Berrada et al., Training neural networks for and by
        interpolation, ICML 2020, https://arxiv.org/abs/1906.05661. Blondel et al., Efficient and
        modular implicit differentiation, NeurIPS 2022, https://arxiv.org/abs/2105.15183.

    Example:
        >>> def residual(params, x, y):
        ...     return (x @ params["w"] + params["b"] - y).square().mean()
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> solver = PolyakSGDSolver(residual, maxiter=1000, tol=1e-4)
        >>> params, state = solver.run({"w": torch.zeros(1), "b": torch.zeros(())}, x, 3 * x[:, 0])
        >>> print(f"{params['w'].item():.2f} {state.error <= solver.tol}")
        3.00 True
    """

    fun: Callable[..., Any]
    value_and_grad: bool = False
    has_aux: bool = False
    max_stepsize: float = 1.0
    delta: float = 0.0
    momentum: float = 0.0
    pre_update: Callable[..., tuple[Tree, PolyakSGDState]] | None = None
    maxiter: int = 500
    tol: float = 1e-3
    verbose: bool | int = False
    implicit_diff: bool = False
    implicit_diff_solve: Callable[[Matvec, Tensor], Tensor] | None = None
    jit: bool | Literal["auto"] = "auto"
    unroll: bool | Literal["auto"] = "auto"
    variant: Literal["SPS_max", "SPS+"] = "SPS_max"
    fun_min: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not self.max_stepsize >= 0:
            raise ValueError(f"max_stepsize must be at least 0, got {self.max_stepsize}")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta must be at least 0 and finite, got {self.delta}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.maxiter < 0:
            raise ValueError(f"maxiter must be at least 0, got {self.maxiter}")
        if not self.tol >= 0:
            raise ValueError(f"tol must be at least 0, got {self.tol}")
        if self.variant not in ("SPS_max", "SPS+"):
            raise ValueError(f"variant must be 'SPS_max' or 'SPS+', got {self.variant!r}")
        for name in ("jit", "unroll"):
            if getattr(self, name) not in (True, False, "auto"):
                raise ValueError(
                    f'{name} must be True, False or "auto", got {getattr(self, name)!r}'
                )
        if self.implicit_diff and self.unroll is True:
            raise ValueError("implicit_diff and unroll are two ways to differentiate: choose one")

    def __getstate__(self) -> dict[str, Any]:
        # What torch.compile made belongs to this process.
        return {k: v for k, v in self.__dict__.items() if k != "_compiled_advance"}

    def attribute_names(self) -> tuple[str, ...]:
        """Return the names of the constructor's arguments."""
        return tuple(field.name for field in dataclasses.fields(self))

    def attribute_values(self) -> tuple[Any, ...]:
        """Return the values of the constructor's arguments, in the order of `attribute_names`."""
        return tuple(getattr(self, name) for name in self.attribute_names())

    def init_state(self, init_params: Tree, *args: Any, **kwargs: Any) -> PolyakSGDState:
        """Return the state before the first update: value and error are infinite, the step 0.

        The arguments of `fun` are accepted, as in jaxopt, and not used.
        """
        leaves = pytree.tree_leaves(init_params)
        if not leaves or not all(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
            kinds = sorted({str(getattr(x, "dtype", type(x).__name__)) for x in leaves})
            raise ValueError(f"params must be a pytree of floating-point tensors, got {kinds}")
        infinite = leaves[0].new_full((), math.inf)
        return PolyakSGDState(
            iter_num=0,
            error=infinite,
            value=infinite,
            stepsize=torch.zeros_like(infinite),
            velocity=pytree.tree_map(torch.zeros_like, init_params) if self.momentum else None,
            aux=None,
            num_fun_eval=0,
            num_grad_eval=0,
        )

    def update(self, params: Tree, state: PolyakSGDState, *args: Any, **kwargs: Any) -> OptStep:
        """Take one step and return (params, state); what went in is left as it was."""
        if self.pre_update is not None:
            params, state = self.pre_update(params, state, *args, **kwargs)
        advance = self._compiled_advance if self.jit is True and not self.verbose else self._advance
        params, velocity, value, error, stepsize, aux = advance(
            params, state.velocity, args, kwargs
        )
        state = PolyakSGDState(
            iter_num=state.iter_num + 1,
            error=error,
            value=value,
            stepsize=stepsize,
            velocity=velocity,
            aux=aux,
            num_fun_eval=state.num_fun_eval + 1,
            num_grad_eval=state.num_grad_eval + 1,
        )
        if self.verbose:
            print(f"{state.iter_num}: value {value:.6g}, error {error:.6g}, step {stepsize:.6g}")
        return OptStep(params, state)

    def run(self, init_params: Tree, *args: Any, **kwargs: Any) -> OptStep:
        """Update until |g| <= tol, or `maxiter` times.

        The result is differentiable in `args`, `kwargs` and what `fun` captures: through the
        iterations (then in `init_params` too), or with `implicit_diff` through the optimality
        condition.
        """
        step = OptStep(init_params, self.init_state(init_params))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._records):
            while step.state.iter_num < self.maxiter and step.state.error > self.tol:
                step = self.update(*step, *args, **kwargs)
        if self.implicit_diff and torch.is_grad_enabled():
            step = step._replace(params=self._attach_gradient(step.params, args, kwargs))
        return step

    def run_iterator(
        self, init_params: Tree, iterator: Iterable[Any], *args: Any, **kwargs: Any
    ) -> OptStep:
        """Update once per batch, `fun(params, *args, **kwargs, data=batch)`.

        Ends with the iterator, after `maxiter` updates, or when a batch has |g| <= tol; no batch
        is drawn that is not used. The result is differentiable through the iterations only.
        """
        step = OptStep(init_params, self.init_state(init_params))
        batches = iter(iterator)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._records):
            while step.state.iter_num < self.maxiter and step.state.error > self.tol:
                try:
                    data = next(batches)
                except StopIteration:
                    break
                step = self.update(*step, *args, **kwargs, data=data)
        return step

    def optimality_fun(self, params: Tree, *args: Any, **kwargs: Any) -> Tree:
        """Return the gradient of `fun`, which is zero at a solution."""
        return self._value_and_grad(params, *args, **kwargs)[2]

    def l2_optimality_error(self, params: Tree, *args: Any, **kwargs: Any) -> Tensor:
        """Return |grad f(params)|; `state.error` is that of the parameters one update earlier."""
        return _squared_norm(self.optimality_fun(params, *args, **kwargs)).sqrt()

    @property
    def _records(self) -> bool:
        return not self.implicit_diff if self.unroll == "auto" else self.unroll

    @cached_property
    def _compiled_advance(self) -> Callable[..., Any]:
        return torch.compile(self._advance)

    def _value_and_grad(self, params: Tree, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Tree]:
        if not self.value_and_grad:
            return self._differentiate(params, args, kwargs)
        value, gradient = self.fun(params, *args, **kwargs)
        value, aux = value if self.has_aux else (value, None)
        return value, aux, gradient

    def _differentiate(
        self, params: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Any, Tree]:
        """Value, aux and gradient; torch.func takes only tensors beside the value."""
        others: list[tuple[list[Any], pytree.TreeSpec]] = []

        def fun(params: Tree) -> tuple[Tensor, list[Tensor]]:
            value = self.fun(params, *args, **kwargs)
            value, aux = value if self.has_aux else (value, None)
            leaves, spec = pytree.tree_flatten(aux)
            others[:] = [(leaves, spec)]
            return value, [x for x in leaves if isinstance(x, Tensor)]

        gradient, (value, tensors) = torch.func.grad_and_value(fun, has_aux=True)(params)
        ((leaves, spec),) = others
        plain = iter(tensors)
        leaves = [next(plain) if isinstance(x, Tensor) else x for x in leaves]
        return value, pytree.tree_unflatten(leaves, spec), gradient

    def _advance(
        self, params: Tree, velocity: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tree, Tree, Tensor, Tensor, Tensor, Any]:
        value, aux, gradient = self._value_and_grad(params, *args, **kwargs)
        squared_norm = _squared_norm(gradient)
        stepsize = polyak_stepsize(
            value,
            squared_norm,
            self.max_stepsize,
            f_min=self.fun_min,
            delta=self.delta,
            eps=torch.finfo(squared_norm.dtype).eps if self.variant == "SPS+" else 0.0,
        )
        if self.momentum:
            velocity = pytree.tree_map(
                lambda v, g: self.momentum * v - stepsize * g, velocity, gradient
            )
            params = pytree.tree_map(torch.add, params, velocity)
        else:
            params = pytree.tree_map(lambda x, g: x - stepsize * g, params, gradient)
        return params, velocity, value, squared_norm.sqrt(), stepsize, aux

    def _attach_gradient(self, params: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """Make the solution x*(theta) of F(x*, theta) = grad f = 0 differentiable in theta."""
        leaves, spec = pytree.tree_flatten(params)
        solution = _flatten(leaves).detach()

        def unflatten(flat: Tensor) -> Tree:
            parts = torch.split(flat, [x.numel() for x in leaves])
            shaped = [part.view(x.shape) for part, x in zip(parts, leaves, strict=True)]
            return pytree.tree_unflatten(shaped, spec)

        def optimality(flat: Tensor) -> Tensor:
            gradient = self.optimality_fun(unflatten(flat), *args, **kwargs)
            return _flatten(pytree.tree_leaves(gradient))

        def solve(b: Tensor) -> Tensor:
            transposed_product = torch.func.vjp(optimality, solution)[1]
            solver = self.implicit_diff_solve or conjugate_gradient
            return solver(lambda v: transposed_product(v)[0], b)

        residual = optimality(solution)
        return unflatten(_ImplicitRoot.apply(solution, residual, solve))  # type: ignore[no-untyped-call]


class _ImplicitRoot(torch.autograd.Function):
    """x* with the derivative of the implicit function theorem, dx*/dtheta = -A^-1 dF/dtheta.

    The residual F(x*, theta) carries the graph to theta; what autograd sends back along it is
    -A^-T v for an incoming v.
    """

    @staticmethod
    def forward(solution: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return solution.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.solve = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[None, Tensor, None]:
        return None, -ctx.solve(v), None


def _flatten(leaves: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in leaves])


def _squared_norm(tree: Tree) -> Tensor:
    squares = [x.square().sum() for x in pytree.tree_leaves(tree)]
    return torch.stack(squares).sum()
