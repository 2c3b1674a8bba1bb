"""A gradient step as one program, without the Python around it."""

import gc
import math
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:  # private, or called experimental: torch may move them
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only
except ImportError as error:
    raise ImportError(
        f"agents/program.py is written for torch 2.11 to 2.13, got {torch.__version__}: {error}"
    ) from error

Step = Callable[..., dict[str, Tensor]]
Run = Callable[[], Sequence[Tensor]]
Build = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


def inductor(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """A graph compiled by torch, its operations fused."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    made: list[Callable[[list[Tensor]], Sequence[Tensor]]] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(compile_fx_inner(*args, **kwargs))
        return made[-1]

    on_cpu = inputs[0].device.type == "cpu"
    # On CPU a Python wrapper would cost more than the step of a small network; a CUDA graph has
    # none, and there small kernels that do not depend on each other become one.
    options = {"cpp_wrapper": True} if on_cpu else {"combo_kernels": True}
    graph = make_fx(graph, decomposition_table=_WRITTEN_OUT, tracing_mode="fake")(*inputs)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # which would not ask `keep`
        compile_fx(graph, [*inputs], inner_compile=keep, config_patches=options)
    # What comes back has five calls of Python around this one, for gradients and for results that
    # are views of inputs, of which there are none.
    (program,) = made
    return lambda *tensors: program([*tensors])


def build_for(device: torch.device) -> Build | None:
    """What makes programs fast on a device: Inductor, unless there is a GPU and no Triton."""
    return None if device.type == "cuda" and not find_spec("triton") else inductor


class Program:
    """A function whose Python runs once; what it did to tensors is then repeated.

    The operations are compiled by Inductor, which fuses them, and takes some ten seconds: results
    are the function's to rounding. That needs a C++ compiler on CPU and Triton on CUDA. There the
    kernels are then captured in a CUDA graph and launched at once; results hold until the next
    call. With `build=None` a CUDA graph captures the very kernels that the function launches: its
    results to the bit.

    What the function reads and writes (weights, moments, targets, rows, counters) is found by a
    rehearsal, after which it has its old values again. `renew` has the program made anew where
    one of these tensors has moved or is gone; it does not notice that the function would use
    another one while the old one is kept somewhere. Numbers are read once: a learning rate stays
    what it was. The function may not draw random numbers or act on a tensor's value.

    Args:
        step: Takes plain values, for each of which it is recorded separately; returns names and
            tensors.
        device: Where its tensors are.
        build: Makes the recorded graph callable; None, on CUDA only: nothing does.

    Attributes:
        recorded: What stands for the function, by the values that it takes.

    Raises:
        RuntimeError: At the first call: `step` draws random numbers, takes a tensor's value by
            `item()` or as a condition, moves a tensor to other memory, or the compiler fails.
    """

    def __init__(
        self, step: Step, device: torch.device | str = "cpu", build: Build | None = inductor
    ) -> None:
        self._step = step
        self._device = torch.device(device)
        self._build = build
        self.recorded: dict[tuple[Any, ...], _Recorded] = {}

    def __call__(self, *values: Any) -> dict[str, Tensor]:
        """What the function returns for these values."""
        recorded = self.recorded.get(values)
        if recorded is None:
            with torch.enable_grad():  # what differentiates a loss is part of it
                on_cpu = self._device.type == "cpu"
                recorded = self._compile(values)[0] if on_cpu else self._capture(values)
            self.recorded[values] = recorded
        return dict(zip(recorded.names, recorded.run(), strict=True))

    def renew(self) -> None:
        """Look whether all memory is where it was; what was recorded of other memory is dropped.

        A function that moves memory itself, as a target network does that follows its online
        network to another place, must have done so before.
        """
        self.recorded = {key: one for key, one in self.recorded.items() if one.current()}

    def _compile(self, values: Sequence[Any]) -> tuple["_Recorded", "_Rehearsal"]:
        """Record the operations as a graph of all memory that is touched, and have it built."""
        rehearsal = _rehearse(self._step, values)
        places = rehearsal.places()
        if self._build is None:
            return _Recorded([], list, places), rehearsal
        memory = [*rehearsal.memory.values()]
        names: list[str] = []

        def step(*tensors: Tensor) -> list[Tensor]:
            with _StandIns(dict(zip(rehearsal.memory, tensors, strict=True))):
                results = self._step(*values)
                names[:] = results
                return [torch.clone(x) for x in results.values()]  # one may be memory itself

        graph = make_fx(step, tracing_mode="fake")(*memory)
        run = self._build(graph, memory)
        return _Recorded(names, lambda: run(*memory), places), rehearsal

    def _capture(self, values: Sequence[Any]) -> "_Recorded":
        """Capture the kernels in a CUDA graph."""
        device = self._device  # not always the current one, on which a capture would be empty
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:  # where libraries set themselves up, before the capture
            with torch.cuda.stream(stream):
                one, rehearsal = self._compile(values)
                if self._build is not None:  # Triton loads its kernels at the first call
                    with rehearsal.undone():
                        one.run()
        finally:  # for whoever catches an error, too, all is undone
            torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            if self._build is None:
                results = self._step(*values)
            else:
                results = dict(zip(one.names, one.run(), strict=True))
        tensors = [*results.values()]

        def run() -> list[Tensor]:
            graph.replay()
            return tensors

        return _Recorded([*results], run, one.places)


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


# What it returns, or of what size, is known to nobody but the device.
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what memory from before is touched, and keeps a copy of what is written to.

    Attributes:
        memory: By address of the storage, a tensor [N] of all of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, Tensor] = {}
        self._copies: dict[int, Tensor] = {}
        self._touched: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._written: list[int] = []
        self._others = {0}  # 0: of tensors without elements
        self._made: list[Tensor] = []  # kept, lest an address come up twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("this cannot be one program: it draws random numbers")
        if _BY_VALUE & set(func.tags) and func is not torch.ops.aten.index.Tensor:
            raise RuntimeError("this cannot be one program: it reads a tensor's value")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and (address := _address(x)) not in self._others:
                if address not in self.memory:
                    self.memory[address] = x.new_empty(0).set_(x.untyped_storage())
                self._touched[id(x)] = weakref.ref(x), x.data_ptr()
        for x in _written(func, args, kwargs):
            if (address := _address(x)) in self.memory and address not in self._copies:
                self._copies[address] = self.memory[address].clone()
        results = func(*args, **kwargs)
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and _address(x) not in self.memory:
                self._others.add(_address(x))
                self._made.append(x)
        return results

    def undo(self) -> None:
        """Give all memory the values of before."""
        for address, copy in self._copies.items():
            self.memory[address].copy_(copy)
        self._written, self._copies, self._made = [*self._copies], {}, []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo what is done meanwhile by the same function."""
        copies = [(self.memory[address], self.memory[address].clone()) for address in self._written]
        try:
            yield
        finally:
            for memory, copy in copies:
                memory.copy_(copy)

    def places(self) -> list[tuple[weakref.ref[Tensor], int]]:
        """The tensors that outlive the function, and where they lie.

        Raises:
            RuntimeError: The function moved one of them.
        """
        alive = [(ref, ref(), place) for ref, place in self._touched.values()]
        if any(tensor is not None and tensor.data_ptr() != place for _, tensor, place in alive):
            raise RuntimeError("this cannot be one program: it moves a tensor's memory")
        return [(ref, place) for ref, tensor, place in alive if tensor is not None]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    return written


def _rehearse(step: Step, values: Sequence[Any]) -> _Rehearsal:
    """Run a function once, and undo what it did."""
    rehearsal = _Rehearsal()
    try:
        with rehearsal:
            step(*values)
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
            if x.is_contiguous() and x.numel() == whole.numel():
                view = whole.view(x.shape)  # to which Inductor writes in place, whatever its part
            else:
                view = whole.as_strided(x.shape, x.stride(), x.storage_offset())
            replaced[id(view)] = x
            return view

        args, kwargs = tree_map_only(Tensor, replace, (args, kwargs or {}))
        result = func(*args, **kwargs)
        # What an operation in place returns is what it was given.
        return replaced.get(id(result), result)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def require_compiler() -> None:
    """Look for what Inductor needs on CPU.

    Raises:
        ValueError: There is no C++ compiler, or there are no headers of Python.
    """
    try:  # a second, for those who want it
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError as error:
        raise ValueError(
            f"compile needs torch 2.11 to 2.13, here is {torch.__version__}: {error}"
        ) from error

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("compile needs a C++ compiler: install g++, or name one in CXX") from None
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError("compile needs Python's headers: install python3-dev or what it is called")


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
        bias1, bias2 = (_once(-torch.expm1(t * math.log(b))) for b in (beta1, beta2))
        new_p = p - lr * (new_m / bias1) / ((new_v / bias2).sqrt() + eps)
        for old, new in ((m, new_m), (v, new_v), (p, new_p)):
            old.copy_(torch.where(finite, new, old))


def _once(number: Tensor) -> Tensor:
    """A number that a loop reads: Inductor would compute it anew in each turn of the loop."""
    return number.as_strided((), ())  # that needs it to lie in memory


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._fused_adam_.default: _adam_,
    # The product wants the bias copied to every row beforehand, by a loop of its own; an addition
    # behind it shares the loop of what follows.
    torch.ops.aten.baddbmm.default: lambda bias, x, weight: bias + torch.bmm(x, weight),
}
