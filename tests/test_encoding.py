"""One encoding for training and scoring: exact completion masks, one BOS, an EOS where text lacks it."""

import pytest
from tiny import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grm_hf.modeling.encoding_grm import Encoded, encode, truncate_prompt


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def response_of(tokenizer, encoded):
    return tokenizer.decode([i for i, is_response in zip(*encoded) if is_response])


def prompt_of(tokenizer, encoded):
    return tokenizer.decode([i for i, is_response in zip(*encoded) if not is_response])


def test_conversation_has_the_tokens_of_the_chat_template(tokenizer):
    messages = [user("Name number 3."), assistant("It is 3.")]
    (encoded,) = encode(tokenizer, [(messages[:1], messages[1:])])
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert response_of(tokenizer, encoded) == "It is 3.<|im_end|>\n"
    assert prompt_of(tokenizer, encoded).endswith("<|im_start|>assistant\n")


def test_completion_mask_covers_every_assistant_turn_and_no_user_turn(tokenizer):
    response = [assistant("It is 3."), user("Very clearly?"), assistant("Clearly.")]
    (encoded,) = encode(tokenizer, [([user("Name number 3.")], response)])
    assert response_of(tokenizer, encoded) == "It is 3.<|im_end|>\nClearly.<|im_end|>\n"
    assert "Very clearly?" in prompt_of(tokenizer, encoded)


def test_turn_that_the_template_renders_otherwise_where_it_is_last_keeps_its_mask():
    tokenizer = make_tokenizer()
    # As Qwen3's template: an empty chain of thought in the last turn alone.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message['content'] | trim }}",
    )
    response = [assistant("It is 3. "), user("Very clearly?"), assistant("It is 3.")]
    (encoded,) = encode(tokenizer, [([user("Name number 3.")], response)])
    assert response_of(tokenizer, encoded) == "It is 3.<|im_end|>\n<think></think>It is 3.<|im_end|>\n"


@pytest.mark.parametrize("response", ["ok 😀", "日本", "😀"])
def test_mask_holds_every_token_of_a_character_of_several_bytes(response, tokenizer):
    (encoded,) = encode(tokenizer, [("Name: ", response)])
    prompt = tokenizer("Name: ")["input_ids"]
    tokens = tokenizer("Name: " + response)["input_ids"]
    assert len(tokens) > len(prompt) + len(response)
    assert sum(encoded.completion_mask) == len(tokens) + 1 - len(prompt)


def test_text_gets_one_bos_and_one_eos(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [("Name", " it"), ("<|endoftext|>Name", " it"), ("Name", " it<|im_end|>")]
    encoded = encode(tokenizer, texts)
    assert encoded[0] == encoded[1] == encoded[2]
    assert encoded[0].input_ids.count(bos) == encoded[0].input_ids.count(eos) == 1
    assert (encoded[0].input_ids[0], encoded[0].input_ids[-1]) == (bos, eos)
    assert response_of(tokenizer, encoded[0]) == " it<|im_end|>"


def test_tokens_of_a_pair_do_not_depend_on_what_is_encoded_beside_it(tokenizer):
    pairs = [("Name", " it"), ([user("Name")], [assistant("it")]), ("", "Name it")]
    assert encode(tokenizer, pairs) == [encode(tokenizer, [pair])[0] for pair in pairs]
    assert encode(tokenizer, pairs)[0].input_ids == encode(tokenizer, pairs)[2].input_ids


@pytest.mark.parametrize("has_offsets", [True, False])
def test_token_merged_across_the_boundary_belongs_to_the_response(has_offsets, monkeypatch):
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "[EOS]": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: has_offsets))
    (encoded,) = encode(tokenizer, [("ab", "ca")])
    assert encoded == Encoded([0, 3, 0, 4], [0, 1, 1, 1])
    monkeypatch.undo()


@pytest.mark.parametrize("has_offsets", [True, False])
def test_tokenizer_without_offsets_gives_the_same_mask(has_offsets, tokenizer, monkeypatch):
    pairs = [("Name number 3.", " It is"), ([user("Name")], [assistant("It is"), user("No"), assistant("Idea")])]
    expected = encode(tokenizer, pairs)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: has_offsets))
    assert encode(tokenizer, pairs) == expected


def test_whitespace_that_the_tokenizer_drops_moves_no_boundary():
    vocabulary = {"one": 0, "two": 1, "three": 2, "[EOS]": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]")
    (encoded,) = encode(tokenizer, [("one two ", "   three  ")])
    assert encoded == Encoded([0, 1, 2, 3], [0, 0, 1, 1])


def test_generation_prompt_that_the_finished_turn_does_not_repeat_is_no_part_of_the_response(tokenizer):
    other = make_tokenizer()
    other.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    (encoded,) = encode(other, [([user("Name")], [assistant("It is")])])
    assert response_of(other, encoded) == "It is<|im_end|>\n"


def test_truncation_keeps_the_bos_and_the_whole_response(tokenizer):
    (encoded,) = encode(tokenizer, [("Name number " * 9, " It is")])
    shorter = truncate_prompt(encoded, 9, tokenizer.bos_token_id)
    assert len(shorter.input_ids) == 9
    assert shorter.input_ids[0] == tokenizer.bos_token_id
    assert response_of(tokenizer, shorter) == response_of(tokenizer, encoded)
    assert encoded.input_ids[-8:] == shorter.input_ids[-8:]


def test_truncation_never_cuts_a_response(tokenizer):
    (encoded,) = encode(tokenizer, [("Name", " It is clearly number 3." * 3)])
    assert truncate_prompt(encoded, sum(encoded.completion_mask), tokenizer.bos_token_id) is None
    assert truncate_prompt(encoded, len(encoded.input_ids), tokenizer.bos_token_id) is encoded


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("Name", [assistant("It")]), "must both be text or both be lists of messages"),
        (([user("Name")], [{"role": "robot", "content": "It"}]), "unknown role 'robot'"),
        (([user("Name")], [assistant(None)]), "content must be text, got None"),
    ],
)
def test_unusable_pair_is_refused(pair, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [pair])


def test_messages_need_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"set `tokenizer.chat_template`"):
        encode(tokenizer, [([user("Name")], [assistant("It")])])


def test_refusal_of_a_chat_template_is_reported():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode(tokenizer, [([user("Name")], [assistant("It")])])
