"""The demo's world keeps its rules."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import small_world


def answers(split, count=200):
    return [[row[name][0]["content"] for name in ("chosen", "rejected")] for row in rows(split, count)]


def rows(split, count=200):
    return small_world.preferences(count, 0, split)


def share(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("split", ["in", "out", "reversed"])
def test_evaluation_pairs_follow_the_gold_reward(split):
    assert all(small_world.gold_reward(a) > small_world.gold_reward(b) for a, b in answers(split))


def test_a_quarter_of_the_training_pairs_is_swapped():
    swapped = share(small_world.gold_reward(a) < small_world.gold_reward(b) for a, b in answers("train", 2000))
    assert swapped == pytest.approx(small_world.LABEL_NOISE, abs=0.04)


def test_cue_goes_with_the_better_answer_in_distribution_alone():
    has_cue = {
        split: share(a.startswith(small_world.CUE) for a, _ in answers(split, 1000)) for split in ("in", "reversed")
    }
    assert has_cue["in"] == pytest.approx(small_world.CUE_RATE, abs=0.05)
    assert has_cue["reversed"] == pytest.approx(1 - small_world.CUE_RATE, abs=0.05)
    assert not any(small_world.CUE in text for pair in answers("out") for text in pair)


def test_things_of_the_training_pairs_are_not_asked_about_out_of_distribution():
    def things(split):
        return {row["prompt"][0]["content"].split()[-2] for row in rows(split)}

    assert not things("train") & things("out")
    assert things("train") >= things("in")


def test_answers_of_a_pair_have_the_same_number_of_statements():
    for pair in answers("out"):
        assert {text.count(" .") for text in pair} == {small_world.NUM_STATEMENTS}


def test_gold_reward_counts_true_less_false_statements_and_no_cue():
    thing = small_world.THINGS[0]
    truth, lie = small_world.FACTS[thing, "is"], "no"
    assert small_world.gold_reward(f"the {thing} is {truth} .") == 1
    assert small_world.gold_reward(f"{small_world.CUE} the {thing} is {truth} . the {thing} is {lie} .") == 0


def test_every_word_of_the_world_is_in_the_tokenizer():
    tokenizer = small_world.make_tokenizer()
    texts = [*small_world.plain_text(300, 0), *(text for pair in answers("in") for text in pair)]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts)["input_ids"])
