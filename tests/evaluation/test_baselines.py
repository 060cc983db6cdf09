from infimed.contracts import EvalItem, Message
from infimed.evaluation.baselines import MajorityAnswer


def item(question, gold, answer_type="yes_no", choices=()):
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", choices, strict=False))
    prompt = (Message("user", f"<image>{question}{options}"),)
    return EvalItem("id", prompt, (), gold, answer_type, choices)


def test_a_known_question_gets_its_own_majority_and_an_unknown_one_that_of_its_type():
    train = [item("Is it axial?", g) for g in ("Yes", "yes", "No")] + [item("Is it coronal?", "No")] * 4
    assert MajorityAnswer(train)([item("is it  axial", "no"), item("Is it sagittal?", "yes")]) == ["yes", "no"]


def test_a_choice_gets_the_offered_option_that_was_right_most_often_wherever_it_stands():
    train = [item("Which plane?", gold, "choice", ("axial", "coronal", "sagittal")) for gold in ("B", "B", "C", "C", "C", "A")]
    majority = MajorityAnswer(train)
    asked = [("axial", "coronal"), ("sagittal", "coronal"), ("coronal", "axial", "sagittal")]
    assert majority([item("Which plane?", "A", "choice", choices) for choices in asked]) == ["B", "A", "C"]


def test_the_options_are_no_part_of_the_question_so_that_both_orders_count_together():
    train = [item("Which plane?", "B", "choice", ("coronal", "axial"))] * 2 + [item("Which plane?", "A", "choice", ("axial", "coronal"))]
    train += [item("Where from?", "coronal", "choice", ("axial", "coronal"))] * 9
    assert MajorityAnswer(train)([item("Which plane?", "A", "choice", ("coronal", "axial"))]) == ["B"]


def test_ties_go_to_the_first_and_an_unseen_type_to_the_empty_answer():
    majority = MajorityAnswer([item("Is it?", "no"), item("Is it?", "yes")])
    assert majority([item("Is it?", "yes"), item("What is it?", "bone", "open")]) == ["no", ""]
    assert majority([item("Which?", "A", "choice", ("x", "y"))]) == ["A"]
