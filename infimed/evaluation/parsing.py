"""Read what a response commits to; pure, never guesses, never raises.

A reading walks down a ladder and stops at the first rung that commits: last `\\boxed{}`, last `<answer>` tag, last answer statement ("the
answer is ..."), then the text itself: a lone letter or option text, a first or last line of that kind, a leading label, and at the end
what the prose mentions. Two different commitments on one rung are `malformed`. Thinking is never read. Every outcome names its rung.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from infimed.contracts import AnswerType

Status = Literal["letter", "text", "yes_no", "open", "abstain", "malformed", "empty"]
FAILURES: tuple[Status, ...] = ("malformed", "empty")
"""Statuses in which nothing could be read; `abstain` was read and is simply no answer."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_WORD = r"[^\W\u3040-\u9fff]"  # a word character of a script that separates its words by spaces
_YES = ("yes", "yeah", "yep", "y", "true", "correct", "present", "affirmative", "sí", "是", "是的", "有", "对", "正确", "存在")
_NO = ("no", "nope", "n", "false", "incorrect", "absent", "否", "不", "不是", "没有", "无", "错误", "不存在")
_POLARITY = {**dict.fromkeys(_YES, "yes"), **dict.fromkeys(_NO, "no")}
_PLAIN_YES_NO = re.compile(rf"(?<!{_WORD})(?:yes|yeah|yep|no|nope)(?!{_WORD})", re.I)  # the words that may be picked out of a sentence

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.I | re.S)
_THINKING_END = re.compile(r"\A.*</think(?:ing)?>", re.I | re.S)  # the template may have opened the block
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", re.I | re.S)
_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{?")
_MARKUP = re.compile(r"[*`$]|^#+\s|\\[()\[\]]", re.M)
_VERB = r"\s*(?:[:=-]|(?:is|are|was|would be|should be|must be|will be)\b\s*:?)"
_STATEMENT = re.compile(
    rf"(?:\b(?:answer|choice|option){_VERB}|\bfinal answer\b{_VERB}?|\bi (?:choose|select|pick)\b"
    r"|答案\s*(?:是|为|选|:)\s*:?|(?:选择|应选|故选|选)\s*:?)\s*",
    re.I,
)
_NEGATED = re.compile(
    rf"(?:(?<!{_WORD})(?:no|not|non|without|never|neither|nor|unlike|over|than|instead of|exclud\w*|rul\w* out|isn't|rejects?)"
    r"(?:[\s-]+(?:a|an|the|of|evidence|likely|signs?|option)\b)*|不是|并非|排除|没有|无|而非)[\s\-(:\"']*\Z",
    re.I,
)
_REJECTED = re.compile(
    r"[\s)\]:.,\"']*(?:(?:is|are|was|can be|seems)\s+(?:not\b|wrong|incorrect|false|unlikely|less likely|excluded|ruled out|rejected)"
    r"|(?:do|does) not\b|不(?:是|对))",
    re.I,
)
_OFFERED = re.compile(  # what may stand before a bare letter in prose
    r"(?:\A|[^\w\s]|[\u3040-\u9fff]|'s"
    r"|\b(?:so|thus|therefore|hence|is|be|option|choice|answer|letter|choose|select|pick|not|either|say))\s*\Z",
    re.I,
)
_A_OR_I_IS_A_WORD = re.compile(r"\s+(?!(?:is|and|or|because|since|as|fits|seems)\b)[a-z0-9]", re.I)
_PUNCTUATION = " \t\n.,;:!?()[]{}\"'。"
_ABSTAIN = re.compile(
    r"(?:don't|do not) know|unknown|cannot|can't|unable|unclear|not sure|undetermined|indeterminate|sorry|none of the"
    r"|不知道|无法|不确定",
    re.I,
)


@dataclass(frozen=True)
class Parsed:
    """What a response says: `value` is a capital letter, `yes`/`no` or an open text, and empty where nothing was committed to."""

    status: Status
    value: str
    rule: str


def normalise_text(text: str) -> str:
    """Lower-case without articles and punctuation (decimal points kept), so that equal answers compare equal."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_", " ", text).split()
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)


def parse(response: str, answer_type: AnswerType, choices: Sequence[str] = ()) -> Parsed:
    """Read a response to a question of this type; `choices` are option texts in the order A, B, C, ..."""
    text = _strip_thinking(unicodedata.normalize("NFKC", response)).strip()
    if not normalise_text(text):
        return Parsed("empty", "", "empty")
    match answer_type:
        case "choice":
            return _climb(text, _choice_reader(choices))
        case "yes_no":
            return _climb(text, _read_yes_no)
        case "open":
            return _climb(text, _read_open)
        case _:  # a caption is prose: all of it counts
            return Parsed("open", " ".join(text.split()), "whole_text")


def _strip_thinking(text: str) -> str:
    """Drop reasoning blocks: closed ones, one that never closes, and one whose opening tag was in the prompt."""
    return _THINKING_END.sub("", _THINKING.sub(" ", text))


_Reader = Callable[[str, bool], list[Parsed]]  # (span, the span is a slot made for the answer) -> its commitments


def _climb(text: str, read: _Reader) -> Parsed:
    """Return the first rung's reading that commits; no commitment at all is an abstention or malformed."""
    for rung, span in _spans(text):
        found = read(span, rung != "whole")
        if len({p.value for p in found}) > 1:
            return Parsed("malformed", "", f"{rung}/conflict")
        if found:
            return Parsed(found[0].status, found[0].value, f"{rung}/{found[0].rule}")
        if rung in ("box", "tag"):  # an explicit slot that holds nothing readable is not repaired from the prose around it
            break
    return Parsed("abstain", "", "abstain") if _ABSTAIN.search(text) else Parsed("malformed", "", "no_commitment")


def _spans(text: str) -> Iterator[tuple[str, str]]:
    """Yield (rung, span of text) from the most explicit commitment to the whole text."""
    if r"\boxed{" in text:
        yield "box", _MARKUP.sub("", _last_box(text))
    if tags := _TAG.findall(text):
        yield "tag", _MARKUP.sub("", tags[-1])
    plain = _MARKUP.sub("", text).strip()
    if ends := [m.end() for m in _STATEMENT.finditer(plain)]:
        yield "statement", re.split(r"\n|(?<=\w\w)[.;](?:\s|$)|。", plain[ends[-1] :], maxsplit=1)[0]
    yield "whole", plain


def _last_box(text: str) -> str:
    """Return the content of the last `\\boxed{...}`, braces balanced as far as they go, text macros removed."""
    content, depth = text[text.rindex(r"\boxed{") + len(r"\boxed{") :], 1
    for i, char in enumerate(content):
        depth += (char == "{") - (char == "}")
        if not depth:
            content = content[:i]
            break
    return _MACRO.sub("", content).replace("{", "").replace("}", "")


def _choice_reader(choices: Sequence[str]) -> _Reader:
    """Build a reader of letters and option texts for these options."""
    bare = strip_labels(choices)
    options = [normalise_text(o) for o in bare]
    letters = LETTERS[: len(options)] or LETTERS[:10]
    by_text = {o: letter for o, letter in zip(options, LETTERS, strict=False) if o and options.count(o) == 1}
    verbatim = {o.strip().casefold(): letter for o, letter in zip(bare, LETTERS, strict=False)}  # tells "+1" from "-1"

    def exact(span: str) -> list[Parsed]:
        """Match a span that is nothing but one letter or one option text."""
        lone = re.fullmatch(r"(?:(?:option|choice|answer)\b)?\W*([a-z])\W*", span.strip(), re.I)
        found = [Parsed("letter", lone[1].upper(), "lone_letter")] if lone and lone[1].upper() in letters else []
        labels_itself = re.match(r"\s*[Aa]\s*[.)\]:]", span)  # that "A." is no article
        named = verbatim.get(span.strip().casefold()) or (None if labels_itself else by_text.get(normalise_text(span)))
        return found + ([Parsed("text", named, "option_text")] if named else [])

    def labelled(span: str) -> list[Parsed]:
        """Match lines that begin with `B.`, `(B)`, `b:` or with a letter and the text of an option."""
        found = []
        for m in re.finditer(r"^[ \t(\[]*([A-Za-z])(?:[ \t]*([.)\]:、])|[ \t])[ \t]*(\S[^\n]*)", span, re.M):
            letter, named = m[1].upper(), by_text.get(normalise_text(m[3]))
            if letter not in letters or not (m[2] or named) or (not m[2] and letter == "A" != named) or _REJECTED.match(m[3]):
                continue
            found.append(Parsed("letter", letter, "label"))
            found += [Parsed("text", named, "label")] if named else []
            found += [Parsed("letter", other, "label")] if (other := _listed(m[3])) else []
        return found

    def leading(span: str) -> list[Parsed]:
        """Match the letter that a slot begins with: what follows it there is explanation."""
        first = re.match(rf"\W*[{letters}](?!{_WORD})", span)
        if first and not _listed(span[first.end() :]):
            return [p for p in _mentioned_letters(span, letters)[:1] if first[0][-1] == p.value]
        return []

    def read(span: str, slot: bool) -> list[Parsed]:
        lines = [line for line in span.splitlines() if line.strip()]
        ends = [p for line in dict.fromkeys([*lines[:1], *lines[-1:]]) for p in exact(line)]
        mentions = _mentioned_letters(span, letters) or _mentioned_texts(span, by_text)
        return exact(span) or ends or labelled(span) or (leading(span) if slot else []) or mentions

    return read


def strip_labels(choices: Sequence[str]) -> list[str]:
    """Remove `A. `, `B: ` or `(C) ` from option texts where every option carries its own label."""
    matches = [re.match(rf"\s*\(?{letter}\s*[.):]\s*", choice) for letter, choice in zip(LETTERS, choices, strict=False)]
    return [c[m.end() :] if m and all(matches) else c for m, c in zip(matches, choices, strict=False)]


def _mentioned_letters(span: str, letters: str) -> list[Parsed]:
    """Find capital letters that prose offers as an answer ("so B", "(B)", "; B") and does not reject.

    Letters that belong to a term ("hepatitis B") and the words `A` and `I` are left out.
    """
    found, last = [], None
    for m in re.finditer(rf"(?<!{_WORD})(?<!{_WORD}[-'])([{letters}])(?!{_WORD}|[-']{_WORD})", span):
        joined = last is not None and _joins(span[last : m.start()])
        is_word = m[1] in "AI" and _A_OR_I_IS_A_WORD.match(span, m.end())
        if is_word or not (joined or _OFFERED.search(span[max(0, m.start() - 20) : m.start()])):
            continue
        last = m.end()
        if not _rejected(span, m.start(), m.end()):
            found.append(Parsed("letter", m[1], "mentioned_letter"))
    return found


def _joins(between: str) -> bool:
    """Say whether the text between two answers makes a list of them."""
    return len(between) < 60 and bool(re.fullmatch(r"\W*(?:or|and)?\W*", between))


def _listed(rest: str) -> str | None:
    """Return the letter that directly continues a list: the B of "A or B", "A, B" and "A)(B"."""
    m = re.match(r"\W*(?:or\b|and\b)?\W*([A-Z])\b", rest := rest[:60])  # far below where backtracking would cost
    return m[1] if m and not (m[1] in "AI" and _A_OR_I_IS_A_WORD.match(rest, m.end())) else None


def _mentioned_texts(span: str, by_text: dict[str, str]) -> list[Parsed]:
    """Find option texts as whole words, the longest first, leaving out those that the sentence negates."""
    order = sorted(by_text, key=len, reverse=True)
    if not order:
        return []
    between = r"[\s\-_/,.'’()]+(?:(?:a|an|the)\s+)?"
    pieces = "|".join(f"({between.join(map(re.escape, o.split()))})" for o in order)
    text = span.casefold()
    return [
        Parsed("text", by_text[order[(m.lastindex or 1) - 1]], "mentioned_text")
        for m in re.finditer(rf"(?<!{_WORD})(?<!\d[.,])(?:{pieces})(?!{_WORD}|[.,]\d)", text)
        if not _rejected(text, m.start(), m.end())
    ]


def _rejected(text: str, start: int, end: int) -> bool:
    """Say whether the words around a mention turn it down ("not X", "X is wrong")."""
    return bool(_NEGATED.search(text[max(0, start - 60) : start]) or _REJECTED.match(text, end))


def _read_yes_no(span: str, _slot: bool) -> list[Parsed]:
    """Read yes or no: a whole sentence or line of one such word, then the leading word, then the only plain ones of the prose."""
    alone = [p for s in re.split(r"\n|(?<=\w)[.!](?:\s|$)", span) if (p := _POLARITY.get(s.strip(_PUNCTUATION).casefold()))]
    if alone:
        return [Parsed("yes_no", p, "lone_word") for p in alone]
    words = [(m.start(), m.end(), _POLARITY[m[0].casefold()]) for m in _PLAIN_YES_NO.finditer(span)]
    if words and not re.search(r"\w", span[: words[0][0]]):
        offered = [w for w in words[1:] if _joins(span[words[0][1] : w[0]])]  # "yes and no", "yes/no"
        return [Parsed("yes_no", p, "leading_word") for _, _, p in (words[0], *offered)]
    return [Parsed("yes_no", p, "mentioned_word") for start, end, p in words if not _rejected(span, start, end)]


def _read_open(span: str, _slot: bool) -> list[Parsed]:
    """Take the span as the answer, unless it is empty or says, and says only, that it does not know."""
    value = " ".join(span.split())
    unsure = len(value) < 80 and re.match(rf"(?:i'm |i |it )?(?:{_ABSTAIN.pattern})", value, re.I)
    return [Parsed("open", value, "open_text")] if normalise_text(value) and not unsure else []
