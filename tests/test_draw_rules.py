"""The picture of what rules weigh."""

import pytest

from scripts import draw_rules
from scripts.draw_rules import UPDATES, draw


def test_each_rule_is_a_line_whose_density_has_the_mean_one():
    axes = draw(["uniform", "tail:0.5", "ema:half_life=100"]).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines) == ["uniform", "tail:0.5", "ema:half_life=100"]
    for density in lines.values():
        assert len(density) == UPDATES
        assert sum(density) / UPDATES == pytest.approx(1)
    assert set(lines["tail:0.5"]) == {0, 2}


def test_the_picture_is_written_into_a_new_folder(tmp_path, capsys):
    picture = tmp_path / "new" / "rules.png"
    assert draw_rules.main(["--rule", "uniform", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", ["--rule median", "--rule ema:half_life=-1", "--out a.xyz", "--out ."]
)
def test_what_cannot_be_drawn_is_one_sentence(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert draw_rules.main(options.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_its_help_names_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        draw_rules.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m scripts.draw_rules ")
