import json
import random
import re
import unicodedata

import pytest

from infimed.contracts import IGNORE_INDEX, DataFault, Message
from infimed.processing.chat import Rendered, count_tokens, measure_text, render, render_prompt, visualise
from infimed.processing.tokenizer import Tokenizer

THINK = "<think>\n\n</think>\n\n"
SYSTEM, USER, ASSISTANT = ("system", "user", "assistant")

# Name -> turns, tokens of each image, the rendering with what is learned between « and ».
GOLDEN = {
    "single turn": (
        [(USER, "Which plane is shown?"), (ASSISTANT, "axial")],
        [],
        f"<|im_start|>user\nWhich plane is shown?<|im_end|>\n<|im_start|>assistant\n{THINK}«axial<|im_end|>»\n",
    ),
    "multi-turn: every answer follows the think block and is learned": (
        [(USER, "Is it a CT?"), (ASSISTANT, "Yes."), (USER, "Which plane?"), (ASSISTANT, "axial")],
        [],
        f"<|im_start|>user\nIs it a CT?<|im_end|>\n<|im_start|>assistant\n{THINK}«Yes.<|im_end|>»\n"
        f"<|im_start|>user\nWhich plane?<|im_end|>\n<|im_start|>assistant\n{THINK}«axial<|im_end|>»\n",
    ),
    "system": (
        [(SYSTEM, "Answer briefly."), (USER, "Is it a CT?"), (ASSISTANT, "No.")],
        [],
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        f"<|im_start|>user\nIs it a CT?<|im_end|>\n<|im_start|>assistant\n{THINK}«No.<|im_end|>»\n",
    ),
    "two images": (
        [(USER, "<image>\nand <image>: same?"), (ASSISTANT, "no")],
        [3, 1],
        "<|im_start|>user\n<|image_start|><image><image><image><|image_end|>\nand <|image_start|><image><|image_end|>: same?<|im_end|>\n"
        f"<|im_start|>assistant\n{THINK}«no<|im_end|>»\n",
    ),
    "caption without question text": (
        [(USER, "<image>"), (ASSISTANT, "An axial CT slice.\nLung level.")],
        [2],
        "<|im_start|>user\n<|image_start|><image><image><|image_end|><|im_end|>\n"
        f"<|im_start|>assistant\n{THINK}«An axial CT slice.\nLung level.<|im_end|>»\n",
    ),
    "blank space around an answer is dropped, in a question it is kept": (
        [(USER, "\n Is it a CT? "), (ASSISTANT, " \n Yes. \n")],
        [],
        f"<|im_start|>user\n\n Is it a CT? <|im_end|>\n<|im_start|>assistant\n{THINK}«Yes.<|im_end|>»\n",
    ),
}


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [Message(role, text) for role, text in turns]


def _marked(rendered: Rendered, tokenizer: Tokenizer) -> str:
    """Write the rendering as text, with « and » around what is learned."""
    parts, was_learned = [], False
    for id, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (id, IGNORE_INDEX)
        if (label != IGNORE_INDEX) != was_learned:
            parts.append("»" if was_learned else "«")
            was_learned = not was_learned
        parts.append(tokenizer.decode([id], skip_special=False))
    return "".join(parts)


def _random_text(rng: random.Random) -> str:
    """Draw text that is hard on token borders: blanks of all kinds, combining marks, digits, scripts, half tokens."""
    atoms = [
        *"aZé1 7\n\r\t.,'<|>?",
        "\n\n",
        "  ",
        "\xa0",
        "\u3000",
        "\u0301",
        "\u200b",
        "中",
        "ل",
        "🫁",
        "'s",
        "<|im_",
        "age>",
        "CT ",
        "axial",
    ]
    return "".join(rng.choices(atoms, k=rng.randint(1, 12)))


def _random_turns(rng: random.Random) -> list[tuple[str, str]]:
    """Draw a conversation of one to three rounds; answers hold at least one letter."""
    turns = [(SYSTEM, _random_text(rng))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        turns += [(USER, _random_text(rng)), (ASSISTANT, f"{_random_text(rng)}A{_random_text(rng)}")]
    return turns


@pytest.mark.parametrize("name", GOLDEN)
def test_rendering_and_mask_are_golden(tiny, name):
    turns, visual_tokens, expected = GOLDEN[name]
    assert _marked(render(_messages(turns), tiny, visual_tokens=visual_tokens), tiny) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_the_first_label_is_never_learned(tiny, name):
    turns, visual_tokens, _ = GOLDEN[name]
    assert render(_messages(turns), tiny, visual_tokens=visual_tokens).labels[0] == IGNORE_INDEX


@pytest.mark.parametrize("name", GOLDEN)
def test_the_length_is_the_counted_tokens_and_the_visual_ones(tiny, name):
    turns, visual_tokens, _ = GOLDEN[name]
    rendered = render(_messages(turns), tiny, visual_tokens=visual_tokens)
    assert len(rendered.input_ids) == count_tokens(_messages(turns), tiny) + sum(visual_tokens)
    assert rendered.input_ids.count(tiny.image_id) == sum(visual_tokens)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("widen", [0, 1, 7])
def test_the_measured_places_are_where_the_images_run_whatever_their_tokens(tiny, name, widen):
    turns, visual_tokens, _ = GOLDEN[name]
    visual_tokens = [count * widen for count in visual_tokens]
    ids = render(_messages(turns), tiny, visual_tokens=visual_tokens).input_ids
    text = measure_text(_messages(turns), tiny)
    starts = [at + sum(visual_tokens[:number]) for number, at in enumerate(text.image_at)]
    assert [start - 1 for start in starts] == [place for place, id in enumerate(ids) if id == tiny.image_start_id]
    assert all(ids[start + count] == tiny.image_end_id for start, count in zip(starts, visual_tokens, strict=True))
    assert text.tokens == len(ids) - sum(visual_tokens)


def test_the_prompt_is_a_prefix_of_the_conversation_that_ends_where_learning_starts(tiny):
    rng = random.Random(0)
    for _ in range(300):
        messages = _messages(_random_turns(rng))
        prompt, rendered = render_prompt(messages[:-1], tiny, visual_tokens=[]), render(messages, tiny, visual_tokens=[])
        assert rendered.input_ids[: len(prompt)] == prompt, messages
        assert rendered.labels[len(prompt) :] == [*rendered.input_ids[len(prompt) : -1], IGNORE_INDEX], messages
        assert rendered.labels[len(prompt) - 1] == IGNORE_INDEX


def test_every_turn_of_a_conversation_is_asked_for_in_the_words_that_it_was_learned_in(tiny):
    rng = random.Random(1)
    for _ in range(100):
        messages = _messages(_random_turns(rng))
        whole = render(messages, tiny, visual_tokens=[]).input_ids
        for end, message in enumerate(messages):
            if message.role == ASSISTANT:
                prompt = render_prompt(messages[:end], tiny, visual_tokens=[])
                assert whole[: len(prompt)] == prompt, messages


def test_the_prompt_with_images_ends_with_the_empty_think_block(tiny):
    prompt = render_prompt([Message("user", "<image>Which plane?")], tiny, visual_tokens=[2])
    expected = f"<|im_start|>user\n<|image_start|><image><image><|image_end|>Which plane?<|im_end|>\n<|im_start|>assistant\n{THINK}"
    assert tiny.decode(prompt, skip_special=False) == expected


def test_the_pieces_are_the_tokens_of_the_whole_text(tiny):
    rng = random.Random(1)
    for _ in range(300):
        turns = _random_turns(rng)
        rendered = render(_messages(turns), tiny, visual_tokens=[])
        heads = ["<|im_start|>" + role + "\n" + (THINK if role == ASSISTANT else "") for role, _ in turns]
        bodies = [text.strip() if role == ASSISTANT else text for role, text in turns]
        whole = "".join(f"{head}{body}<|im_end|>\n" for head, body in zip(heads, bodies, strict=True))
        assert rendered.input_ids == tiny.encode_markup(whole), turns


@pytest.mark.parametrize(("text", "images"), [("no placeholder", 1), ("<image>", 0), ("<image> <image>", 3)])
def test_placeholders_and_images_that_disagree_are_a_fault_with_both_numbers(tiny, text, images):
    with pytest.raises(DataFault, match="image_mismatch") as caught:
        render([Message("user", text), Message("assistant", "a")], tiny, visual_tokens=[4] * images)
    assert f"{text.count('<image>')} <image>" in caught.value.detail
    assert f"{images} images" in caught.value.detail


@pytest.mark.parametrize(
    "turns",
    [
        [(USER, "hi<|im_end|>"), (ASSISTANT, "a")],
        [(USER, "q"), (ASSISTANT, "a <image>")],
        [(SYSTEM, "<image>"), (USER, "q"), (ASSISTANT, "a")],
    ],
)
def test_content_that_spells_markup_is_a_fault(tiny, turns):
    with pytest.raises(DataFault, match="reserved_token"):
        render(_messages(turns), tiny, visual_tokens=[])
    with pytest.raises(DataFault, match="reserved_token"):
        count_tokens(_messages(turns), tiny)


@pytest.mark.parametrize("roles", [[], [SYSTEM], [USER], [ASSISTANT], [USER, USER, ASSISTANT], [USER, SYSTEM, ASSISTANT], [USER, "tool"]])
def test_turns_out_of_order_are_a_fault(tiny, roles):
    with pytest.raises(DataFault, match="bad_turns"):
        render(_messages([(role, "text") for role in roles]), tiny, visual_tokens=[])


def test_a_prompt_that_ends_with_an_answer_is_a_fault(tiny):
    with pytest.raises(DataFault, match="bad_turns"):
        render_prompt(_messages([(USER, "q"), (ASSISTANT, "a")]), tiny, visual_tokens=[])


def test_an_empty_answer_is_a_fault(tiny):
    with pytest.raises(DataFault, match="empty_answer"):
        render(_messages([(USER, "q"), (ASSISTANT, " \n")]), tiny, visual_tokens=[])


def test_the_viewer_colours_learned_given_and_image_tokens(tiny):
    messages = _messages([(USER, "<image>What?"), (ASSISTANT, "é 🫁")])
    shown = visualise(render(messages, tiny, visual_tokens=[144]), tiny)
    assert "\x1b[32mé 🫁<|im_end|>\x1b[0m" in shown  # green, and never cut inside a character
    assert "\x1b[36m<image>x144\x1b[0m" in shown
    assert shown.startswith("\x1b[90m<|im_start|>user\n")


@pytest.fixture(scope="module")
def template(qwen3_folder):
    """Qwen3's own template, in the environment that transformers gives it."""
    jinja2 = pytest.importorskip("jinja2")
    source = json.loads((qwen3_folder / "tokenizer_config.json").read_text())["chat_template"]
    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def apply(turns: list[tuple[str, str]], *, prompt: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return compiled.render(messages=messages, add_generation_prompt=prompt, enable_thinking=False)

    return apply


@pytest.mark.parametrize("prompt", [False, True], ids=["conversation", "prompt"])
def test_rendering_equals_qwen3s_own_template_in_text_and_in_tokens(qwen3, template, prompt):
    rng = random.Random(2)
    for _ in range(150):
        turns = [(role, text.strip() if role == ASSISTANT else text) for role, text in _random_turns(rng)]
        if prompt:
            turns = turns[:-1]
            ids = render_prompt(_messages(turns), qwen3, visual_tokens=[])
        else:
            ids = render(_messages(turns), qwen3, visual_tokens=[]).input_ids
        # Earlier answers keep the block here, see the module's docstring; the last one and the prompt are the template's own.
        whole = re.sub(r"(<\|im_start\|>assistant\n)(?!<think>)", rf"\1{THINK}", template(turns, prompt=prompt))
        assert ids == qwen3.encode_markup(whole), turns
        assert qwen3.decode(ids, skip_special=False) == unicodedata.normalize("NFC", whole), turns


def test_images_stand_in_qwen3s_template_as_markup(qwen3, template):
    turns, visual_tokens, _ = GOLDEN["two images"]
    whole = template(turns, prompt=False)
    for count in visual_tokens:
        whole = whole.replace("<image>", f"<|image_start|>{'@' * count}<|image_end|>", 1)
    assert render(_messages(turns), qwen3, visual_tokens=visual_tokens).input_ids == qwen3.encode_markup(whole.replace("@", "<image>"))
