"""Turn a response into a verdict: strict, one rule a question type, nothing credited that was not said.

Open answers count when they equal the gold answer after normalisation (case, articles, punctuation); a right answer in other words scores
zero, so open accuracy is a lower bound. Captions are judged the same way, which almost any wording fails: a check that a memorised form
came out, never a headline.
"""

from __future__ import annotations

from infimed.contracts import DataFault, EvalItem, Verdict
from infimed.evaluation.parsing import LETTERS, normalise_text, parse, strip_labels

VERSION = "strict-1"
"""Part of every prediction's key: raise it when a rule changes, so that old verdicts are not kept."""


def gold_value(item: EvalItem) -> str:
    """Return the gold answer as the parser would read it: a letter, `yes` or `no`, or normalised text.

    Raises:
        DataFault: the gold answer is none of the answers that the question allows.
    """
    if item.answer_type not in ("choice", "yes_no"):
        return normalise_text(item.gold)
    texts = strip_labels(item.choices)
    if item.answer_type == "choice" and texts.count(item.gold) == 1:
        return LETTERS[texts.index(item.gold)]
    read = parse(item.gold, item.answer_type, item.choices)
    if not read.value:
        raise DataFault(
            "gold_not_offered", f"{item.id}: {item.gold!r} is no answer to a {item.answer_type} question, choices {item.choices}"
        )
    return read.value


def score(item: EvalItem, response: str) -> Verdict:
    """Judge one response; only a faulty gold answer raises (DataFault), never an ugly response."""
    gold, read = gold_value(item), parse(response, item.answer_type, item.choices)
    value = read.value if item.answer_type in ("choice", "yes_no") else normalise_text(read.value)
    return Verdict(read.status, read.value, bool(value) and value == gold, f"{item.answer_type}/{read.rule}")
