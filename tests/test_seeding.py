import pytest
import torch

from agents.seeding import Purpose, Streams

CALLS = [("uniform", (2, 1))] * 70 + [("normal", (3, 6))] * 5 + [("normal", (3,))] * 130


def streams():
    return Streams(Purpose.EXPLORATION, [3, 8])


def test_what_is_made_ahead_is_what_single_calls_give():
    ahead, single = streams(), streams()
    for call in CALLS:
        assert torch.equal(ahead.next(*call), single.draw(*call))


@pytest.mark.parametrize("made", [1, 64, 73, 100])
def test_a_stream_is_saved_where_it_was_used_however_much_was_made_ahead(made):
    ahead, single, loaded = streams(), streams(), streams()
    for call in CALLS[:made]:
        ahead.next(*call)
        single.draw(*call)
    ours, theirs = ahead.state_dict(), single.state_dict()
    assert all(map(torch.equal, ours["generators"], theirs["generators"]))
    loaded.next("uniform", (2, 1))
    loaded.load_state_dict(ours)
    for call in CALLS[made:]:
        number = single.draw(*call)
        assert torch.equal(loaded.next(*call), number)
        assert torch.equal(ahead.next(*call), number)


def test_other_draws_follow_on_what_was_used():
    ahead, single = streams(), streams()
    for one in (ahead.next, single.draw):
        one("normal", (3,))
    assert torch.equal(ahead.below(9, 2, 4), single.below(9, 2, 4))
    for one in (ahead.next, single.draw):
        one("normal", (3,))
    assert torch.equal(ahead.draw("uniform", (2,)), single.draw("uniform", (2,)))


@pytest.mark.cuda
def test_on_a_device_no_number_is_drawn_twice():
    mixed, loaded = (Streams(Purpose.REPLAY, [3, 8], "cuda") for _ in range(2))
    mixed.next("uniform", (2,))
    mixed.below(9, 1, 2)
    loaded.load_state_dict(mixed.state_dict())
    assert torch.equal(mixed.next("uniform", (2,)), loaded.next("uniform", (2,)))


def test_what_was_interrupted_gives_no_number_of_another_law(monkeypatch):
    ahead, single = streams(), streams()
    for one in (ahead.next, single.draw):
        one("uniform", (2,))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.next("normal", (2,))
    for _ in range(3):
        assert torch.equal(ahead.next("normal", (2,)), single.draw("normal", (2,)))
