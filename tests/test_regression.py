"""The notebook's numbers, where averaging matters, and the classifier that needs no tuning."""

import math
from dataclasses import replace

import pytest
import torch
from torch.optim import SGD

from polyak_rl.optim import PolyakSGD
from scripts import regression
from scripts.regression import Config, classify, optimizers, sample, train


@pytest.fixture(autouse=True)
def one_thread():
    """The last digits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_notebooks_three_numbers_come_out():
    config = Config()
    data, initial = sample(config.seed)
    run = train(config, data, initial, lambda network: SGD(network.parameters(), config.lr))
    with torch.no_grad():
        last, exponential = (run.networks[name](data.x_test) for name in ("last", "exponential"))
    # A sum of 100 differences: its last digits differ between processors, by 0.005 from the
    # notebook's own.
    assert (last - exponential).sum().item() == pytest.approx(-18.6776, rel=1e-3)
    assert run.curves["exponential"][-1] == pytest.approx(1.3458426, abs=1e-3)
    assert run.curves["last"][-1] == pytest.approx(1.3584771, abs=1e-3)


def test_the_averages_are_what_their_names_say():
    config = Config(epochs=6, decay=0.5, start=0.5)
    data, initial = sample(config.seed)
    iterates = []

    class Recorded(SGD):
        def step(self):
            super().step()
            iterates.append(self.param_groups[0]["params"][0].detach().double().clone())

    run = train(config, data, initial, lambda network: Recorded(network.parameters(), config.lr))
    exponential = next(initial.parameters()).detach().double()
    for x in iterates:
        exponential = 0.5 * exponential + 0.5 * x
    first = {name: next(network.parameters()).double() for name, network in run.networks.items()}
    torch.testing.assert_close(first["last"], iterates[-1])
    torch.testing.assert_close(first["exponential"], exponential, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["uniform"], sum(iterates[3:]) / 3, rtol=1e-5, atol=1e-6)


def test_asgd_averages_from_the_same_step():
    config = Config(epochs=6, start=0.5)
    optimizer = optimizers(config)["ASGD, lr 0.1"](sample(config.seed)[1])
    assert optimizer.param_groups[0]["t0"] + 2 == config.first_averaged_step == 4


def test_uniform_averaging_matters_where_the_gradient_is_noisy():
    config = Config(batch_size=10, epochs=40)
    data, initial = sample(config.seed)
    run = train(config, data, initial, optimizers(config)["SGD, lr 0.1"])
    late = {name: sum(curve[-10:]) / 10 for name, curve in run.curves.items()}
    assert late["uniform"] < late["last"] - 0.03
    spread = {name: max(curve[-10:]) - min(curve[-10:]) for name, curve in run.curves.items()}
    assert spread["uniform"] < 0.3 * spread["last"]


@pytest.mark.parametrize("seed", range(3))
def test_polyak_steps_fit_a_separable_set_untuned_and_sgd_at_1_diverges(seed):
    _, error, loss = classify(lambda network: PolyakSGD(network.parameters()), seed)
    assert error == 0
    assert math.isfinite(loss)
    epochs, error, loss = classify(lambda network: SGD(network.parameters(), lr=1.0), seed)
    assert epochs == 50
    assert error > 0.1
    assert not loss < 1


def test_the_script_prints_the_comparison_and_draws_it(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    options = ["--figure", str(figure), "--epochs", "3", "--batch-size", "200"]
    assert regression.main(options) == 0
    printed = capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "notebook" not in printed  # these are not its settings
    for text in ("exponential", "uniform from step 8", "ASGD, lr 0.1", "PolyakSGD, f_min 0"):
        assert text in printed
    assert "PolyakSGD, defaults     0            0.0%" in printed
    assert "SGD, lr 1.0             0          100.0%         nan" in printed


def test_the_notebooks_numbers_are_printed_for_its_settings(capsys):
    config = replace(Config(), epochs=1)
    data, initial = sample(config.seed)
    run = train(config, data, initial, optimizers(config)["SGD, lr 0.1"])
    regression.print_notebook(run, data)
    assert "-18.6724586" in capsys.readouterr().out


def test_an_unwritable_folder_is_one_sentence_before_any_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert regression.main(["--figure", str(tmp_path / "file" / "figure.png")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_its_help_names_the_command_and_a_wrong_option_is_refused(capsys):
    with pytest.raises(SystemExit, match="0"):
        regression.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m scripts.regression ")
    with pytest.raises(SystemExit, match="2"):
        regression.main(["--lr", "nan"])
    assert "lr must be positive and finite, got nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size must be in 1 ... 1000, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"start": -0.1}, r"start must be in \[0, 1\), got -0.1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_nonsense_settings_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Config(**option)
