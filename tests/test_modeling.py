"""GRMForRewardModeling: the loss against the reference, its inputs and errors, precision of the head, and how it loads."""

import json
import shutil

import pytest
import torch
from independent_grm import IndependentGRM, assert_gradients_close
from tiny import make_base, make_config, make_rows, pad_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grm_hf import GRMConfig, GRMForRewardModeling, GRMOutput, PreferenceCollator


# Regularization, number of responses.
LOSSES = [
    ("sft", 2),
    ("nll", 2),
    ("dpo", 2),
    ("dpo_reference_free", 2),
    ("none", 2),
    ("sft", 4),
    ("nll", 4),
    ("none", 4),
]
EXTRAS = {"label_smoothing": 0.1, "center_rewards_coefficient": 0.05}
LABELS = [1, 0, 1]
MARGINS = [0.5, 2.0, 0.0]


@pytest.fixture
def batch():
    return pad_rows(make_rows())


@pytest.fixture
def untied_folder(tmp_path):
    make_base("llama-untied").save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def make_ref_logps(rows):
    return torch.tensor([[-50.0 - 3 * index, -47.5] for index in range(len(rows))])


def distinct(rewards):
    return len(rewards.flatten().unique())


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# The loss


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("kind", "num_responses"), LOSSES)
def test_loss_and_gradients_equal_the_reference(kind, num_responses, reduction, with_extras, make_grm):
    extras = EXTRAS if with_extras else {}
    model = make_grm(
        regularization=kind, regularization_weight=0.3, logps_reduction=reduction, beta=0.2, head_dropout=0.0, **extras
    )
    rows = make_rows(3, num_responses)
    labels = LABELS if num_responses == 2 else [3, 0, 2]
    batch = {**pad_rows(rows, "mixed", 2), "labels": torch.tensor(labels)}
    options = {"regularization": kind, "weight": 0.3, "beta": 0.2, "logps_reduction": reduction, **extras}
    if with_extras:
        batch["margin"], options["margins"] = torch.tensor(MARGINS), MARGINS
    if kind == "dpo":
        batch["ref_logps"] = make_ref_logps(rows)
        options["ref_logps"] = batch["ref_logps"].tolist()
    expected = IndependentGRM(model).loss_and_gradients(rows, labels, **options)

    # float32 against float64.
    close = {"rel": 1e-5, "abs": 1e-5}
    for mode in ("eval", "train"):
        getattr(model, mode)()
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected["loss"], **close)
        assert output.reward_loss.item() == pytest.approx(expected["reward_loss"], **close)
        torch.testing.assert_close(
            output.logits.double(), torch.tensor(expected["rewards"], dtype=torch.float64), atol=1e-5, rtol=1e-5
        )
        if kind == "none":
            assert output.regularization_loss is None
            assert output.logps is None
        else:
            assert output.regularization_loss.item() == pytest.approx(expected["regularization_loss"], **close)
            used = torch.ones(3, num_responses, dtype=torch.bool)
            if mode == "train" and kind in ("sft", "nll"):
                used = torch.nn.functional.one_hot(batch["labels"], num_responses).bool()
            assert output.logps.isnan().equal(~used)
            expected_logps = torch.tensor(expected["logps"], dtype=torch.float64)
            torch.testing.assert_close(output.logps.double()[used], expected_logps[used], atol=1e-4, rtol=1e-5)
        assert_gradients_close(model, expected["gradients"])


@pytest.mark.parametrize(("head_type", "layers"), [("linear", 1), ("mlp", 1), ("mlp", 3)])
def test_every_head_equals_the_reference(head_type, layers, make_grm):
    model = make_grm(head_type=head_type, head_num_layers=layers, head_dropout=0.0)
    rows = make_rows()
    output = model(**pad_rows(rows))
    output.loss.backward()
    expected = IndependentGRM(model).loss_and_gradients(rows, [0, 0, 0])
    assert len(expected["gradients"]) == len(list(model.parameters()))
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert_gradients_close(model, expected["gradients"])


@pytest.mark.parametrize("kind", ["sft", "nll", "dpo", "dpo_reference_free"])
def test_weight_0_is_plain_bradley_terry(kind, make_grm, batch):
    model = make_grm(regularization=kind, regularization_weight=0)
    plain = make_grm(regularization="none")
    for grm in (model, plain):
        grm.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    # Nothing but rewards is needed.
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**batch)
    assert output.loss.equal(plain(**batch).loss)
    assert output.loss.equal(output.reward_loss)
    assert output.logps is None


@pytest.mark.parametrize("kind", ["sft", "nll", "dpo", "dpo_reference_free"])
def test_weight_1_is_the_pure_regularizer(kind, make_grm, batch):
    model = make_grm(regularization=kind, regularization_weight=1.0)
    output = model(**batch, ref_logps=make_ref_logps(batch["labels"]))
    assert output.loss.item() == pytest.approx(output.regularization_loss.item(), rel=1e-6)
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.score.parameters())
    assert model.get_output_embeddings().weight.grad.any()


@pytest.mark.parametrize("kind", ["sft", "nll", "dpo", "dpo_reference_free", "none"])
def test_batch_is_the_mean_of_its_singles(kind, make_grm):
    model, rows = make_grm(regularization=kind, regularization_weight=0.5, **EXTRAS), make_rows(4)
    batch = {**pad_rows(rows), "ref_logps": make_ref_logps(rows), "margin": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    whole = model(**batch)
    singles = [model(**{name: value[i : i + 1] for name, value in batch.items()}) for i in range(4)]
    for part in ("loss", "reward_loss") if kind == "none" else ("loss", "reward_loss", "regularization_loss"):
        mean = sum(single[part].item() for single in singles) / 4
        assert whole[part].item() == pytest.approx(mean, rel=1e-5), part


def test_swapping_a_pair_negates_its_margin(make_grm, batch):
    model = make_grm()
    swapped = {name: value.flip(1) if value.dim() == 3 else value for name, value in batch.items()}
    margins = [model(**inputs).logits.diff(dim=1) for inputs in (batch, swapped)]
    torch.testing.assert_close(margins[1], -margins[0])


@pytest.mark.parametrize("kind", ["sft", "dpo_reference_free"])
def test_order_of_the_responses_does_not_change_the_loss(kind, make_grm, batch):
    model = make_grm(regularization=kind, **EXTRAS)
    swapped = {name: value.flip(1) if value.dim() == 3 else 1 - value for name, value in batch.items()}
    torch.testing.assert_close(model(**swapped).loss, model(**batch).loss)


def test_policy_equal_to_the_reference_gives_ln_2(make_grm, batch):
    model = make_grm(regularization="dpo")
    ref_logps = model.response_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert not ref_logps.requires_grad
    output = model(**batch, ref_logps=ref_logps)
    assert output.regularization_loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert output.logps.equal(ref_logps)


def test_first_token_of_a_sequence_has_no_prediction(make_grm):
    model, rows = make_grm(logps_reduction="mean"), [[([7, 8, 9, 10], 0), ([7, 11], 0)]]
    output = model(**pad_rows(rows))
    expected = IndependentGRM(model).loss_and_gradients(rows, [0], logps_reduction="mean")
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)


def test_empty_response_has_a_finite_loss(make_grm):
    rows = [[([7, 8, 9], 3), ([7, 8, 9, 10], 3)]]
    for reduction in ("sum", "mean"):
        output = make_grm(logps_reduction=reduction)(**pad_rows(rows))
        output.loss.backward()
        assert output.logps[0, 0] == 0
        assert output.regularization_loss.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("num_items", [8, torch.tensor(8)])
@pytest.mark.parametrize("kind", ["sft", "none"])
def test_loss_is_the_batchs_share_of_num_items_in_batch(kind, num_items, make_grm, batch):
    model = make_grm(regularization=kind)
    alone, share = model(**batch), model(**batch, num_items_in_batch=num_items)
    assert share.loss.item() == pytest.approx(alone.loss.item() * 3 / 8, rel=1e-6)
    assert share.reward_loss.equal(alone.reward_loss)


def test_uneven_micro_batches_add_up_to_the_whole(make_grm):
    model, rows = make_grm(), make_rows(5)
    whole = model(**pad_rows(rows)).loss
    parts = [model(**pad_rows(part), num_items_in_batch=torch.tensor(5)).loss for part in (rows[:4], rows[4:])]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("kind", ["sft", "none"])
def test_loss_multiplied_in_place_leaves_its_parts(kind, make_grm, batch):
    output = make_grm(regularization=kind)(**batch)
    reward_loss = output.reward_loss.clone()
    output.loss.mul_(4)
    output.loss.backward()
    assert output.reward_loss.equal(reward_loss)


def test_parts_of_the_loss_carry_no_gradient(make_grm, batch):
    output = make_grm()(**batch)
    assert output.loss.requires_grad
    assert output.logits.requires_grad
    assert not any(part.requires_grad for part in (output.reward_loss, output.regularization_loss, output.logps))


def test_dropout_acts_in_training_alone(make_grm, batch):
    model = make_grm(head_dropout=0.5)
    assert not model.training
    assert model(**batch).logits.equal(model(**batch).logits)
    model.train()
    assert not model(**batch).logits.equal(model(**batch).logits)


def test_changed_fields_of_the_config_change_the_loss(make_grm, batch):
    model = make_grm()
    model.config.regularization = "none"
    assert model(**batch).loss.equal(make_grm(regularization="none")(**batch).loss)


def test_unknown_regularization_set_on_the_config_is_refused(make_grm, batch):
    model = make_grm()

    def set_and_run():
        model.config.regularization = "ppo"
        model(**batch)

    with pytest.raises(ValueError, match="`regularization` must be one of"):
        set_and_run()


# Inputs and outputs


@pytest.mark.parametrize("num_responses", [2, 4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_loss_shapes(num_rows, num_responses, make_grm):
    output = make_grm()(**pad_rows(make_rows(num_rows, num_responses)))
    assert output.logits.shape == output.logps.shape == (num_rows, num_responses)
    assert output.loss.shape == output.reward_loss.shape == output.regularization_loss.shape == ()
    assert {tensor.dtype for tensor in output.values()} == {torch.float32}


@pytest.mark.parametrize("num_rows", [1, 5])
def test_two_dimensional_input_gives_one_reward_per_sequence(num_rows, make_grm):
    batch = pad_rows(make_rows(num_rows, 1))
    output = make_grm()(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])
    assert output.logits.shape == (num_rows, 1)
    assert list(output) == ["logits"]


@pytest.mark.parametrize("num_responses", [1, 2, 4])
def test_three_dimensional_input_without_labels_gives_rewards_alone(num_responses, make_grm):
    batch = pad_rows(make_rows(3, num_responses))
    output = make_grm()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert output.logits.shape == (3, num_responses)
    assert list(output) == ["logits"]


def test_scoring_never_runs_the_language_model_head(make_grm, batch):
    model = make_grm()
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None


def test_without_an_attention_mask_every_position_is_a_token(make_grm):
    model, input_ids = make_grm(), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    assert model(input_ids).logits.equal(model(input_ids, torch.ones_like(input_ids)).logits)
    pairs = input_ids.unsqueeze(0)
    assert model(pairs).logits.equal(model(pairs, torch.ones_like(pairs)).logits)


@pytest.mark.parametrize("shape", [(2, 4), (1, 2, 4)])
def test_pad_token_without_an_attention_mask_is_taken_for_a_token(shape, make_grm):
    model, input_ids = make_grm(), torch.tensor([5, 6, 7, 8, 9, 10, 11, 3]).view(shape)
    assert model(input_ids).logits.equal(model(input_ids, torch.ones_like(input_ids)).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masks_may_have_any_dtype(dtype, make_grm, batch):
    model = make_grm(logps_reduction="mean")
    masks = {name: batch[name].to(dtype) for name in ("attention_mask", "completion_mask")}
    torch.testing.assert_close(model(**{**batch, **masks}).loss, model(**batch).loss)


def test_embeddings_score_like_their_tokens(make_grm):
    model, input_ids = make_grm(), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    embeddings = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeddings, attention_mask=mask).logits, model(input_ids, mask).logits
    )
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


def test_token_type_ids_are_ignored(make_grm):
    model, input_ids = make_grm(), torch.tensor([[5, 6, 7, 8]])
    assert model(input_ids, token_type_ids=torch.ones_like(input_ids)).logits.equal(model(input_ids).logits)


def test_return_dict_false_gives_the_same_as_a_tuple(make_grm, batch):
    model = make_grm()
    output = model(**batch)
    assert isinstance(output, GRMOutput)
    values = model(**batch, return_dict=False)
    assert type(values) is tuple
    assert len(values) == 5
    for value, expected in zip(values, output.to_tuple()):
        assert value.equal(expected)
    scores = model(batch["input_ids"], batch["attention_mask"], return_dict=False)
    assert type(scores) is tuple
    assert scores[0].equal(output.logits)


def test_no_argument_but_labels_is_called_a_label():
    names = GRMForRewardModeling.forward.__code__.co_varnames[: GRMForRewardModeling.forward.__code__.co_argcount]
    assert [name for name in names if "label" in name] == ["labels"]


IDS = torch.full((2, 2, 4), 5)
FORWARD_ERRORS = {
    "nothing": ({}, {}, "Give either `input_ids` or `inputs_embeds`"),
    "both": ({}, {"input_ids": IDS[0], "inputs_embeds": torch.zeros(2, 4, 32)}, "Give either `input_ids` or"),
    "two dimensions": (
        {},
        {"input_ids": IDS[0], "labels": torch.zeros(2, dtype=torch.long)},
        r"must have shape \(batch, num_responses, seq_len\) .*got leading dimensions \(2,\).*PreferenceCollator",
    ),
    "one response": (
        {"regularization": "none"},
        {"input_ids": IDS[:, :1], "labels": torch.zeros(2, dtype=torch.long)},
        r"2 or more responses, got leading dimensions \(2, 1\)",
    ),
    "embeddings": (
        {"regularization": "none"},
        {"inputs_embeds": torch.zeros(2, 4, 32), "labels": torch.zeros(2, dtype=torch.long)},
        "With `labels`, `input_ids` must have shape",
    ),
    "dpo of four": (
        {"regularization": "dpo"},
        {"input_ids": IDS.view(1, 4, 4), "labels": torch.zeros(1, dtype=torch.long)},
        "regularization='dpo' compares exactly two responses, got 4. Use 'sft', 'nll' or 'none'",
    ),
    "reference-free dpo of four": (
        {"regularization": "dpo_reference_free"},
        {"input_ids": IDS.view(1, 4, 4), "labels": torch.zeros(1, dtype=torch.long)},
        "regularization='dpo_reference_free' compares exactly two responses, got 4",
    ),
    "no completion mask": (
        {},
        {"input_ids": IDS, "labels": torch.zeros(2, dtype=torch.long)},
        "regularization='sft' needs `completion_mask` .*but the batch has none. grm_hf.tokenize_preferences adds it",
    ),
    "no reference": (
        {"regularization": "dpo"},
        {"input_ids": IDS, "completion_mask": torch.ones_like(IDS), "labels": torch.zeros(2, dtype=torch.long)},
        r"regularization='dpo' needs `ref_logps`, but the batch has none. Run grm_hf.add_reference_logps\(dataset, model\)",
    ),
}


@pytest.mark.parametrize(("options", "inputs", "message"), FORWARD_ERRORS.values(), ids=FORWARD_ERRORS)
def test_unusable_batch_is_refused_with_what_to_do(options, inputs, message, make_grm):
    with pytest.raises(ValueError, match=message):
        make_grm(**options)(**inputs)


# Precision


@pytest.fixture
def bf16_grm(make_grm):
    return make_grm(dtype=torch.bfloat16)


def assert_float32_head(model):
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.score.parameters()} == {torch.float32}


def many_rewards(model):
    input_ids = torch.randint(4, 320, (4000, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rewards = model(input_ids).logits
    assert rewards.dtype == torch.float32
    return rewards


def assert_finer_than_bf16(rewards):
    assert distinct(rewards) > 2.5 * distinct(rewards.bfloat16())


def test_head_of_a_bf16_model_is_float32_after_loading_saving_and_loading(bf16_grm, tmp_path):
    assert_float32_head(bf16_grm)
    assert_finer_than_bf16(many_rewards(bf16_grm))
    bf16_grm.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        loaded = GRMForRewardModeling.from_pretrained(tmp_path, **options)
        assert_float32_head(loaded)
        for name, value in bf16_grm.state_dict().items():
            assert loaded.state_dict()[name].equal(value), name
        assert many_rewards(loaded).equal(many_rewards(bf16_grm))


def test_head_of_a_model_made_in_bf16_is_float32():
    config = GRMConfig(text_config=make_config("llama"), head_hidden_size=16)
    model = GRMForRewardModeling._from_config(config, dtype=torch.bfloat16)
    assert_float32_head(model)


def test_base_saved_in_bf16_loads_in_bf16_with_a_float32_head(tmp_path):
    make_base("llama").bfloat16().save_pretrained(tmp_path)
    assert_float32_head(GRMForRewardModeling.from_base_pretrained(tmp_path, head_hidden_size=16))


def test_dtype_of_the_bases_config_wins_over_that_of_its_files(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype == torch.bfloat16
    assert_float32_head(GRMForRewardModeling.from_base_pretrained(tmp_path / "base", head_hidden_size=16))


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu", torch.bfloat16),
    ],
    ids=["to", "bfloat16", "to device"],
)
def test_head_computes_in_float32_when_the_model_is_cast(cast, make_grm):
    assert_finer_than_bf16(many_rewards(cast(make_grm())))


def test_rewards_under_autocast_are_float32(make_grm, batch):
    model = make_grm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_finer_than_bf16(many_rewards(model))
        output = model(**batch)
    assert {tensor.dtype for tensor in output.values()} == {torch.float32}
    output.loss.backward()
    assert {parameter.grad.dtype for parameter in model.score.parameters()} == {torch.float32}


def test_bf16_loss_is_float32_and_near_the_float32_one(make_grm, bf16_grm, batch):
    output = bf16_grm(**batch)
    assert {tensor.dtype for tensor in output.values()} == {torch.float32}
    assert output.loss.item() == pytest.approx(make_grm()(**batch).loss.item(), rel=0.1)


# Memory and compilation


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients(options, name, tmp_path, batch):
    make_base(name).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = GRMForRewardModeling.from_base_pretrained(tmp_path, head_hidden_size=16, head_dropout=0.0).train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(options or None)
    assert model.is_gradient_checkpointing
    model(**batch).loss.backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


def test_model_is_made_on_the_meta_device_without_memory(make_grm, batch):
    reference = make_grm()
    with torch.device("meta"):
        model = GRMForRewardModeling(reference.config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    # Buffers are no part of the weights: they come with the real model.
    model.load_state_dict(reference.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_device_map_loads_the_same_model(make_grm, batch):
    model = make_grm(device_map={"": "cpu"})
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(**batch).loss.equal(make_grm()(**batch).loss)


def assert_compiled_equals_eager(name, backend, training):
    text_config = make_config(name)
    # Compiling takes its time for each layer.
    text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    config = GRMConfig(text_config=text_config, head_hidden_size=16, head_dropout=0.0)
    model = GRMForRewardModeling(config).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend=backend)
    for rows in (make_rows(3), make_rows(2, seed=1)):
        batch = pad_rows(rows)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        expected = gradients(model)
        model.zero_grad()
        compiled_output = compiled(**batch)
        compiled_output.loss.backward()
        torch.testing.assert_close(compiled_output.loss, output.loss)
        torch.testing.assert_close(compiled_output.logits, output.logits, atol=1e-5, rtol=1e-5)
        for parameter, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[parameter], atol=1e-5, rtol=1e-3, msg=parameter)


def test_compiled_model_has_the_same_loss_and_gradients():
    assert_compiled_equals_eager("llama", "eager", True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
# With a head that runs on the response's tokens alone, and through the backbone's own forward.
@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_model_compiled_by_any_backend_has_the_same_loss_and_gradients(backend, name, training):
    if backend == "inductor" and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("inductor needs a compiler")
    assert_compiled_equals_eager(name, backend, training)


# Loading


def test_head_follows_the_seed(base_folder):
    def head(seed):
        torch.manual_seed(seed)
        return GRMForRewardModeling.from_base_pretrained(base_folder, head_hidden_size=16).score.state_dict()

    first, again, other = head(1), head(1), head(2)
    for name, value in first.items():
        assert value.equal(again[name])
        assert not value.equal(other[name])


def test_head_starts_like_torch_linear_layers(make_grm):
    score = make_grm(head_hidden_size=1024).score
    for layer in score.layers:
        bound = layer.weight.shape[1] ** -0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_base_model_loads_through_from_pretrained_with_a_new_head(base_folder, make_grm):
    model, info = GRMForRewardModeling.from_pretrained(base_folder, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
    assert model.get_input_embeddings().weight.equal(make_grm().get_input_embeddings().weight)


def test_unknown_option_of_from_base_pretrained_is_refused(base_folder):
    with pytest.raises(TypeError, match="regularisation"):
        GRMForRewardModeling.from_base_pretrained(base_folder, regularisation="sft")


def test_attention_implementation_reaches_the_backbone(make_grm, batch):
    eager, sdpa = make_grm(attn_implementation="eager"), make_grm(attn_implementation="sdpa")
    assert eager.backbone.config._attn_implementation == "eager"
    assert sdpa.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**batch).loss, sdpa(**batch).loss)


def test_saving_leaves_the_bases_config_class_untouched(make_grm, tmp_path):
    before = dict(vars(LlamaConfig))
    model = make_grm()
    model.save_pretrained(tmp_path / "grm")
    assert vars(LlamaConfig) == before
    model.backbone.save_pretrained(tmp_path / "backbone")
    AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").save_pretrained(tmp_path / "again")
    for folder in ("backbone", "again"):
        assert not list((tmp_path / folder).glob("*.py"))
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["model_type"] == "llama"
        assert not {"auto_map", "custom_pipelines"} & set(config)


def test_saved_text_config_of_unknown_type_is_refused_with_what_to_do(make_grm, tmp_path):
    make_grm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"].update(model_type="their_llama", auto_map={"AutoConfig": "their_llama.TheirConfig"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model_type='their_llama', which this version .*pass it as `text_config`"):
        GRMForRewardModeling.from_pretrained(tmp_path)
    given = GRMConfig(text_config=make_config("llama"), head_hidden_size=16)
    assert GRMForRewardModeling.from_pretrained(tmp_path, config=given).config.head_hidden_size == 16


def test_backbone_without_a_language_model_head_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no output embeddings; a GRM needs a causal language model"
    ):
        GRMForRewardModeling(GRMConfig(text_config=make_config("llama")))


@pytest.mark.parametrize("options", [{"regularization": "none"}, {"regularization_weight": 0}])
def test_unused_untied_language_model_head_is_frozen_and_nothing_else(options, untied_folder, batch, tmp_path):
    model = GRMForRewardModeling.from_base_pretrained(untied_folder, head_hidden_size=16, **options)
    model.save_pretrained(tmp_path / "grm")
    for grm in (model, GRMForRewardModeling.from_pretrained(tmp_path / "grm")):
        frozen = [name for name, parameter in grm.named_parameters() if not parameter.requires_grad]
        assert frozen == ["backbone.lm_head.weight"]
        grm(**batch).loss.backward()
        assert all(p.grad is not None for p in grm.parameters() if p.requires_grad)


def test_checkpoint_without_a_regularizer_loads_with_one_and_trains_the_language_model_head(untied_folder, tmp_path):
    plain = GRMForRewardModeling.from_base_pretrained(untied_folder, head_hidden_size=16, regularization="none")
    plain.save_pretrained(tmp_path / "grm")
    model = GRMForRewardModeling.from_pretrained(tmp_path / "grm", regularization="sft", regularization_weight=0.5)
    assert (model.config.regularization, model.config.regularization_weight) == ("sft", 0.5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"regularization": "none"}, {"regularization_weight": 0}])
def test_tied_language_model_head_is_never_frozen(options, make_grm):
    assert all(parameter.requires_grad for parameter in make_grm(**options).parameters())


def test_used_language_model_head_is_never_frozen(untied_folder, batch):
    model = GRMForRewardModeling.from_base_pretrained(untied_folder, head_hidden_size=16)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_backbone_trains_the_head(make_grm, batch):
    model = make_grm().train()
    model.backbone.requires_grad_(False)
    model(**batch).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"score"}
    assert all(parameter.grad.any() for parameter in model.score.layers[0].parameters())


def test_backbone_generates_like_the_base(make_grm, base_folder):
    input_ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(input_ids)}
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert make_grm().backbone.generate(input_ids, **options).equal(base.generate(input_ids, **options))
    assert not GRMForRewardModeling.can_generate()


def test_embeddings_are_the_backbones(make_grm):
    model = make_grm()
    new = torch.nn.Embedding(320, 32)
    model.set_input_embeddings(new)
    assert model.backbone.get_input_embeddings() is model.get_input_embeddings() is new
    head = torch.nn.Linear(32, 320, bias=False)
    model.set_output_embeddings(head)
    assert model.backbone.get_output_embeddings() is model.get_output_embeddings() is head


def test_training_batch_without_labels_is_refused(make_grm, tokenized, tokenizer):
    batch = PreferenceCollator(tokenizer)(list(tokenized))
    del batch["labels"]
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_grm().train()(**batch)
