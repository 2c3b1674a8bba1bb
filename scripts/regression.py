"""Which average is which: a regression with SGD, ASGD and Polyak step sizes.

    python -m scripts.regression                                the full batch, as in the notebook
    python -m scripts.regression --batch-size 10 --epochs 200   mini-batches: averaging matters

It repeats the notebook "Polyak-Ruppert averaging" (github.com/dimidagd/gists) number by number. The
notebook averages with a constant weight, theta' <- .91 theta' + .09 theta: an **exponential**
average, which remembers the last dozen steps. Polyak-Ruppert averaging (Ruppert 1988; Polyak &
Juditsky 1992) is the **uniform** mean. Both are shown here under their own names, beside the last
iterate, for three optimizers on the same data from the same initial weights.

Then a classifier that can fit every sample, where Polyak step sizes (a third Polyak: no average
at all) need no tuning and SGD does.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from polyak_rl.optim import ASGD, PolyakSGD
from polyak_rl.target import soft_update
from scripts.experiment.paths import make_folder
from scripts.experiment.terminal import command_line

# What the notebook prints: the sum of the differences between the predictions of the last iterate
# and of the average, and the test RMSE of the average and of the last iterate.
NOTEBOOK = (-18.67245864868164, 1.3458468914031982, 1.3584779500961304)
SAMPLES = 1000
AVERAGES = ("last", "exponential", "uniform")


@dataclass(frozen=True)
class Config:
    """The notebook's setting."""

    figure: Path = Path("runs/regression.png")
    """where the figure is written"""
    batch_size: int = SAMPLES
    """samples in a gradient step; 1000 is the full batch"""
    epochs: int = 1000
    """passes over the data"""
    lr: float = 0.1
    """learning rate of SGD and ASGD"""
    decay: float = 0.91
    """weight of the exponential average's past, in steps"""
    start: float = 0.5
    """fraction of the steps after which the uniform average starts"""
    seed: int = 42
    """of the data, the initial weights and the order of the batches"""
    threads: int = 1
    """CPU threads; the notebook's numbers differ in the fifth digit between thread counts"""

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= SAMPLES:
            raise ValueError(f"batch_size must be in 1 ... {SAMPLES}, got {self.batch_size}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("decay", "start"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.figure.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"figure must end in .png, .svg or .pdf, got {self.figure}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")

    @property
    def steps(self) -> int:
        """Gradient steps of the run."""
        return self.epochs * math.ceil(SAMPLES / self.batch_size)

    @property
    def first_averaged_step(self) -> int:
        """The step with which the uniform average starts; ASGD's starts at t0 + 2."""
        return max(2, int(self.start * self.steps) + 1)


class Network(nn.Module):
    """The notebook's network, with x added to every hidden unit of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, 100)
        self.linear2 = nn.Linear(100, 100)
        self.linear3 = nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predict y, [B, 1], from x, [B, 1]."""
        y: Tensor = self.linear3(torch.sigmoid(self.linear2(torch.sigmoid(self.linear1(x) + x))))
        return y


class Data(NamedTuple):
    """Training and test samples, each [N, 1]."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Run(NamedTuple):
    """The three networks at the end of training, and their test RMSE after every epoch."""

    networks: dict[str, Network]
    curves: dict[str, list[float]]


def sample(seed: int) -> tuple[Data, Network]:
    """Draw y = 3 x + x^2 + noise^2, noise ~ N(0, 1), and the initial network, as the notebook does.

    The squared noise has mean 1 and variance 2: no loss below about 2 can be had without
    overfitting, and no test RMSE below about 1.41 on an endless test set.
    """
    torch.manual_seed(seed)
    x, x_test = torch.randn(SAMPLES, 1), torch.randn(100, 1)
    y, y_test = (3 * z + z**2 + torch.randn(len(z), 1) ** 2 for z in (x, x_test))
    return Data(x, y, x_test, y_test), Network()


def optimizers(config: Config) -> dict[str, Callable[[Network], Optimizer]]:
    """Return what is compared: PolyakSGD is left at its defaults, but for f_min in the last."""
    t0 = config.first_averaged_step - 2
    return {
        f"SGD, lr {config.lr:g}": lambda net: SGD(net.parameters(), config.lr),
        f"ASGD, lr {config.lr:g}": lambda net: ASGD(net.parameters(), config.lr, t0=t0),
        "PolyakSGD, f_min 0": lambda net: PolyakSGD(net.parameters()),
        "PolyakSGD, f_min 2": lambda net: PolyakSGD(net.parameters(), f_min=2.0),
    }


def minibatches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of one epoch's batches; the full batch keeps the order of the data."""
    order = torch.randperm(size, generator=generator) if batch_size < size else torch.arange(size)
    yield from torch.split(order, batch_size)


def step(optimizer: Optimizer, loss: Tensor) -> None:
    """Take a gradient step; Polyak's needs to see the loss."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step(loss=loss) if isinstance(optimizer, PolyakSGD) else optimizer.step()


def train(
    config: Config, data: Data, initial: Network, make_optimizer: Callable[[Network], Optimizer]
) -> Run:
    """Train a copy of the initial network and keep both averages beside it."""
    network, exponential, uniform = (copy.deepcopy(initial) for _ in AVERAGES)
    networks = dict(zip(AVERAGES, (network, exponential, uniform), strict=True))
    curves: dict[str, list[float]] = {name: [] for name in AVERAGES}
    optimizer = make_optimizer(network)
    generator = torch.Generator().manual_seed(config.seed)

    n = 0
    for _ in range(config.epochs):
        for batch in minibatches(SAMPLES, config.batch_size, generator):
            step(optimizer, F.mse_loss(network(data.x[batch]), data.y[batch]))
            n += 1
            # Every average is xbar <- xbar + w (x - xbar); only w differs.
            soft_update(exponential, network, 1 - config.decay)
            if not isinstance(optimizer, ASGD):
                soft_update(uniform, network, 1 / max(1, n - config.first_averaged_step + 1))
        if isinstance(optimizer, ASGD):  # it has kept its uniform average itself
            uniform.load_state_dict(optimizer.averaged_state_dict(network))
        with torch.no_grad():
            for name, averaged in networks.items():
                rmse = F.mse_loss(averaged(data.x_test), data.y_test).sqrt()
                curves[name].append(rmse.item())
    return Run(networks, curves)


def separable(seed: int, margin: float = 2.0) -> tuple[Tensor, Tensor]:
    """Draw 200 points in 10 dimensions, labelled by a plane with a margin on both sides of it."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.randn(1000, 10, generator=generator)
    normal = F.normalize(torch.randn(10, generator=generator), dim=0)
    height = x @ normal
    kept = (height.abs() >= margin / 2).nonzero()[:200, 0]
    return x[kept], (height[kept] > 0).float()


def classify(
    make_optimizer: Callable[[nn.Module], Optimizer], seed: int, epochs: int = 50
) -> tuple[int, float, float]:
    """Train a small classifier until it makes no error; return epochs, error rate and loss."""
    x, y = separable(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
    optimizer = make_optimizer(network)
    generator = torch.Generator().manual_seed(seed)
    error, loss = 1.0, math.nan
    epoch = 0
    while error > 0 and epoch < epochs:
        epoch += 1
        for batch in minibatches(len(x), 20, generator):
            step(optimizer, F.binary_cross_entropy_with_logits(network(x[batch]), y[batch]))
        with torch.no_grad():
            logits = network(x)
            loss = F.binary_cross_entropy_with_logits(logits, y).item()
            # A NaN is above no threshold and below none: it is an error on both sides.
            error = 1 - torch.where(y > 0, logits > 0, logits < 0).float().mean().item()
    return epoch, error, loss


def draw(config: Config, data: Data, runs: dict[str, Run]) -> None:
    """Draw the fit of SGD's three networks, and the test error of every optimizer over epochs."""
    # Okabe & Ito's colours; line styles tell the curves apart without colour too.
    styles = {
        "last": {"color": "#999999", "linestyle": "-", "linewidth": 0.8},
        "exponential": {"color": "#E69F00", "linestyle": "--", "linewidth": 1.6},
        "uniform": {"color": "#0072B2", "linestyle": "-", "linewidth": 2.4},
    }
    labels = {
        "last": "last iterate",
        "exponential": f"exponential average, decay {config.decay:g}",
        "uniform": f"uniform average (Polyak-Ruppert)\nfrom step {config.first_averaged_step}",
    }
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    fit, legend, panels = axes[0, 0], axes[0, 2], [axes[0, 1], *axes[1].tolist()]

    name, run = next(iter(runs.items()))
    x = torch.linspace(-3, 3, 200)[:, None]
    fit.scatter(data.x_test, data.y_test, s=9, color="#bbbbbb", label="test samples")
    fit.plot(x, 3 * x + x**2 + 1, color="black", linestyle=":", label="mean of y given x")
    with torch.no_grad():
        for average, network in run.networks.items():
            fit.plot(x, network(x), label=labels[average], **styles[average])
    fit.set(title=f"{name}: fit after {config.epochs} epochs", xlabel="x", ylabel="y")

    epochs = torch.arange(1, config.epochs + 1)
    averaging = epochs * (config.steps // config.epochs) >= config.first_averaged_step
    ends = [curve[-1] for run in runs.values() for curve in run.curves.values()]
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        for average, curve in run.curves.items():
            shown = averaging if average == "uniform" else averaging | True
            panel.plot(epochs[shown], torch.tensor(curve)[shown], **styles[average])
        panel.set(title=name, xlabel="epoch", ylabel="test RMSE")
        panel.set_ylim(min(ends) - 0.05, max(ends) + 0.15)

    legend.axis("off")
    legend.legend(*fit.get_legend_handles_labels(), loc="center", frameon=False, labelspacing=1.2)
    batches = (
        "the full batch" if config.batch_size == SAMPLES else f"batches of {config.batch_size}"
    )
    figure.suptitle(f"Which average is which: a regression on {batches}")
    figure.savefig(config.figure, dpi=130)


def print_notebook(run: Run, data: Data) -> None:
    """Print the three numbers of the notebook beside its own."""
    with torch.no_grad():
        last, exponential = (run.networks[name](data.x_test) for name in ("last", "exponential"))
    numbers = {
        "difference, last - exponential average": (last - exponential).sum().item(),
        "RMSE, exponential average": run.curves["exponential"][-1],
        "RMSE, last iterate": run.curves["last"][-1],
    }
    print(f"{'The three numbers of the notebook':40} {'here':>11} {'notebook':>12}")
    for (text, here), there in zip(numbers.items(), NOTEBOOK, strict=True):
        print(f"{text:40} {here:11.7f} {there:12.7f}")
    print("The notebook calls its average Polyak-Ruppert: it is exponential.\n")


@command_line("regression", Config, __doc__)
def main(config: Config) -> int:
    """Train, print the tables, and draw the figure."""
    make_folder(config.figure.parent)
    torch.set_num_threads(config.threads)
    data, initial = sample(config.seed)
    runs = {name: train(config, data, initial, make) for name, make in optimizers(config).items()}

    if replace(config, figure=Config.figure, start=Config.start, threads=1) == Config():
        print_notebook(next(iter(runs.values())), data)
    start = config.first_averaged_step
    print(f"Test RMSE, batch size {config.batch_size}, {config.epochs} epochs")
    print(f"{'':20} {'last':>8} {'exponential':>12} {f'uniform from step {start}':>25}")
    for name, run in runs.items():
        ends = [run.curves[average][-1] for average in AVERAGES]
        print(f"{name:20} {ends[0]:8.4f} {ends[1]:12.4f} {ends[2]:25.4f}")
    print(
        "The loss cannot reach 0 here (the noise has variance 2): f_min 0 makes steps too long, and"
    )
    print("f_min 2 skips every batch whose loss is below 2, which biases what is learned.")
    draw(config, data, runs)
    print(f"Figure: {config.figure}\n")

    print("A separable classification that a small network can fit, nothing tuned")
    print(f"{'':20} seed  training error        loss  epochs")
    for name, make in {
        "PolyakSGD, defaults": lambda network: PolyakSGD(network.parameters()),
        "SGD, lr 1.0": lambda network: SGD(network.parameters(), lr=1.0),
    }.items():
        for seed in range(3):
            epochs, wrong, loss = classify(make, seed)
            print(f"{name:20} {seed:4} {wrong:15.1%} {loss:11.3g} {epochs:7}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
