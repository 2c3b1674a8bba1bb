"""A gradient step as one program, without the Python around it."""

import gc
import math
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Step = Callable[..., dict[str, Tensor]]
Run = Callable[..., Sequence[Tensor]]
Build = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Run]


class Program:
    """A function of tensors whose Python runs once; what it did to tensors is then repeated.

    On CPU the operations are compiled by Inductor, which needs a C++ compiler and takes some ten
    seconds: the results are the function's to rounding. On CUDA they are captured in a CUDA graph:
    the same kernels, launched at once, whose results hold until the next call.

    The function may read and write tensors that it does not get as arguments (weights, moments,
    targets); they are found by a rehearsal, after which they have their old values again. Where one
    of them moves, or is gone, the program is made anew; it does not notice that the function would
    use another one while the old one is kept somewhere. Numbers are read once: a learning rate
    stays what it was. The function may not write to its arguments, draw random numbers, or act on a
    tensor's value.

    Args:
        step: Takes tensors, tuples of tensors, and plain values, for each of which it is recorded
            separately, as for each form of the tensors; returns names and tensors.
        build: Makes the recorded graph callable on CPU; Inductor unless given.

    Attributes:
        recorded: What stands for the function, by the form of its arguments.

    Raises:
        RuntimeError: At the first call: `step` draws random numbers, takes a tensor's value by
            `item()` or as a condition, or the compiler fails.
    """

    def __init__(self, step: Step, build: Build | None = None) -> None:
        self._step = step
        self._build = build or _inductor
        self.recorded: dict[tuple[Any, ...], _Recorded] = {}

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """What the function returns for these arguments."""
        inputs: list[Tensor] = []
        key: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                inputs.append(argument)
            elif isinstance(argument, tuple):
                inputs += argument
            else:
                key.append(argument)
        key += [(x.shape, x.stride(), x.dtype) for x in inputs]
        recorded = self.recorded.get(tuple(key))
        if recorded is None or not recorded.current():
            record = self._capture if inputs[0].is_cuda else self._trace
            recorded = self.recorded[tuple(key)] = record(arguments, inputs)
        return dict(zip(recorded.names, recorded.run(*inputs), strict=True))

    @torch.enable_grad()  # what differentiates a loss is part of it
    def _trace(self, arguments: Sequence[Any], inputs: list[Tensor]) -> "_Recorded":
        """Record the operations as a graph of the inputs and of all memory that is touched."""
        rehearsal = _rehearse(self._step, arguments, inputs)
        memory = [*rehearsal.memory.values()]
        names: list[str] = []

        def step(*tensors: Tensor) -> list[Tensor]:
            stand_ins = dict(zip(rehearsal.memory, tensors, strict=False))
            with _StandIns(stand_ins):
                results = self._step(*_like(arguments, iter(tensors[len(memory) :])))
            names[:] = results
            return [*results.values()]

        try:
            graph = make_fx(step, tracing_mode="fake")(*memory, *inputs)
        except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            raise RuntimeError("this cannot be one program: it reads a tensor's value") from error
        run = self._build(graph, [*memory, *inputs])
        return _Recorded(names, lambda *given: run(*memory, *given), rehearsal.places())

    @torch.enable_grad()  # what differentiates a loss is part of it
    def _capture(self, arguments: Sequence[Any], inputs: list[Tensor]) -> "_Recorded":
        """Capture the kernels in a CUDA graph that reads the inputs from places of its own."""
        device = inputs[0].device  # not always the current one, on which a capture would be empty
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # where libraries set themselves up, before the capture
            rehearsal = _rehearse(self._step, arguments, inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        own = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = self._step(*_like(arguments, iter(own)))
        tensors = [*results.values()]

        def run(*given: Tensor) -> list[Tensor]:
            torch._foreach_copy_(own, given)
            graph.replay()
            return tensors

        return _Recorded([*results], run, rehearsal.places())


@dataclass(frozen=True)
class _Recorded:
    """What stands for the function from then on."""

    names: list[str]
    run: Run
    places: list[tuple[weakref.ref[Tensor], int]]
    """the tensors that were found, and where each lay"""

    def current(self) -> bool:
        """True while they are there still."""
        for reference, place in self.places:
            tensor = reference()
            if tensor is None or tensor.data_ptr() != place:
                return False
        return True


class _Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what memory from before is touched, and keeps a copy of it.

    Attributes:
        memory: By address of the storage, a tensor [N] of all of it.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, Tensor] = {}
        self._copies: list[Tensor] = []
        self._touched: dict[int, weakref.ref[Tensor]] = {}
        self._others = {_address(x) for x in inputs} | {0}  # 0: of tensors without elements
        self._made: list[Tensor] = []  # kept, lest an address come up twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("this cannot be one program: it draws random numbers")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and (address := _address(x)) not in self._others:
                if address not in self.memory:
                    whole = x.new_empty(0).set_(x.untyped_storage())
                    self.memory[address] = whole
                    self._copies.append(whole.clone())
                self._touched[id(x)] = weakref.ref(x)
        results = func(*args, **kwargs)
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and _address(x) not in self.memory:
                self._others.add(_address(x))
                self._made.append(x)
        return results

    def undo(self) -> None:
        """Give all memory the values of before."""
        for whole, copy in zip(self.memory.values(), self._copies, strict=True):
            whole.copy_(copy)
        self._copies, self._made = [], []

    def places(self) -> list[tuple[weakref.ref[Tensor], int]]:
        """The tensors that outlive the function, and where they lie."""
        alive = [(ref, ref()) for ref in self._touched.values()]
        return [(ref, tensor.data_ptr()) for ref, tensor in alive if tensor is not None]


def _rehearse(step: Step, arguments: Sequence[Any], inputs: Sequence[Tensor]) -> _Rehearsal:
    """Run a function once, and undo what it did."""
    rehearsal = _Rehearsal(inputs)
    try:
        with rehearsal:
            step(*arguments)
    finally:
        rehearsal.undo()
    gc.collect()  # so that of what it touched only that is left which outlives it
    return rehearsal


class _StandIns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets operations on memory act on a stand-in of it: a tensor [N] by the storage's address."""

    def __init__(self, stand_ins: dict[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stand_ins = stand_ins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replaced: dict[int, Tensor] = {}

        def replace(x: Tensor) -> Tensor:
            if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return x  # a tensor of the recording
            whole = self._stand_ins.get(_address(x))
            if whole is None:
                return x
            view = whole.as_strided(x.shape, x.stride(), x.storage_offset())
            replaced[id(view)] = x
            return view

        args, kwargs = tree_map_only(Tensor, replace, (args, kwargs or {}))
        result = func(*args, **kwargs)
        # What an operation in place returns is what it was given.
        return replaced.get(id(result), result)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _like(arguments: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The arguments, with other tensors in the places of theirs."""
    return [
        next(tensors)
        if isinstance(argument, Tensor)
        else type(argument)(*(next(tensors) for _ in argument))
        if isinstance(argument, tuple)
        else argument
        for argument in arguments
    ]


def require_compiler() -> None:
    """Raise a ValueError where Inductor finds no C++ compiler, or that no headers of Python."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second, for those who want it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("compile needs a C++ compiler: install g++, or name one in CXX") from None
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError("compile needs Python's headers: install python3-dev or what it is called")


def _inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Run:
    from torch._inductor import compile as compiled

    graph = make_fx(graph, decomposition_table=_WRITTEN_OUT, tracing_mode="fake")(*inputs)
    # Its Python wrapper would cost more than the step of a small network.
    run: Run = compiled(graph, [*inputs], options={"cpp_wrapper": True})
    return run


def _adam_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    _: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    found_inf: Tensor,
) -> None:
    """The kernel that `agents.optimizers.Adam` calls, written out, so that it becomes one loop."""
    for p, g, m, v, t in zip(
        parameters, gradients, first_moments, second_moments, steps, strict=True
    ):
        finite = found_inf == 0
        new_m = m + (1 - beta1) * (g - m)
        new_v = v + (1 - beta2) * (g * g - v)
        # 1 - b^t, which float32 loses for b near 1
        bias1, bias2 = (-torch.expm1(t * math.log(b)) for b in (beta1, beta2))
        new_p = p - lr * (new_m / bias1) / ((new_v / bias2).sqrt() + eps)
        for old, new in ((m, new_m), (v, new_v), (p, new_p)):
            old.copy_(torch.where(finite, new, old))


_WRITTEN_OUT = {torch.ops.aten._fused_adam_.default: _adam_}
