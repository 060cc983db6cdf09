import io

import numpy as np
import pytest
from PIL import Image

from infimed.contracts import DataFault, Message, Sample
from infimed.data.shards import write_shards
from infimed.evaluation.baselines import MajorityAnswer
from infimed.evaluation.runner import evaluate
from infimed.evaluation.tasks.shard_vqa import GROUPS, ShardVQA, asked_in, to_item
from infimed.processing.tokenizer import Tokenizer, train_tokenizer


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key, gold="yes", *, patient="p", images=1, turns=()):
    question = Message("user", "<image>" * images + "Is it axial?")
    names = tuple(f"{i}.png" for i in range(images))
    return Sample(
        key, (*turns, question, Message("assistant", gold)), names, task="plane", modality="MR", patient=patient, answer_type="yes_no"
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    tokenizer = Tokenizer(train_tokenizer(["yes no axial"], vocab_size=300), fingerprint="test")
    rows = [(sample(f"s{i}", "yes" if i % 3 else "no"), [png(i // 2)]) for i in range(9)]
    write_shards([*rows, *((sample(f"text{i}", images=0), []) for i in range(2))], out, tokenizer=tokenizer, max_samples=4)
    return out


def test_every_sample_is_asked_for_its_last_answer_with_its_groups(shards):
    task = ShardVQA([shards])
    items = list(task.items())
    assert len(task) == len(items) == 11
    assert [i.id for i in items] == [*(f"s{i}" for i in range(9)), "text0", "text1"]
    assert [m.role for m in items[0].prompt] == ["user"]
    assert (items[0].gold, items[0].images) == ("no", (png(0),))
    assert tuple(items[0].groups) == GROUPS
    assert items[0].groups["modality"] == "MR"


def test_questions_on_one_image_share_a_cluster_and_text_questions_share_none(shards):
    clusters = [i.cluster for i in ShardVQA([shards]).items()]
    assert clusters[0] == clusters[1] != clusters[2]
    assert len(set(clusters)) == 7
    assert {i.cluster for i in ShardVQA([shards], cluster_by="patient").items()} == {"p"}


def test_unknown_patients_are_never_lumped_together():
    clusters = {to_item(sample("k", patient="unknown"), [png(v)], cluster_by="patient").cluster for v in (1, 2)}
    assert len(clusters) == 2


def test_earlier_turns_stay_in_the_prompt_and_a_sample_without_an_answer_is_a_fault():
    turns = (Message("user", "Hello"), Message("assistant", "Hello."))
    assert [m.text for m in to_item(sample("k", turns=turns), [png(1)]).prompt] == ["Hello", "Hello.", "<image>Is it axial?"]
    with pytest.raises(DataFault, match="no_gold"):
        to_item(Sample("k", (Message("user", "Is it?"),)), [])


def test_a_limit_spreads_over_the_rows(shards):
    assert [i.id for i in ShardVQA([shards], limit=3).items()] == ["s0", "s3", "s7"]
    assert len(ShardVQA([shards], limit=99)) == 11


def test_the_majority_answer_scores_its_share_and_the_oracle_everything(shards, tmp_path):
    task = ShardVQA([shards])
    majority = evaluate(task, MajorityAnswer(task.items()), out=tmp_path / "majority", name="majority", progress=False)
    assert sum(p.correct for p in majority) == 8
    oracle = evaluate(task, lambda items: [i.gold for i in items], out=tmp_path / "oracle", name="oracle", progress=False)
    assert all(p.correct for p in oracle)


def test_every_turn_of_a_conversation_is_a_question_that_a_blind_predictor_learns_from(tmp_path):
    turns = (Message("user", "<image>\nWhich plane?\nA. axial\nB. coronal\nAnswer with the letter."), Message("assistant", "B"))
    tokenizer = Tokenizer(train_tokenizer(["yes no axial"], vocab_size=300), fingerprint="test")
    question = Message("user", "Is it axial?")
    one = Sample("s", (*turns, question, Message("assistant", "No")), ("0.png",), answer_type="yes_no")
    write_shards([(one, [png(1)])], tmp_path, tokenizer=tokenizer)
    first, second = asked_in([tmp_path])
    assert (first.answer_type, first.choices, first.gold) == ("choice", ("axial", "coronal"), "B")
    assert (second.answer_type, second.choices, second.gold) == ("yes_no", (), "No")
    asked = Message("user", "<image>\nWhich plane?\nA. coronal\nB. sagittal\nAnswer with the letter.")
    item = to_item(
        Sample("t", (asked, Message("assistant", "B")), ("0.png",), answer_type="choice", choices=("coronal", "sagittal")), [png(1)]
    )
    assert MajorityAnswer([first, second])([item]) == ["A"]
