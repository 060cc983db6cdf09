import pytest

from infimed.contracts import DataFault, EvalItem
from infimed.evaluation.scoring import gold_value, score


def item(gold, answer_type, choices=()):
    return EvalItem(id=gold, prompt=(), images=(), gold=gold, answer_type=answer_type, choices=choices)


PLANES = ("axial", "coronal", "sagittal")
ITEMS = (
    *(item(gold, "yes_no") for gold in ("Yes", "no", "No.")),
    *(item(gold, "choice", PLANES) for gold in ("A", "B", "C. sagittal", "coronal")),
    *(item(gold, "open") for gold in ("left kidney", "MR")),
    item("An axial MR of the head.", "caption"),
)


def credited(answer):
    return [score(i, answer(i)).correct for i in ITEMS]


def test_constant_models_get_the_scores_that_are_known_by_counting():
    assert sum(credited(lambda i: "yes")) == 1
    assert sum(credited(lambda i: "no")) == 2
    assert sum(credited(lambda i: "A")) == 1
    assert sum(credited(lambda i: "B")) == 2
    assert sum(credited(lambda i: "")) == 0
    assert sum(credited(lambda i: "I'm sorry, I cannot help with that.")) == 0


def test_the_gold_oracle_and_the_option_text_oracle_get_everything():
    assert all(credited(lambda i: i.gold))
    assert all(credited(lambda i: f"<think>Or not? No.</think>{i.gold}"))
    assert all(credited(lambda i: f"It shows the {PLANES['ABC'.index(gold_value(i))]} plane." if i.choices else i.gold))


def test_open_answers_and_captions_are_credited_for_the_same_words_only():
    assert score(item("left kidney", "open"), "The left kidney.").correct
    assert not score(item("left kidney", "open"), "kidney").correct
    assert not score(item("An axial slice.", "caption"), "An axial slice of the head.").correct


def test_a_verdict_names_what_was_read_and_by_which_rule():
    verdict = score(item("A", "choice", PLANES), "The answer is (B).")
    assert (verdict.status, verdict.extracted, verdict.correct, verdict.rule) == ("letter", "B", False, "choice/statement/lone_letter")


def test_a_gold_answer_that_the_question_does_not_offer_is_a_fault_of_the_data():
    with pytest.raises(DataFault, match=r"gold_not_offered.*oblique"):
        score(item("oblique", "choice", PLANES), "A")
    with pytest.raises(DataFault, match="gold_not_offered"):
        score(item("perhaps", "yes_no"), "yes")
