"""The pipeline and RewardScorer: every input form, the training's tokens, explicit limits."""

import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from grm_hf import PreferenceCollator, RewardScorer, tokenize_preferences


PAIR = {"prompt": "Name number 3.", "chosen": " It is 3.", "rejected": " No idea"}
CHAT = [{"role": "user", "content": "Name number 3."}, {"role": "assistant", "content": "It is 3."}]


@pytest.fixture
def grm(make_grm):
    return make_grm().eval()


@pytest.fixture
def scorer(grm, tokenizer):
    return pipeline("reward-modeling", model=grm, tokenizer=tokenizer)


def test_pair_has_the_rewards_of_training(scorer, grm, tokenizer):
    rows = tokenize_preferences(Dataset.from_list([PAIR]), tokenizer)
    batch = PreferenceCollator(tokenizer)(list(rows))
    with torch.no_grad():
        rewards = grm(**batch).logits[0].tolist()
    output = scorer(PAIR)
    assert output["scores"] == pytest.approx(rewards, abs=1e-5)
    assert output["margin"] == pytest.approx(rewards[0] - rewards[1], abs=1e-5)
    assert output["preferred"] == rewards.index(max(rewards))


def test_every_form_of_the_same_text_has_the_same_score(scorer):
    single = scorer("Name number 3. It is 3.")
    assert set(single) == {"score"}
    assert scorer({"prompt": "Name number 3.", "response": " It is 3."}) == single
    assert scorer(PAIR)["scores"][0] == single["score"]
    assert scorer({"prompt": PAIR["prompt"], "responses": [PAIR["chosen"]]})["scores"] == [single["score"]]
    chat = scorer(CHAT)
    assert scorer({"prompt": CHAT[:1], "response": CHAT[1:]}) == chat
    assert scorer({"prompt": CHAT[:1], "response": "It is 3."}) == chat
    assert chat != single


@pytest.mark.parametrize("batch_size", [1, 3])
def test_list_gives_the_outputs_of_its_items(scorer, batch_size):
    inputs = [PAIR, "Name number", {"prompt": CHAT[:1], "responses": ["It is 3.", "No", "Please please"]}]
    outputs = scorer(inputs, batch_size=batch_size)
    for output, item in zip(outputs, inputs):
        alone = scorer(item)
        assert output.keys() == alone.keys()
        for name, value in alone.items():
            assert output[name] == pytest.approx(value, abs=1e-5)


def test_list_of_chats_gives_one_score_each(scorer):
    assert scorer([CHAT, [CHAT[0], {"role": "assistant", "content": "No."}]])[0] == scorer(CHAT)


def test_margin_is_against_the_best_of_the_others(scorer):
    output = scorer({"prompt": "Name", "responses": [" a", " b", " c"]})
    assert output["margin"] == output["scores"][0] - max(output["scores"][1:])
    assert output["preferred"] == max(range(3), key=output["scores"].__getitem__)


@pytest.mark.parametrize("call", ["pipeline", "scorer"])
def test_overlong_input_is_refused_unless_asked(call, scorer, grm, tokenizer):
    score = scorer if call == "pipeline" else RewardScorer(grm, tokenizer)
    item = {"prompt": "Name " * 300, "response": " it"}
    with pytest.raises(ValueError, match="more than max_length=256: pass overlong='truncate_prompt'"):
        score([item])
    assert score([item], overlong="truncate_prompt")
    assert score([{"prompt": "Name number", "response": " it"}], max_length=8, overlong="truncate_prompt")
    with pytest.raises(ValueError, match="the response alone is too long"):
        score([{"prompt": "Name", "response": " it" * 300}], overlong="truncate_prompt")
    with pytest.raises(ValueError, match="`overlong` must be 'error' or 'truncate_prompt', got 'cut'"):
        score(["Name"], overlong="cut")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "Name"}, "The pipeline takes a string, .* got"),
        ({"prompt": "Name", "chosen": "it"}, r"got a dictionary with \['chosen', 'prompt'\]"),
        ({"prompt": "Name", "responses": []}, "`responses` is empty"),
        (3, "The pipeline takes a string"),
        ([{"role": "robot", "content": "Name"}], "unknown role 'robot'"),
    ],
)
def test_unusable_input_is_refused(item, message, scorer):
    with pytest.raises(ValueError, match=message):
        scorer(item)


def test_unknown_option_is_refused(scorer):
    with pytest.raises(TypeError, match=r"Unknown options \['truncation'\]"):
        scorer("Name", truncation=True)


def test_stock_text_classification_gives_the_raw_reward(grm, tokenizer):
    with torch.no_grad():
        reward = grm(**tokenizer("Name number", return_tensors="pt")).logits.item()
    stock = pipeline("text-classification", model=grm, tokenizer=tokenizer)("Name number")
    assert stock[0]["score"] == pytest.approx(reward, abs=1e-6)


def test_scorer_agrees_with_the_pipeline_in_the_order_of_its_inputs(scorer, grm, tokenizer):
    inputs = [PAIR, "Name", CHAT, {"prompt": "Name " * 9, "responses": [" it", " no " * 20, " idea"]}, "It is " * 30]
    outputs = RewardScorer(grm, tokenizer)(inputs, batch_size=3)
    for output, item in zip(outputs, inputs):
        for name, value in scorer(item).items():
            assert output[name] == pytest.approx(value, abs=1e-5)


def test_scorer_names_the_input_that_it_refuses(grm, tokenizer):
    with pytest.raises(ValueError, match="Input 1: "):
        RewardScorer(grm, tokenizer)(["Name", {"prompt": "Name"}])


def test_scorer_of_nothing_is_empty(grm, tokenizer):
    assert RewardScorer(grm, tokenizer)([]) == []


def test_scorer_never_runs_the_language_model_head(grm, tokenizer):
    grm.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    RewardScorer(grm, tokenizer)([PAIR])
