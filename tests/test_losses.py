"""The losses agree with the plain-Python reference in values and gradients, and have the properties the paper gives them."""

import math

import pytest
import reference_grm as reference
import torch

from grm_hf.modeling.losses_grm import dpo_loss, nll_loss, preference_loss, response_logps, sft_loss


REGULARIZATIONS = ("sft", "nll", "dpo", "dpo_reference_free")
# Absolute and relative, float64 on both sides.
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def rewards_and_labels(num_responses, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = 3 * torch.randn(rows, num_responses, generator=generator, dtype=torch.float64)
    return rewards, torch.arange(rows) % num_responses


def regularizer(kind, logps, labels, beta=0.1, ref_logps=None):
    if kind == "sft":
        return sft_loss(logps, labels, beta)
    if kind == "nll":
        return nll_loss(logps, labels)
    return dpo_loss(logps, labels, beta, ref_logps if kind == "dpo" else None)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("num_responses", [2, 4])
def test_preference_loss_and_gradient_equal_the_reference(num_responses, with_margin, smoothing, coefficient):
    rewards, labels = rewards_and_labels(num_responses)
    rewards.requires_grad_()
    margin = double([0.5, 1.0, 0.0, -2.0, 3.0]) if with_margin else None
    losses = preference_loss(rewards, labels, margin, smoothing, coefficient)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    options = [
        (row, label, margin[index].item() if with_margin else None, smoothing, coefficient)
        for index, (row, label) in enumerate(zip(rewards.tolist(), labels.tolist()))
    ]
    torch.testing.assert_close(losses, double([reference.preference_loss(*option) for option in options]), **TOLERANCE)
    torch.testing.assert_close(
        gradient, double([reference.preference_gradient(*option) for option in options]), **TOLERANCE
    )


@pytest.mark.parametrize(("kind", "num_responses"), [*((kind, 2) for kind in REGULARIZATIONS), ("sft", 4), ("nll", 4)])
def test_regularization_loss_and_gradient_equal_the_reference(kind, num_responses):
    values, labels = rewards_and_labels(num_responses)
    # Log-probabilities of whole responses: tens of nats.
    logps = (10 * values - 60).requires_grad_()
    ref_logps = logps.detach() + rewards_and_labels(num_responses, seed=1)[0]
    losses = regularizer(kind, logps, labels, 0.1, ref_logps)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    options = [
        (kind, row, label, 0.1, ref) for row, label, ref in zip(logps.tolist(), labels.tolist(), ref_logps.tolist())
    ]
    torch.testing.assert_close(
        losses, double([reference.regularization_loss(*option) for option in options]), **TOLERANCE
    )
    torch.testing.assert_close(
        gradient, double([reference.regularization_gradient(*option) for option in options]), **TOLERANCE
    )


@pytest.mark.parametrize("kind", REGULARIZATIONS)
def test_closed_form_gradients_of_the_reference_are_central_differences(kind):
    rewards, logps, ref_logps, options = [0.3, -1.2], [-9.0, -14.0], [-8.0, -15.0], (1, 0.4, 0.1, 0.01)
    gradient = reference.preference_gradient(rewards, *options)
    other = reference.regularization_gradient(kind, logps, 1, 0.3, ref_logps)
    for index in range(2):
        numeric = reference.central_difference(lambda r: reference.preference_loss(r, *options), rewards, index)
        assert gradient[index] == pytest.approx(numeric, abs=1e-8)
        numeric = reference.central_difference(
            lambda p: reference.regularization_loss(kind, p, 1, 0.3, ref_logps), logps, index
        )
        assert other[index] == pytest.approx(numeric, abs=1e-8)


def test_two_responses_are_bradley_terry():
    rewards, labels = rewards_and_labels(2)
    margin = double([0.5, 1.0, 0.0, -2.0, 3.0])
    expected = [
        reference.bradley_terry(row[label], row[1 - label], lead)
        for row, label, lead in zip(rewards.tolist(), labels.tolist(), margin.tolist())
    ]
    torch.testing.assert_close(preference_loss(rewards, labels, margin), double(expected), **TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_bradley_terry_mixes_both_orders(smoothing):
    rewards, labels = rewards_and_labels(2)
    expected = (1 - smoothing) * preference_loss(rewards, labels) + smoothing * preference_loss(rewards, 1 - labels)
    torch.testing.assert_close(preference_loss(rewards, labels, label_smoothing=smoothing), expected, **TOLERANCE)


@pytest.mark.parametrize("num_responses", [2, 4])
def test_order_of_the_responses_does_not_change_the_loss(num_responses):
    rewards, labels = rewards_and_labels(num_responses)
    flipped = preference_loss(rewards.flip(-1), num_responses - 1 - labels, double([1.0] * 5), 0.1, 0.01)
    torch.testing.assert_close(flipped, preference_loss(rewards, labels, double([1.0] * 5), 0.1, 0.01), **TOLERANCE)


def test_swapping_a_pair_negates_the_logit_of_its_preference():
    rewards, labels = rewards_and_labels(2)
    # -log(exp(loss) - 1) is the margin r_c - r_r.
    margins = -torch.expm1(preference_loss(rewards, labels)).log()
    swapped = -torch.expm1(preference_loss(rewards.flip(-1), labels)).log()
    torch.testing.assert_close(swapped, -margins, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("num_responses", [2, 4])
def test_a_constant_added_to_all_rewards_changes_only_the_centring(num_responses):
    rewards, labels = rewards_and_labels(num_responses)
    margin = double([1.0] * 5)
    plain = preference_loss(rewards, labels, margin, 0.1)
    torch.testing.assert_close(preference_loss(rewards + 7.0, labels, margin, 0.1), plain, **TOLERANCE)
    centred = preference_loss(rewards + 7.0, labels, margin, 0.1, 0.5)
    torch.testing.assert_close(centred - plain, 0.5 * (rewards + 7.0).sum(-1) ** 2, **TOLERANCE)


@pytest.mark.parametrize("num_responses", [2, 4])
def test_equal_rewards_give_the_log_of_the_number_of_responses(num_responses):
    losses = preference_loss(torch.ones(3, num_responses), torch.tensor([0, 1, 1]), label_smoothing=0.3)
    torch.testing.assert_close(losses, torch.full((3,), math.log(num_responses)))


def test_integer_margin_counts_like_a_float_one():
    rewards, labels = rewards_and_labels(2)
    margin = torch.arange(5)
    assert preference_loss(rewards, labels, margin).equal(preference_loss(rewards, labels, margin.double()))


def test_policy_equal_to_the_reference_gives_ln_2():
    logps, labels = rewards_and_labels(2)
    losses = dpo_loss(20 * logps - 80, labels, 0.1, 20 * logps - 80)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), **TOLERANCE)


def test_uniform_reference_equals_no_reference():
    logps, labels = rewards_and_labels(2)
    with_reference = dpo_loss(logps, labels, 0.1, torch.full_like(logps, -31.0))
    torch.testing.assert_close(with_reference, dpo_loss(logps, labels, 0.1), **TOLERANCE)


def test_sft_loss_is_finite_with_a_gradient_for_thousands_of_nats():
    logps = double([[-20000.0, -1.0]]).requires_grad_()
    loss = sft_loss(logps, torch.tensor([0]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(2000.0)
    assert logps.grad.tolist() == [[pytest.approx(-0.1), 0.0]]


@pytest.mark.parametrize("kind", REGULARIZATIONS)
def test_batch_of_rows_gives_each_row_its_own_loss(kind):
    logps, labels = rewards_and_labels(2)
    ref_logps = logps - 1
    margin = double([0.5, 1.0, 0.0, -2.0, 3.0])
    preference = preference_loss(logps, labels, margin, 0.1, 0.01)
    regularization = regularizer(kind, logps, labels, 0.1, ref_logps)
    for row in range(5):
        one = slice(row, row + 1)
        assert preference_loss(logps[one], labels[one], margin[one], 0.1, 0.01).item() == pytest.approx(
            preference[row].item(), abs=1e-12
        )
        assert regularizer(kind, logps[one], labels[one], 0.1, ref_logps[one]).item() == pytest.approx(
            regularization[row].item(), abs=1e-12
        )


@pytest.fixture
def head_inputs():
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, 7, 3, generator=generator)
    weight = torch.randn(11, 3, generator=generator)
    input_ids = torch.randint(11, (4, 7), generator=generator)
    completion_mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]]
    )
    return hidden_states, weight, input_ids, completion_mask


def test_response_logps_equal_the_reference(head_inputs):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    logps = response_logps(hidden_states, input_ids, completion_mask, lambda states: states @ weight.T)
    logits = (hidden_states.double() @ weight.double().T).tolist()
    expected = [sum(reference.token_logps(*row)) for row in zip(logits, input_ids.tolist(), completion_mask.tolist())]
    # float32: the head's logits are cast down on purpose.
    torch.testing.assert_close(logps, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert logps.dtype == torch.float32


def test_response_logps_gradient_is_one_hot_less_softmax(head_inputs):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    logits = hidden_states @ weight.T
    logits.requires_grad_()
    response_logps(logits, input_ids, completion_mask, torch.nn.Identity()).sum().backward()
    expected = torch.zeros_like(logits)
    for row, position in completion_mask[:, 1:].nonzero().tolist():
        probabilities = [math.exp(logp) for logp in reference.log_softmax(logits[row, position].tolist())]
        expected[row, position] = -torch.tensor(probabilities)
        expected[row, position, input_ids[row, position + 1]] += 1
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=1e-6)


def test_language_model_head_sees_only_positions_that_predict_a_response_token(head_inputs):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    seen = []

    def head(states):
        seen.append(states)
        return states @ weight.T

    response_logps(hidden_states, input_ids, completion_mask, head)
    assert seen[0].equal(hidden_states[:, :-1][completion_mask[:, 1:].bool()])


def test_empty_response_has_log_probability_zero(head_inputs):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    logps = response_logps(hidden_states, input_ids, completion_mask, lambda states: states @ weight.T)
    assert logps[3].item() == 0.0
    nothing = response_logps(hidden_states, input_ids, torch.zeros(4, 7), lambda states: states @ weight.T)
    assert nothing.equal(torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_completion_mask_may_have_any_dtype(head_inputs, dtype):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    expected = response_logps(hidden_states, input_ids, completion_mask, lambda states: states @ weight.T)
    assert response_logps(hidden_states, input_ids, completion_mask.to(dtype), lambda s: s @ weight.T).equal(expected)


def test_bf16_logits_give_float32_log_probabilities(head_inputs):
    hidden_states, weight, input_ids, completion_mask = head_inputs
    logits = (hidden_states @ weight.T).bfloat16()
    logps = response_logps(logits, input_ids, completion_mask, torch.nn.Identity())
    assert logps.dtype == torch.float32
    assert logps.equal(response_logps(logits.float(), input_ids, completion_mask, torch.nn.Identity()))
