import pytest

from infimed.evaluation.parsing import normalise_text, parse, strip_labels

ORGANS = ("Liver", "Left kidney", "Kidney", "Hepatitis B")


@pytest.mark.parametrize(
    ("response", "value"),
    [
        *[(form, "B") for form in ("B", "b", " B\n", "(B)", "B.", "B)", "B:", "**B**", "$B$", "Ｂ", "Ⓑ", "Option B.", "B) Left kidney")],
        *[(form, "B") for form in ("(B) left kidney", "B Left kidney", "b. left kidney.", "**B. Left kidney**", "B\n\nIt lies low.")],
        *[(form, "B") for form in ("Answer: B", "**Answer:** (B)", "The answer is (B)", "final answer B", "I choose B.", "答案：B", "选B")],
        *[(form, "B") for form in (r"\boxed{B}", r"so \boxed{\text{B}}.", r"\boxed{B", "<answer>B</answer>", "<ANSWER> B")],
        *[(form, "B") for form in ("It is low, so B", '{"answer": "B"}', "(A) is wrong and (B) is right", "B, not A", "B is correct")],
        ("The answer is B because A, C and D are wrong.", "B"),
        ("The answer is A? No, the answer is B", "B"),
        ("<think>A? Or C.</think>B", "B"),
        ("A, perhaps.</think> B", "B"),
        ("A. seen: no\nB. seen: yes\n\nB", "B"),
        ("Left kidney", "B"),
        ("left-kidney.", "B"),
        ("This shows the left kidney.", "B"),
        ("a kidney", "C"),
        ("It is not the liver; it is the kidney.", "C"),
        ("the kidney rather than the liver", "C"),
        ("The patient has hepatitis B.", "D"),
    ],
)
def test_a_response_that_commits_to_one_option_is_read_as_that_option(response, value):
    assert parse(response, "choice", ORGANS).value == value


@pytest.mark.parametrize(
    ("response", "status"),
    [
        *[(text, "malformed") for text in ("A or B", "A, B", "A/B", "AB", "A) or B)", "Either B or C", "A\nC", "A.\nB.\nC.\nD.")],
        *[
            (text, "malformed")
            for text in ("B. Liver", "the liver and the left kidney", "E", "vitamin D", "kidneys", "The answer is not B")
        ],
        *[(text, "malformed") for text in (r"\boxed{}", r"\boxed{ } B", "A normal film.", "I see nothing", "No liver is seen")],
        *[(text, "empty") for text in ("", " \n", "...", "😀", "<think>B", "<think>The answer is B</think>", "_")],
        *[(text, "abstain") for text in ("I don't know.", "Cannot be determined.", "None of the above", "Answer: unknown")],
    ],
)
def test_a_response_that_commits_to_no_single_option_is_never_guessed(response, status):
    read = parse(response, "choice", ORGANS)
    assert (read.status, read.value) == (status, "")


@pytest.mark.parametrize(
    ("response", "value"),
    [
        *[(text, "yes") for text in ("yes", "YES.", "Yes, there is no doubt.", "Present", "true", "Y", "是", "Ｙｅｓ", "My answer is yes")],
        *[(text, "no") for text in ("no", "No, it is present", "There is no effusion.", "absent", "Nope", r"\boxed{No}", "no\n\nClear.")],
        *[(text, "no") for text in ("<think>yes</think>no", "Answer: No, it is axial", "否", "Unclear at first, but the answer is no")],
        *[(text, "") for text in ("yes and no", "yes/no", "Yes\nNo", "yes, no", "nodule", "normal", "abnormal", "noted", "unknown")],
        *[(text, "") for text in ("", "not visible", "the answer is not yes", "noyes", "<think>yes")],
    ],
)
def test_yes_and_no_are_read_as_whole_words_and_normal_is_neither(response, value):
    assert parse(response, "yes_no").value == value


def test_an_open_answer_is_taken_from_its_slot_and_doubt_is_an_abstention():
    assert parse("It lies low.\nAnswer: the spleen", "open").value == "the spleen"
    assert parse(r"\boxed{\text{spleen}}", "open").value == "spleen"
    assert parse("I cannot tell.", "open").status == "abstain"
    assert parse("Answer: a long caption.", "caption").value == "Answer: a long caption."


def test_options_that_differ_by_sign_only_are_told_apart_when_spelt_out():
    assert parse("-1", "choice", ("+1", "-1")).value == "B"


def test_normalised_text_ignores_case_articles_and_punctuation_but_not_decimal_points():
    assert normalise_text("The  Left-Kidney!") == "left kidney"
    assert normalise_text("4.5 mm.") == "4.5 mm" != normalise_text("45 mm")
    assert normalise_text("a") == "a"


def test_labels_are_removed_only_where_every_option_has_its_own():
    assert strip_labels(("A. x", "(B) y", "C:z")) == ["x", "y", "z"]
    assert strip_labels(("A. x", "y")) == ["A. x", "y"]


@pytest.mark.parametrize("filler", ["!", " ", "B ", "answer ", "<answer>", "<think>", "{", "\n", "A. ", "no ", "the answer is "])
@pytest.mark.parametrize("answer_type", ["choice", "yes_no", "open", "caption"])
def test_a_100_kb_answer_of_any_make_is_read_before_the_time_limit(filler, answer_type):
    start, end = ("yes", "no") if answer_type == "yes_no" else ("B", "C")
    for tail in ("", "<answer>", r"\boxed{" + filler * 10_000):
        assert parse(f"{start}{filler * (100_000 // len(filler))}{tail}x {end}", answer_type, ORGANS).status
