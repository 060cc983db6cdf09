"""Mixture: quotas are met exactly, shares are met throughout, and a position is a few counts."""

import json

import numpy as np
import pytest

from infimed.contracts import UserError
from infimed.data.catalogue import Table
from infimed.data.mixture import InOrder, Mixer, Mixing

ROWS = {"alpha": 100, "beta": 40, "gamma": 10}


def catalogue(rows: dict[str, int] = ROWS) -> Table:
    sources = [source for source, count in rows.items() for _ in range(count)]
    return Table([1] * len(sources), sources=sources)


def make_mixer(rows: dict[str, int] = ROWS, *, epochs: int | None = None, **mixing: object) -> Mixer:
    table = catalogue(rows)
    return Mixer(table, table.counts(), mixing=Mixing(**mixing), seed=5, epochs=epochs)


def drawn(mixer: Mixer, count: int, *, at_a_time: int = 64) -> np.ndarray:
    """Draw `count` samples, or all there are."""
    parts = [np.zeros(0, np.int64)]
    while count and len(part := mixer.draw(at_a_time)[:count]):
        mixer.take(part)
        parts.append(part)
        count -= len(part)
    return np.concatenate(parts)


def by_source(sources: np.ndarray) -> list[int]:
    return np.bincount(sources, minlength=len(ROWS)).tolist()


def test_an_epoch_shows_each_source_as_often_as_asked_and_makes_fractions_up_later():
    mixer = make_mixer(epochs=10, epochs_of={"alpha": 2, "beta": 0.3, "gamma": 0.25})
    epochs = [by_source(drawn(mixer, 212 + quota)) for quota in (2, 3) * 5]
    assert epochs == [[200, 12, quota] for quota in (2, 3) * 5]  # 12 at once, although 0.3 is a little less as a binary number
    assert not len(mixer.draw(10))
    assert mixer.taken.tolist() == [2000, 120, 25]


def test_a_source_of_weight_0_is_never_shown_and_star_stands_for_the_others():
    assert by_source(drawn(make_mixer(epochs=3, epochs_of={"*": 0, "gamma": 3}), 1000)) == [0, 0, 90]


def test_sources_are_spread_evenly_over_an_epoch_but_not_in_a_pattern():
    sources = drawn(make_mixer({"alpha": 3000, "beta": 1000}, epochs=1), 4000)
    shares = sources.reshape(40, 100).mean(axis=1)
    assert np.abs(shares - 0.25).max() <= 0.021  # at most the two jitters at the borders
    gaps = np.diff(np.flatnonzero(sources == 1))
    assert set(gaps.tolist()) >= {1, 2, 3, 4, 5, 6, 7}


def test_shares_are_met_from_the_start_without_end():
    mixer = make_mixer(shares={"alpha": 1, "beta": 2, "gamma": 5})
    counts = np.array([by_source(drawn(mixer, 80)) for _ in range(50)])
    assert np.abs(counts - [10, 20, 50]).max() <= 2
    assert mixer.endless
    assert mixer.asked() == {"alpha": 0.125, "beta": 0.25, "gamma": 0.625}


def test_with_epochs_shares_end_after_as_many_samples_as_there_are_rows():
    assert len(drawn(make_mixer(epochs=2, shares={"alpha": 1, "*": 1}), 1000)) == 300


def test_temperature_evens_sources_out():
    expected = {1: [100, 40, 10], 2: np.sqrt([100, 40, 10]), 1e9: [1, 1, 1]}
    for temperature, rows in expected.items():
        counts = np.array(by_source(drawn(make_mixer(temperature=temperature), 3000)))
        assert np.abs(counts / 3000 - rows / np.sum(rows)).max() < 0.001


def test_a_spent_source_leaves_its_share_to_the_others_in_proportion():
    mixer = make_mixer(shares={"alpha": 1, "beta": 2, "gamma": 5}, max_passes={"gamma": 2.5})
    assert by_source(drawn(mixer, 40)) == [5, 10, 25]
    assert np.abs(np.array(by_source(drawn(mixer, 300))) - [100, 200, 0]).max() <= 1
    assert mixer.asked() == {"alpha": 1 / 3, "beta": 2 / 3, "gamma": 0}


def test_when_all_are_spent_the_mixture_ends():
    mixer = make_mixer(shares={"*": 1}, max_passes=1.5)
    assert not mixer.endless
    assert by_source(drawn(mixer, 10_000)) == [150, 60, 15]
    assert by_source(drawn(make_mixer(max_passes=2), 10_000)) == [200, 80, 20]  # epochs without end, but twice each at most


def test_changed_shares_hold_from_that_sample_on():
    mixer = make_mixer(shares={"alpha": 1, "*": 0})
    assert by_source(drawn(mixer, 77)) == [77, 0, 0]
    mixer.change(np.array([0.0, 1.0, 1.0]))
    assert by_source(drawn(mixer, 100)) == [0, 50, 50]


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 4, "epochs_of": {"alpha": 1.3, "beta": 0.4}},
        {"shares": {"alpha": 0.7, "*": 0.1}, "max_passes": {"beta": 1}},
        {"temperature": 3.0, "epochs": 2},
    ],
)
def test_the_rest_follows_from_the_position_however_many_were_drawn_ahead(settings):
    whole = drawn(make_mixer(**settings), 300, at_a_time=1000)
    for stop in range(0, 300, 7):
        first, second = make_mixer(**settings), make_mixer(**settings)
        assert (drawn(first, stop, at_a_time=5) == whole[:stop]).all()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert (drawn(second, 300 - stop, at_a_time=50) == whole[stop:]).all()


def test_index_order_takes_the_sources_as_the_rows_have_them():
    table = Table([1] * 9, sources=list("abcabcaab"), shards=[0, 0, 0, 1, 1, 1, 3, 3, 3])
    mixer = InOrder(table, table.counts(), epochs=2)
    assert "".join("abc"[source] for source in drawn(mixer, 4)) == "abca"
    assert "".join("abc"[source] for source in drawn(mixer, 100)) == "bcaababcabcaab"


@pytest.mark.parametrize(
    ("mixing", "said"),
    [
        ({"epochs_of": {"alhpa": 1}}, "mixture.alhpa: no such source; did you mean alpha"),
        ({"epochs_of": {"alpha": -1}}, "mixture.alpha=-1: expected a number >= 0"),
        ({"epochs_of": {"*": float("nan")}}, ">= 0"),
        ({"epochs_of": {"alpha": "2"}}, ">= 0"),
        ({"epochs_of": {"*": 0}}, "mixture: every source has weight 0"),
        ({"shares": {"alpha": 1}}, "shares: no share for beta, gamma"),
        ({"shares": {"*": 0}}, "shares: every source has weight 0"),
        ({"shares": {"*": 1}, "temperature": 2.0}, "shares, temperature: expected one of them"),
        ({"shares": {"*": 1}, "epochs_of": {"alpha": 2}}, "mixture, shares: expected one of them"),
        ({"curriculum": [(0, {"*": 1})], "epochs_of": {"alpha": 2}}, "mixture, curriculum"),
        ({"temperature": 0}, "temperature=0: expected a number > 0"),
        ({"max_passes": -1}, "max_passes=-1: expected a number > 0"),
        ({"max_passes": {"delta": 1}}, "max_passes.delta: no such source"),
        ({"curriculum": [(5, {"*": 1}), (5, {"*": 2})]}, "curriculum: steps 5, 5"),
        ({"curriculum": [(5, {"alpha": 1})]}, "curriculum.5: no share for beta, gamma"),
    ],
)
def test_a_wrong_mixture_is_named(mixing, said):
    with pytest.raises(UserError, match=said):
        make_mixer(**mixing)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as raised:
        make_mixer(epochs_of={"delta": 1, "alpha": -1}, temperature=-1)
    assert len(str(raised.value).splitlines()) == 4


def test_a_mixture_of_which_a_later_phase_runs_dry_is_not_endless():
    mixing = {"shares": {"*": 1}, "max_passes": {"easy": 1}}
    assert make_mixer({"easy": 9, "hard": 9}, **mixing).endless
    assert not make_mixer({"easy": 9, "hard": 9}, **mixing, curriculum=[(5, {"easy": 1, "hard": 0})]).endless


def test_a_weight_far_below_a_sample_an_epoch_is_no_long_search():
    mixer = make_mixer({"easy": 10}, epochs_of={"*": 1e-9})
    mixer.draw(1)
    assert mixer.epoch == 10**8 - 1  # the first that shows a sample: 10 rows times 1e-9 times so many epochs is 1


def test_what_yaml_makes_of_a_name_is_named_too():
    with pytest.raises(UserError, match=r"shares.1: no such source"):
        make_mixer(shares={1: 1, "*": 1})
    with pytest.raises(UserError, match="max_passes=abc: expected a number > 0"):
        make_mixer(max_passes="abc")
