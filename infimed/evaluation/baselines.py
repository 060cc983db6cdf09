"""What can be scored without looking: the majority answer, learned from training questions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from infimed.contracts import IMAGE_PLACEHOLDER, EvalItem
from infimed.evaluation.parsing import LETTERS, normalise_text, strip_labels
from infimed.evaluation.scoring import gold_value


class MajorityAnswer:
    """The best constant-per-question blind predictor from the training set; an answerer like any other.

    A question is known by its answer type and its normalised text without placeholders and options. A known question gets its most frequent
    training answer, an unknown one the most frequent of its answer type, and a type that was never seen the empty answer. A choice
    question gets, among the options that it offers, the one that was right most often: for this question first, for all choices where
    that leaves a tie, and the first option where both do.
    """

    def __init__(self, train: Iterable[EvalItem]) -> None:
        """Count the gold answers of `train`."""
        self._question: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self._type: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for item in train:
            answer = _gold_text(item)
            self._question[_key(item)][answer] += 1
            self._type[item.answer_type][answer] += 1

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of everything that was counted."""
        counted = sorted((*key, answer, count) for key, answers in self._question.items() for answer, count in answers.items())
        return hashlib.sha256(repr(counted).encode()).hexdigest()[:12]

    def __call__(self, items: Sequence[EvalItem]) -> list[str]:
        """Return the constant answer to each question."""
        return [self._answer(item) for item in items]

    def _answer(self, item: EvalItem) -> str:
        asked, any_asked = self._question.get(_key(item), Counter()), self._type.get(item.answer_type, Counter())
        if item.answer_type == "choice":
            texts = [normalise_text(text) for text in strip_labels(item.choices)]
            best = max(range(len(texts)), key=lambda i: (asked[texts[i]], any_asked[texts[i]], -i))
            return LETTERS[best]
        return next((answer for answer, _ in (asked or any_asked).most_common(1)), "")


def _key(item: EvalItem) -> tuple[str, str]:
    """Name the question: its answer type and the last user turn without placeholders and options."""
    text = next((m.text for m in reversed(item.prompt) if m.role == "user"), "").replace(IMAGE_PLACEHOLDER, " ")
    if item.answer_type == "choice":
        for letter, option in zip(LETTERS, strip_labels(item.choices), strict=False):
            text = re.sub(rf"\(?\b{letter}\s*[.):]\s*{re.escape(option)}", " ", text)
    return item.answer_type, normalise_text(text)


def _gold_text(item: EvalItem) -> str:
    """Return the gold answer in a form that is the same wherever the options stand."""
    value = gold_value(item)
    return normalise_text(strip_labels(item.choices)[LETTERS.index(value)]) if item.answer_type == "choice" else value
