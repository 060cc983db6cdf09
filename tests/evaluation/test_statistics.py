import numpy as np
import pytest

from infimed.evaluation.statistics import bootstrap_mean, paired_difference


def simulate(seed, clusters=60):
    """Draw right and wrong answers that share a difficulty within each cluster; their true mean is 2/3."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, clusters)
    cluster = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(cluster)) < rng.beta(2, 1, clusters)[cluster]).astype(float), cluster.tolist()


def test_the_95_percent_interval_covers_the_truth_in_93_to_97_percent_of_clustered_simulations():
    intervals = [bootstrap_mean(*simulate(seed), draws=400, seed=seed) for seed in range(1500)]
    assert 0.93 <= np.mean([i.low <= 2 / 3 <= i.high for i in intervals]) <= 0.97


def test_ignoring_the_clusters_would_cover_too_little():
    samples = [simulate(seed) for seed in range(300)]
    intervals = [bootstrap_mean(values, range(len(values)), draws=400) for values, _ in samples]
    assert np.mean([i.low <= 2 / 3 <= i.high for i in intervals]) < 0.9


def test_the_paired_interval_of_no_difference_covers_zero_and_is_narrow_where_answers_agree():
    a, clusters = simulate(0, 400)
    b = a.copy()
    b[:5] = 1 - b[:5]
    interval, alone = paired_difference(a, b, clusters), bootstrap_mean(a, clusters)
    assert interval.mean == pytest.approx(np.mean(a - b))
    assert interval.low <= 0 <= interval.high
    assert interval.high - interval.low < 0.5 * (alone.high - alone.low)


def test_equal_seeds_give_equal_intervals_and_another_seed_another_one():
    values, clusters = simulate(1)
    assert bootstrap_mean(values, clusters) == bootstrap_mean(values, clusters)
    assert bootstrap_mean(values, clusters) != bootstrap_mean(values, clusters, seed=1)


def test_no_values_have_no_interval_and_one_cluster_has_no_limits():
    assert bootstrap_mean([], []) is None
    one = bootstrap_mean([1, 0, 1, 1], ["p"] * 4)
    assert (one.mean, one.low, one.high, one.clusters, one.method) == (0.75, None, None, 1, "undefined")


def test_unanimous_clusters_get_the_wilson_interval_over_clusters_instead_of_certainty():
    right = bootstrap_mean([1.0] * 40, [i // 4 for i in range(40)])
    assert (right.method, right.mean, right.high) == ("wilson", 1.0, 1.0)
    assert right.low == pytest.approx(0.7225, abs=1e-4)  # 10 of 10, the tabulated value; not that of 40 of 40
    wrong = bootstrap_mean([0.0] * 10, range(10))
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(0.2775, abs=1e-4))
    half = bootstrap_mean([1.0, 0.0] * 10, [i // 2 for i in range(20)])  # every cluster at one half
    assert half.method == "wilson"
    assert half.low < 0.5 < half.high


def test_a_unanimous_gain_over_a_handful_of_clusters_is_not_called_significant():
    assert paired_difference([1.0] * 3, [0.0] * 3, range(3)).low < 0
    assert paired_difference([1.0] * 30, [0.0] * 30, range(30)).low > 0.7


def test_values_and_clusters_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 values but 2 clusters"):
        bootstrap_mean([1, 0, 1], ["a", "b"])
