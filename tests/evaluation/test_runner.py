import json

import pytest

from infimed.contracts import DataFault, EvalItem, Message
from infimed.evaluation import scoring
from infimed.evaluation.runner import evaluate, read_predictions


class Plain:
    name = "plain"

    def __init__(self, n, gold="yes"):
        self._items = [
            EvalItem(f"q{i}", (Message("user", f"Is it {i}?"),), (b"%d" % (i // 2),), gold, "yes_no", (), {"task": "t"}, f"c{i // 2}")
            for i in range(n)
        ]

    def items(self):
        return iter(self._items)

    def score(self, item, response):
        return scoring.score(item, response)


class Answers:
    """Say yes to even questions and no to odd ones; die at a question when told to."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, items):
        if self.dies_at in [i.id for i in items]:
            raise KeyboardInterrupt
        self.asked += [i.id for i in items]
        return ["Yes." if int(i.id[1:]) % 2 == 0 else "nö \ud800 \u2028 no" for i in items]


def run(out, *, task=None, answers=None, name="m"):
    return evaluate(task or Plain(10), answers or Answers(), out=out, name=name, progress=False, chunk=4)


def test_predictions_are_returned_and_written_in_the_tasks_order(tmp_path):
    predictions = run(tmp_path)
    assert [p.id for p in predictions] == [f"q{i}" for i in range(10)]
    assert [p.correct for p in predictions] == [True, False] * 5
    assert read_predictions(tmp_path / "predictions.jsonl") == predictions
    assert json.loads((tmp_path / "predictions.jsonl").read_bytes().split(b"\n")[0])["groups"] == {"task": "t"}


@pytest.mark.parametrize("torn", [0, 1, 60, 400])
def test_a_killed_and_resumed_run_equals_a_straight_run_byte_for_byte(tmp_path, torn):
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", answers=Answers(dies_at="q9"))
    file = tmp_path / "killed" / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) - torn])  # the kill came in the middle of a write
    resumed = Answers()
    run(tmp_path / "killed", answers=resumed)
    assert file.read_bytes() == (tmp_path / "straight" / "predictions.jsonl").read_bytes()
    assert resumed.asked == [f"q{i}" for i in range(8 if torn == 0 else 4, 10)]
    assert [p.name for p in file.parent.iterdir()] == ["predictions.jsonl"]


def test_a_run_killed_twice_leaves_whole_lines_each_once(tmp_path):
    file = tmp_path / "predictions.jsonl"
    for death in ("q5", "q9"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, answers=Answers(dies_at=death))
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
    assert [p.id for p in read_predictions(file)] == [f"q{i}" for i in range(7)]
    assert whole.count(b"\n") == 8


def test_a_finished_run_asks_nothing_again(tmp_path):
    first, again = run(tmp_path), Answers()
    assert run(tmp_path, answers=again) == first
    assert again.asked == []


def test_another_answerer_or_changed_question_is_asked_anew_and_old_lines_are_set_aside(tmp_path):
    run(tmp_path)
    renamed, changed = Answers(), Answers()
    assert len(run(tmp_path, answers=renamed, name="other")) == len(renamed.asked) == 10
    assert not any(p.correct for p in run(tmp_path, task=Plain(4, gold="no"), answers=changed)[::2])
    assert len(read_predictions(tmp_path / "predictions.jsonl")) == len(changed.asked) == 4
    assert len(read_predictions(tmp_path / "stale.jsonl")) == 20


def test_a_damaged_line_in_the_middle_is_asked_again_and_the_order_restored(tmp_path):
    run(tmp_path)
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    run(tmp_path)
    assert file.read_bytes() == whole


def test_a_question_that_comes_twice_is_refused_rather_than_counted_twice(tmp_path):
    task = Plain(3)
    task._items.append(task._items[0])
    with pytest.raises(DataFault, match=r"duplicate_item.*q0"):
        run(tmp_path, task=task)


def test_an_answerer_that_returns_too_few_responses_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        run(tmp_path, answers=lambda items: ["yes"])
