"""How much weight each iterate gets: the rules of averaging, as plain data.

Every average here moves by ``xbar <- xbar + w (x - xbar)``; only ``w`` differs. What is counted,
the same everywhere:

- ``n``: the clock, in gradient steps;
- ``D``: gradient steps between two updates of the average (``every``);
- ``k = n / D``: updates taken, the current one included, so the first is 1.

The first update of every rule copies (``w = 1`` at ``k = 1``): an average is made of the iterates
that it was shown, never of the weights before training. A rule can be asked for

- ``gain(k, every)``: the ``w`` of update k;
- ``weight(j, k, every)``: what iterate j counts in the average after k updates;
- ``share(j, k, every)``: what iterates 1..j count together, in closed form;
- ``weights(k, every)``: the list of all k weights, to print or to plot; it sums to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any


class Rule:
    """What the rules below have in common; not a rule itself.

    Example:
        >>> rule = Uniform()
        >>> isinstance(rule, Rule), rule.gain(4), rule.weights(4)
        (True, 0.25, [0.25, 0.25, 0.25, 0.25])
        >>> rule.share(1, 4)     # the first iterate of four
        0.25
    """

    def gain(self, k: int, every: int = 1) -> float:
        """The weight of the newest iterate at update ``k``."""
        return self.weight(k, k, every)

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The weight of iterate ``j`` in the average after ``k`` updates, ``1 <= j <= k``."""
        return self.share(j, k, every) - self.share(j - 1, k, every)

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The weight of iterates ``1..j`` together, from 0 at ``j = 0`` to 1 at ``j = k``."""
        raise NotImplementedError

    def falls(self, k: int, every: int = 1) -> list[int]:
        """The iterates after which the weight may be smaller; elsewhere it never falls."""
        return []

    def weights(self, k: int, every: int = 1) -> list[float]:
        """The weights of iterates ``1..k``, oldest first."""
        return [self.weight(j, k, every) for j in range(1, k + 1)]


@dataclass(frozen=True)
class Ema(Rule):
    """Exponential moving average: ``w = 1 - (1 - tau)^D``, or ``1 - 2^(-D / half_life)``.

    Args:
        tau: the weight of the newest iterate per gradient step, in (0, 1].
        half_life: instead of tau, the gradient steps after which a weight has halved, above 0.
        debias: divide by ``1 - (1 - tau)^n``, which takes the first iterate's extra weight away
            (Adam's correction; Kingma & Ba 2015, https://arxiv.org/abs/1412.6980).

    Example:
        >>> Ema(tau=0.1).weights(2)
        [0.9, 0.1]
    """

    tau: float | None = None
    half_life: float | None = None
    debias: bool = False

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.half_life is None):
            raise ValueError("Ema takes either tau or half_life")
        if self.tau is not None:
            _require(0 < self.tau <= 1, "Ema's tau must be in (0, 1]", self.tau)
        if self.half_life is not None:
            finite = math.isfinite(self.half_life) and self.half_life > 0
            _require(finite, "Ema's half_life must be above 0", self.half_life)

    def gain(self, k: int, every: int = 1) -> float:
        """``1 - (1 - tau)^D``, over ``1 - (1 - tau)^n`` with debias; 1 at the first update."""
        if k == 1:
            return 1.0
        return -self._fall(every) / (-self._fall(k * every) if self.debias else 1.0)

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The gain of update j, decayed by the ``(k - j) D`` gradient steps since."""
        decay = 1.0 + self._fall((k - j) * every)
        if self.debias:
            return decay * self._fall(every) / self._fall(k * every)
        return decay if j == 1 else -decay * self._fall(every)

    def share(self, j: int, k: int, every: int = 1) -> float:
        """``(1 - tau)^((k - j) D)``, without the weight before the first iterate if debiased."""
        if j <= 0:
            return 0.0
        decay = 1.0 + self._fall((k - j) * every)
        return decay * self._fall(j * every) / self._fall(k * every) if self.debias else decay

    def falls(self, k: int, every: int = 1) -> list[int]:
        """The first iterate stands for all before it, unless debiased."""
        return [] if self.debias else [1]

    def _fall(self, steps: int) -> float:
        """``(1 - tau)^steps - 1``, without cancellation where tau is small."""
        if self.half_life is not None:
            return math.expm1(-steps * math.log(2) / self.half_life)
        assert self.tau is not None
        return (
            (0.0 if steps == 0 else -1.0)
            if self.tau == 1
            else math.expm1(steps * math.log1p(-self.tau))
        )


@dataclass(frozen=True)
class Uniform(Rule):
    """The uniform average of all iterates after ``start``: Polyak-Ruppert averaging.

    ``w = 1 / k``; with a start, ``w = 1`` until it and then ``1 / (updates since)``.

    Args:
        start: the last gradient step that is left out; until then the average is the last iterate.

    References:
        Ruppert 1988, Cornell University report 781; Polyak & Juditsky 1992, SIAM Journal on Control
        and Optimization 30(4).

    Example:
        >>> Uniform(start=1).weights(3)
        [0.0, 0.5, 0.5]
    """

    start: int = 0

    def __post_init__(self) -> None:
        require_int(self.start, 0, "Uniform's start")

    def gain(self, k: int, every: int = 1) -> float:
        """One over the number of iterates averaged so far."""
        return 1.0 / max(1, k - self.start // every)

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The same for every iterate after the start."""
        first = min(self.start // every, k - 1)
        return 1.0 / (k - first) if j > first else 0.0

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The part of the averaged iterates that are among the first j."""
        first = min(self.start // every, k - 1)
        return max(0, j - first) / (k - first)


class Stretch(Rule):
    """The uniform average of a stretch of the run so far; only a timeline can give it.

    It depends on where the run ends, so no recursion gives it.
    """

    def first(self, k: int) -> int:
        """How many iterates are left out before it, after k updates."""
        raise NotImplementedError

    def last(self, k: int) -> int:
        """The last iterate in it, after k updates."""
        return k

    def gain(self, k: int, every: int = 1) -> float:
        """There is none; raises ValueError."""
        raise ValueError(
            f"{type(self).__name__} needs the whole run: record a Timeline and ask it for the "
            "average"
        )

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The same for every iterate of the stretch."""
        first, last = self.first(k), self.last(k)
        return 1.0 / (last - first) if first < j <= last else 0.0

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The part of the stretch that is among the first j iterates."""
        first, last = self.first(k), self.last(k)
        return (min(max(j, first), last) - first) / (last - first)

    def falls(self, k: int, every: int = 1) -> list[int]:
        """The last iterate of the stretch."""
        return [self.last(k)]


@dataclass(frozen=True)
class Tail(Stretch):
    """The uniform average of the last fraction of the run so far, whenever it is asked for.

    After k updates it is the mean of iterates ``ceil((1 - fraction) k) + 1 .. k``, at least one.

    Args:
        fraction: in (0, 1]; 0.5 is the second half of the run.

    Example:
        >>> Tail(0.5).weights(4)
        [0.0, 0.0, 0.5, 0.5]
    """

    fraction: float

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, "Tail's fraction must be in (0, 1]", self.fraction)

    @cached_property
    def _left_out(self) -> Fraction:
        return 1 - _decimal(self.fraction)

    def first(self, k: int) -> int:
        """``ceil((1 - fraction) k)``, below k."""
        return min(math.ceil(self._left_out * k), k - 1)


@dataclass(frozen=True)
class Between(Stretch):
    """The uniform average between two points of the run so far, given as fractions of it.

    After k updates it is the mean of iterates ``ceil(start k) + 1 .. ceil(end k)``, at least one:
    the policy as it was around a point of the past, like a checkpoint from there but without its
    noise. ``Between(1 - f, 1)`` is ``Tail(f)``.

    Args:
        start: in [0, 1), below end.
        end: in (0, 1].

    Example:
        >>> Between(0.25, 0.75).weights(4)
        [0.0, 0.5, 0.5, 0.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        inside = 0 <= self.start < self.end <= 1
        _require(inside, "Between's 0 <= start < end <= 1 must hold", (self.start, self.end))

    @cached_property
    def _ends(self) -> tuple[Fraction, Fraction]:
        return _decimal(self.start), _decimal(self.end)

    def first(self, k: int) -> int:
        """``ceil(start k)``, below k."""
        return min(math.ceil(self._ends[0] * k), k - 1)

    def last(self, k: int) -> int:
        """``ceil(end k)``, after the first."""
        return max(self.first(k) + 1, math.ceil(self._ends[1] * k))


@dataclass(frozen=True)
class Polynomial(Rule):
    """Polynomial decay: ``w = (1 + gamma) / (k + gamma)``.

    Args:
        gamma: at least 0; 0 is the uniform average, larger values forget the start sooner. Whole
            numbers have exact shares; others are exact to about 1e-8.

    References:
        Shamir & Zhang 2013, "Stochastic gradient descent for non-smooth optimization", ICML,
        https://arxiv.org/abs/1212.1824.

    Example:
        >>> [round(w, 6) for w in Polynomial(gamma=3).weights(10)][-2:]
        [0.230769, 0.307692]
    """

    gamma: float

    def __post_init__(self) -> None:
        finite = math.isfinite(self.gamma) and self.gamma >= 0
        _require(finite, "Polynomial's gamma must be at least 0", self.gamma)

    def gain(self, k: int, every: int = 1) -> float:
        """``(1 + gamma) / (k + gamma)``."""
        return (1 + self.gamma) / (k + self.gamma)

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The gain of update j times what the later ones leave of it."""
        return self.gain(j) * self.share(j, k)

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The product of ``(i - 1) / (i + gamma)`` over ``i = j + 1 .. k``."""
        if j <= 0:
            return 0.0
        if self.gamma == int(self.gamma) <= 64:
            return math.prod((j + m) / (k + m) for m in range(int(self.gamma) + 1))
        log = math.lgamma
        return math.exp(log(k) - log(k + 1 + self.gamma) - log(j) + log(j + 1 + self.gamma))


@dataclass(frozen=True)
class Power(Rule):
    """Power-function average: ``w = 1 - (1 - D / n)^(gamma + 1)``, weights ~ ``n^gamma``.

    Its centre of mass stays at ``(gamma + 1) / (gamma + 2)`` of the run, however long it gets.

    Args:
        gamma: at least 0; 0 is the uniform average.
        sigma_rel: instead of gamma, the standard deviation of the weights over the length of the
            run, in (0, 12^(-1/2)].

    References:
        Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
        CVPR, https://arxiv.org/abs/2312.02696.

    Example:
        >>> round(Power(sigma_rel=0.1).exponent, 6)
        6.937204
    """

    gamma: float | None = None
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        if (self.gamma is None) == (self.sigma_rel is None):
            raise ValueError("Power takes either gamma or sigma_rel")
        if self.gamma is not None:
            finite = math.isfinite(self.gamma) and self.gamma >= 0
            _require(finite, "Power's gamma must be at least 0", self.gamma)
        if self.sigma_rel is not None:
            known = 0 < self.sigma_rel <= 12**-0.5
            _require(known, "Power's sigma_rel must be in (0, 12^(-1/2)]", self.sigma_rel)

    @cached_property
    def exponent(self) -> float:
        """Gamma, as given or from sigma_rel."""
        if self.gamma is not None:
            return self.gamma
        assert self.sigma_rel is not None
        return _gamma(self.sigma_rel)

    def share(self, j: int, k: int, every: int = 1) -> float:
        """``(j / k)^(gamma + 1)``."""
        return (j / k) ** (self.exponent + 1) if j > 0 else 0.0

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The difference of two shares, without cancellation."""
        fall = math.expm1((self.exponent + 1) * math.log1p(-1 / j)) if j > 1 else -1.0
        return -self.share(j, k) * fall


@dataclass(frozen=True)
class Window(Rule):
    """The mean of the last ``size`` snapshots, taken every ``every`` gradient steps (LAWA).

    Until the first snapshot the average is the last iterate.

    Args:
        size: snapshots kept, at least 1.
        every: gradient steps between two snapshots, at least 1; one is taken by the first update
            at or after each multiple.

    References:
        Kaddour 2022, "Stop wasting my time! Saving days of ImageNet and BERT training with latest
        weight averaging", https://arxiv.org/abs/2209.14981.

    Example:
        >>> Window(size=2, every=2).weights(5)
        [0.0, 0.5, 0.0, 0.5, 0.0]
    """

    size: int
    every: int

    def __post_init__(self) -> None:
        require_int(self.size, 1, "Window's size")
        require_int(self.every, 1, "Window's every")

    def fires(self, k: int, every: int = 1) -> bool:
        """True where update k takes a snapshot."""
        return k * every // self.every > (k - 1) * every // self.every

    def snapshots(self, k: int, every: int = 1) -> list[int]:
        """The iterates whose mean is the average after k updates."""
        # A snapshot belongs to update ceil(i s / D), for each multiple i s of the period s.
        last = k * every // self.every
        taken = {
            -(-i * self.every // every) for i in range(max(1, last - self._depth(every)), last + 1)
        }
        return sorted(taken)[-self.size :] or [k]

    def gain(self, k: int, every: int = 1) -> float:
        """There is none, since old snapshots leave; raises ValueError."""
        raise ValueError("Window is a ring of snapshots and has no gain")

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """One over the number of snapshots, 0 for other iterates."""
        taken = self.snapshots(k, every)
        return 1.0 / len(taken) if j in taken else 0.0

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The part of the snapshots that are among the first j iterates."""
        taken = self.snapshots(k, every)
        return sum(i <= j for i in taken) / len(taken)

    def falls(self, k: int, every: int = 1) -> list[int]:
        """The snapshots."""
        return self.snapshots(k, every)

    def _depth(self, every: int) -> int:
        """Multiples to look back over: several may fall on one update where the period is short."""
        return self.size * max(1, -(-every // self.every))


@dataclass(frozen=True)
class Warmup(Rule):
    """An exponential average that forgets its start faster: ``w = max(tau, (1 + e / g)^-p)``.

    Here ``e = k - 1 + ahead`` counts updates, whatever lies between them, and ``g`` is inv_gamma.
    ``Warmup(1e-4)`` is the schedule of ema-pytorch; ``Warmup(tau, inv_gamma=9, power=1, ahead=1)``
    is torch_ema's decay ``min(1 - tau, (1 + n) / (10 + n))`` at its n-th update after the first
    iterate.

    Args:
        tau: the weight of the newest iterate once warm, in [0, 1).
        inv_gamma: updates by which the schedule is stretched, at least 1.
        power: in (0, 1]; 2/3 suits runs of a million updates, 3/4 shorter ones.
        ahead: updates by which the schedule is ahead, at least 0.

    References:
        https://github.com/lucidrains/ema-pytorch, https://github.com/fadel/pytorch_ema.

    Example:
        >>> [round(w, 3) for w in Warmup(tau=0.3, power=1).weights(3)]     # gains 1, 1/2, 1/3
        [0.333, 0.333, 0.333]
    """

    tau: float
    inv_gamma: float = 1.0
    power: float = 2 / 3
    ahead: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.tau < 1, "Warmup's tau must be in [0, 1)", self.tau)
        finite = math.isfinite(self.inv_gamma) and self.inv_gamma >= 1
        _require(finite, "Warmup's inv_gamma must be at least 1", self.inv_gamma)
        _require(0 < self.power <= 1, "Warmup's power must be in (0, 1]", self.power)
        require_int(self.ahead, 0, "Warmup's ahead")

    def gain(self, k: int, every: int = 1) -> float:
        """``max(tau, (1 + (k - 1 + ahead) / inv_gamma)^-power)``; 1 at the first update."""
        return 1.0 if k == 1 else max(self.tau, self._warm(k))

    def weight(self, j: int, k: int, every: int = 1) -> float:
        """The gain of update j times what the later ones leave of it."""
        return self.gain(j) * self.share(j, k)

    def share(self, j: int, k: int, every: int = 1) -> float:
        """The product of ``1 - w`` over updates ``j + 1 .. k``, from a table of sums of logs."""
        return math.exp(self._log_left(k) - self._log_left(j)) if j > 0 else 0.0

    def falls(self, k: int, every: int = 1) -> list[int]:
        """The first iterate, where the second gain is below a half."""
        return [1] if k > 1 and self.gain(2) < 0.5 else []

    def _warm(self, k: int) -> float:
        return float((1 + (k - 1 + self.ahead) / self.inv_gamma) ** -self.power)

    @cached_property
    def _logs(self) -> list[float]:
        """The sums of ``log(1 - w)`` over updates ``2 .. k``, as far as they were asked for."""
        return [0.0, 0.0]

    def _log_left(self, k: int) -> float:
        logs = self._logs
        while len(logs) <= k and self._warm(len(logs)) > self.tau:
            logs.append(logs[-1] + math.log1p(-self.gain(len(logs))))
        warm = min(k, len(logs) - 1)
        return logs[warm] + ((k - warm) * math.log1p(-self.tau) if k > warm else 0.0)


RULES: dict[str, type[Rule]] = {
    rule.__name__.lower(): rule
    for rule in (Ema, Uniform, Tail, Between, Polynomial, Power, Window, Warmup)
}


def parse_rule(text: str) -> Rule:
    """A rule from a command line.

    Args:
        text: ``name``, ``name:value`` for the first argument, or ``name:argument=value,...``.

    Raises:
        ValueError: no such rule or argument, or a value out of range.

    Example:
        >>> parse_rule("tail:0.3"), parse_rule("ema:half_life=2000")
        (Tail(fraction=0.3), Ema(tau=None, half_life=2000, debias=False))
    """
    name, _, rest = text.partition(":")
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(RULES)}")
    rule = RULES[name]
    known = [field.name for field in fields(rule)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for position, part in enumerate(rest.split(",") if rest else []):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = known[min(position, len(known) - 1)], part
        if key not in known or key in arguments:
            raise ValueError(f"{text!r}: {name} takes {', '.join(known)}, each once")
        arguments[key] = _value(text, value)
    try:
        return rule(**arguments)
    except TypeError as error:
        raise ValueError(f"{text!r}: {name} needs {', '.join(known)}") from error


def describe_rule(rule: Rule) -> dict[str, Any]:
    """A rule as plain values."""
    return {"rule": type(rule).__name__.lower(), **asdict(rule)}  # type: ignore[call-overload]


def rule_from(description: Mapping[str, Any]) -> Rule:
    """The rule that :func:`describe_rule` described."""
    arguments = {key: value for key, value in description.items() if key != "rule"}
    return RULES[description["rule"]](**arguments)


def _value(text: str, value: str) -> bool | float:
    if value in ("True", "true", "False", "false"):
        return value in ("True", "true")
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is not a number") from None


def _decimal(fraction: float) -> Fraction:
    # 0.3 means three tenths, not the double beside it: ceil must not see the difference.
    return Fraction(fraction).limit_denominator(10**6)


def _gamma(sigma_rel: float) -> float:
    """The largest real root of ``g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)``.

    From ``sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``, which falls in gamma >= 0.
    """
    low, high = 0.0, 1.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        variance = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
        low, high = (middle, high) if variance > sigma_rel**2 else (low, middle)
    return (low + high) / 2


def _require(holds: bool, what: str, given: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {given!r}")


def require_int(value: int, least: int, what: str) -> None:
    """Raise ValueError unless it is a whole number of at least ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and value >= least, f"{what} must be a whole number of at least {least}", value)
