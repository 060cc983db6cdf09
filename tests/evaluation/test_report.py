import json

import pytest

from infimed.contracts import UserError
from infimed.evaluation.report import format_terminal, summarise, to_json, to_markdown
from infimed.evaluation.runner import Prediction


def predictions(right, *, status="letter", n=60):
    return [
        Prediction(
            key=f"k{i}",
            id=f"q{i}",
            groups={"task": "plane" if i < n // 2 else "si|de", "domain": "in", "modality": "MR", "answer_type": "choice"},
            gold="A",
            response="A",
            status=status,
            extracted="A",
            correct=bool(right(i)),
            rule="r",
            cluster=f"c{i // 2}",
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def table():
    model = predictions(lambda i: i < 30 or i % 2)  # all of plane, half of side
    blind = predictions(lambda i: i < 6)
    majority = predictions(lambda i: i % 2 if i >= 30 else i % 3 == 0)  # the same half of side
    return summarise(model, list(reversed(blind)), majority, draws=300)


def test_a_family_counts_as_learned_only_where_it_beats_the_better_baseline(table):
    rows = {r.group: r for r in table.rows}
    plane, side = rows["in / plane"], rows["in / si|de"]
    assert (plane.n, plane.clusters, plane.accuracy.mean, plane.majority, plane.learned) == (30, 15, 1.0, 1 / 3, "yes")
    assert (side.accuracy.mean, side.majority, side.gain.mean, side.learned) == (0.5, 0.5, 0.0, "no")
    assert plane.baseline == side.baseline == "majority"
    assert plane.accuracy.method == "wilson"
    assert rows["all"].n == 60
    assert [r.grouping for r in table.rows] == ["overall", "domain x task", "domain x task", "modality", "answer type"]


def test_the_blind_score_is_the_baseline_where_it_is_the_better_one():
    row = summarise(predictions(lambda i: 1), predictions(lambda i: 1), predictions(lambda i: 0)).rows[0]
    assert (row.baseline, row.gain.mean, row.learned) == ("blind", 0.0, "no")


def test_a_gain_smaller_than_its_interval_is_not_learning():
    row = summarise(predictions(lambda i: i < 32), predictions(lambda i: 0), predictions(lambda i: i >= 30)).rows[0]
    assert row.gain.mean > 0 > row.gain.low
    assert row.learned == "no"


def test_one_cluster_learns_nothing_for_certain_and_unread_responses_are_counted():
    model = predictions(lambda i: 1, n=2)
    wrong = predictions(lambda i: 0, status="malformed", n=2)
    row = summarise(model, wrong, wrong).rows[0]
    assert (row.gain.low, row.learned) == (None, "undefined")
    table = summarise(wrong, wrong, wrong)
    assert table.rows[0].unparsed == 1.0
    assert "[one cluster]" in format_terminal(table)


def test_all_three_formats_hold_every_row_and_are_the_same_every_time(table):
    parsed = json.loads(to_json(table))
    assert [r["group"] for r in parsed["rows"]] == [r.group for r in table.rows]
    markdown, text = to_markdown(table), format_terminal(table)
    assert "| in / plane | 30 | 15 | 100.0 [79.6, 100.0]w | 33.3 | 20.0 |" in markdown
    assert "in / si\\|de" in markdown
    assert sum(line.startswith("| in") for line in markdown.splitlines()) == 2
    lines = [line for line in text.splitlines() if line.startswith(("group", "all", "in /", "MR", "choice"))]
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    assert (to_json(table), markdown, text) == (to_json(table), to_markdown(table), format_terminal(table))


def test_baselines_of_other_questions_are_refused(table):
    model = predictions(lambda i: 1)
    with pytest.raises(UserError, match=r"blind: 59 predictions.*expected the same questions"):
        summarise(model, model[1:], model)
    with pytest.raises(UserError, match="majority"):
        summarise(model, model, [*model[1:], model[1]])
