"""The averages of one network on one clock: those that a recursion gives, and all others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak_rl.average import AverageBank
from polyak_rl.buffers import Buffers
from polyak_rl.files import write_whole
from polyak_rl.guard import Guard, damage_is_a_value_error
from polyak_rl.iterates import Keeper, load_all
from polyak_rl.rules import Rule, Stretch, describe_rule, rule_from
from polyak_rl.timeline import Timeline, read_state
from polyak_rl.vector import Averages

_FORMAT = "polyak_rl.averages/2"


class PolicyAverages(Averages["str | Rule"]):
    """The averages of one network by any rules: a bank and a timeline on one clock.

    Rules that have a recursion are kept by an :class:`polyak_rl.AverageBank`; those that have none
    (``Tail``, ``Between``) and all that are asked for afterwards are answered by a
    :class:`polyak_rl.Timeline`. Before the first iterate every average is the network as it is.

    Args:
        network: what is averaged, the network that acts; it is only read.
        rules: the averages by name. ``"last"`` is the network as it is and cannot be another.
        timeline: record the course of the weights.
        capacity: the segments of the timeline, as in :class:`polyak_rl.Timeline`.
        expected: the gradient steps of the run, if known, as in :class:`polyak_rl.Timeline`.
        every: :meth:`record` takes an iterate at its N-th, 2N-th, 3N-th call.
        buffers: as in :class:`polyak_rl.AverageBank`.
        max_weight_error: as in :class:`polyak_rl.Timeline`.
        max_bytes: the memory that the timeline may take.
        guard: as in :class:`polyak_rl.AverageBank`.

    Attributes:
        rules: the averages by name.
        bank: the averages that have a recursion, or None where there are none.
        timeline: the course of the weights, or None.

    Raises:
        ValueError: a ``Tail`` or ``Between`` without timeline, no rules and no timeline, an average
            called ``"last"``, or what the bank and the timeline refuse.

    Example:
        >>> from polyak_rl import PolicyAverages, Tail, Uniform
        >>> policy = nn.Linear(1, 1, bias=False)
        >>> averages = PolicyAverages(policy, {"uniform": Uniform(), "tail50": Tail(0.5)})
        >>> for value in (1.0, 2.0, 6.0, 8.0):
        ...     _ = nn.init.constant_(policy.weight, value)     # a gradient step
        ...     averages.record()
        >>> averages.average("tail50")["weight"].item()
        7.0
        >>> averages.average(Tail(0.25))["weight"].item()       # not asked for before
        8.0
    """

    def __init__(
        self,
        network: nn.Module,
        rules: Mapping[str, Rule],
        *,
        timeline: bool = True,
        capacity: int | None = None,
        expected: int | None = None,
        every: int = 1,
        buffers: Buffers = "copy",
        max_weight_error: float = 0.05,
        max_bytes: int = 1 << 30,
        guard: Guard = None,
    ) -> None:
        stretches = [name for name, rule in rules.items() if isinstance(rule, Stretch)]
        if "last" in rules:
            raise ValueError("'last' is the network as it is: give the average another name")
        if stretches and not timeline:
            kind = type(rules[stretches[0]]).__name__
            raise ValueError(f"{stretches[0]!r} is a {kind}, which needs timeline=True")
        if not rules and not timeline:
            raise ValueError("nothing to average: give rules or timeline=True")
        self.rules = dict(rules)
        self.every = every
        moving = {name: rule for name, rule in rules.items() if name not in stretches}
        self.bank: AverageBank | None = None
        self.timeline: Timeline | None = None
        self._keepers: list[Keeper[Any]] = []
        if moving:
            self.bank = AverageBank(network, moving, every=every, buffers=buffers, guard=guard)
            self._keepers.append(self.bank)
        if timeline:
            self.timeline = Timeline(
                network,
                capacity=capacity,
                expected=expected,
                every=every,
                buffers=buffers,
                max_weight_error=max_weight_error,
                max_bytes=max_bytes,
                guard=guard,
            )
            if self.bank:
                self.timeline.share(self.bank)
            self._keepers.append(self.timeline)
        self._vector = self._keepers[0]._vector

    @property
    def network(self) -> nn.Module:
        """What is averaged."""
        return self._vector.module

    @property
    def clock(self) -> int:
        """How often :meth:`record` was called, without the calls that the guard left out."""
        return self._keepers[0].clock

    @property
    def skipped(self) -> int:
        """The calls that the guard left out."""
        return self._keepers[0].skipped

    @torch.no_grad()
    def record(self, *_: object) -> None:
        """Count one gradient step, and at every N-th take the weights in: both keepers or none.

        It ignores arguments, so that an optimizer can call it as a hook
        (``register_step_post_hook``).

        Raises:
            RuntimeError: inside :meth:`applied`, where the network holds an average; or while a
                CUDA graph is captured.
            ValueError: the network has other names or shapes than before.
        """
        self._keepers[0]._iterates.record("PolicyAverages.record()", *self._keepers)

    def expect(self) -> None:
        """Make ready for a gradient step that has :meth:`write` in it.

        Raises:
            RuntimeError: inside :meth:`applied`, or while a CUDA graph is captured.
        """
        self._keepers[0]._iterates.expect("PolicyAverages.expect()", *self._keepers)

    def write(self) -> None:
        """Copy the weights to where :meth:`record` would, as a part of the gradient step.

        It is tensor operations alone, so a step that ends with it can be captured in a CUDA graph
        or compiled, averages included. On the host :meth:`expect` comes before each step and
        :meth:`count` after it; some six kernels more are launched every 32 steps, when averages
        take in what was written. For a network in flat memory (:func:`polyak_rl.flatten_`) and
        averages without a guard. Loading a state, or moving the network, puts averages into other
        memory: what was captured or compiled before must be made anew.

        Raises:
            RuntimeError: the network is not flat, or there is a guard.
        """
        self._keepers[0]._iterates.write()

    def count(self) -> None:
        """Count a gradient step that has written.

        Raises:
            RuntimeError: :meth:`expect` was not called before it, or something was recorded or
                loaded since; or the network holds an average.
        """
        self._keepers[0]._iterates.count()

    def ready(self, which: str | Rule) -> bool:
        """True where an average can be given now; False while the timeline is too coarse for it.

        Whoever evaluates averages during a run leaves out those that are not ready.

        Raises:
            ValueError: there is no such average.
        """
        if not isinstance(keeper := self._keeper(which), Timeline):
            return True
        return keeper.weight_error(self._rule(which)) <= keeper.max_weight_error

    @torch.inference_mode(False)
    @torch.no_grad()
    def vector(self, which: str | Rule) -> Tensor:
        """One average as a vector in the layout of the network.

        Args:
            which: the name of an average, ``"last"``, or any rule, which the timeline answers.

        Raises:
            ValueError: there is no such average, or the timeline is absent or too coarse for it
                (:meth:`ready` tells).
        """
        keeper = self._keeper(which)
        if keeper is None:
            return self._vector.now()
        if isinstance(keeper, AverageBank):
            assert isinstance(which, str)
            return keeper.vector(which)
        return keeper.vector(self._rule(which))

    @torch.inference_mode(False)
    @torch.no_grad()
    def last(self) -> dict[str, Tensor]:
        """The network as it is: copies of its averaged tensors by name, in their own precision."""
        return self._vector.clone()

    @torch.no_grad()
    def distances(self, members: int = 1) -> dict[str, Tensor]:
        """How far each average is from the network, relative to it: ``|xbar - x| / |x|``.

        Args:
            members: the leading index of the network's tensors has this many independent networks.

        Returns:
            Name -> distances ``[members]``, of the averages that are :meth:`ready`.
        """
        last = self.average("last")

        def norm(state: Mapping[str, Tensor]) -> Tensor:
            squares = [x.abs().double().view(members, -1).square().sum(1) for x in state.values()]
            return torch.stack(squares).sum(0).sqrt()

        return {
            name: norm({n: x - last[n] for n, x in self.average(name).items()}) / norm(last)
            for name in self.rules
            if self.ready(name)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything kept and how it was asked for, as tensors and plain values."""
        parts = {keeper._kind: keeper._state() for keeper in self._keepers}
        since = min(keeper._since() for keeper in self._keepers)
        return self._about() | self._keepers[0]._iterates.state_dict(since) | parts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: other rules or options, or what the bank and the timeline refuse.
        """
        with damage_is_a_value_error("averages"):
            for what, ours in self._about().items():
                if state[what] != ours:
                    raise ValueError(
                        f"the saved averages differ in {what}: {state[what]} there, {ours} here"
                    )
            load_all(self._keepers, state, [state[keeper._kind] for keeper in self._keepers])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the averages to a file of tensors and plain values: all of it or nothing."""
        with write_whole(path) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], network: nn.Module, **options: Any
    ) -> PolicyAverages:
        """Read averages that :meth:`save` wrote, to go on with them.

        Args:
            path: the file. It is read as data; a pickle that would run code is refused.
            network: a network of the averaged architecture, which is averaged from here on.
            options: ``buffers``, ``max_weight_error``, ``max_bytes`` and ``guard`` as in the
                constructor.

        Raises:
            ValueError: the file holds no averages, is damaged, or is of another network.
        """
        state = read_state(path, _FORMAT, "averages")
        with damage_is_a_value_error("averages"):
            rules = {name: rule_from(rule) for name, rule in state["rules"].items()}
            averages = cls(network, rules, **state["options"], **options)
        averages.load_state_dict(state)
        return averages

    def _about(self) -> dict[str, Any]:
        timeline = self.timeline
        return {
            "format": _FORMAT,
            "rules": {name: describe_rule(rule) for name, rule in self.rules.items()},
            "options": {
                "timeline": timeline is not None,
                "capacity": timeline.capacity if timeline else None,
                "expected": timeline.expected if timeline else None,
                "every": self.every,
            },
        }

    def _keeper(self, which: str | Rule) -> AverageBank | Timeline | None:
        """What gives an average; None: the network as it is."""
        rule = self._rule(which)
        if rule is None or self.clock < self.every:
            return None
        if self.bank is not None and isinstance(which, str) and not isinstance(rule, Stretch):
            return self.bank
        if self.timeline is None:
            raise ValueError(f"{rule} was not recorded: name it in rules, or use timeline=True")
        return self.timeline

    def _rule(self, which: str | Rule) -> Any:
        """The rule of an average; None for the last iterate."""
        if isinstance(which, Rule) or which == "last":
            return None if which == "last" else which
        if which not in self.rules:
            raise ValueError(
                f"there is no average {which!r}; the averages are {', '.join(self.rules)}"
            )
        return self.rules[which]
