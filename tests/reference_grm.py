"""The losses of arXiv 2406.10216 in plain Python floats (float64) and loops, with gradients in closed form.

Nothing of grm_hf and no tensor operation is used: tensors are read with `.tolist()` by the caller. Rewards, log-probabilities
and margins of a row are lists with one number per response; `label` is the index of the preferred response.
"""

import math


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def log_softmax(values):
    highest = max(values)
    total = 0.0
    for value in values:
        total += math.exp(value - highest)
    return [value - highest - math.log(total) for value in values]


def token_logps(logits, input_ids, completion_mask):
    """Log-probabilities of a response's tokens; logits `[seq_len][vocab_size]`, the others `[seq_len]`."""
    logps = []
    for position in range(1, len(input_ids)):
        if completion_mask[position]:
            # The logits at a position are about the token after it.
            logps.append(log_softmax(logits[position - 1])[input_ids[position]])
    return logps


def bradley_terry(preferred, other, margin=0.0):
    """-log sigmoid(r_c - r_r - m)."""
    return -log_sigmoid(preferred - other - margin)


def target_probabilities(label, num_responses, label_smoothing=0.0):
    """The label counts with 1 - eps, every other response with eps / (n - 1)."""
    return [
        1 - label_smoothing if index == label else label_smoothing / (num_responses - 1)
        for index in range(num_responses)
    ]


def preference_loss(rewards, label, margin=None, label_smoothing=0.0, center_rewards_coefficient=None):
    """Preference loss of one row."""
    utilities = list(rewards)
    if margin is not None:
        utilities[label] -= margin
    targets = target_probabilities(label, len(rewards), label_smoothing)
    loss = 0.0
    for target, logp in zip(targets, log_softmax(utilities)):
        loss -= target * logp
    if center_rewards_coefficient is not None:
        loss += center_rewards_coefficient * sum(rewards) ** 2
    return loss


def preference_gradient(rewards, label, margin=None, label_smoothing=0.0, center_rewards_coefficient=None):
    """Gradient of one row's preference loss with respect to its rewards."""
    utilities = list(rewards)
    if margin is not None:
        utilities[label] -= margin
    targets = target_probabilities(label, len(rewards), label_smoothing)
    gradient = [math.exp(logp) - target for target, logp in zip(targets, log_softmax(utilities))]
    if center_rewards_coefficient is not None:
        gradient = [value + 2 * center_rewards_coefficient * sum(rewards) for value in gradient]
    return gradient


def regularization_loss(kind, logps, label, beta=0.1, ref_logps=None):
    """Text-generation loss of one row, from one log-probability per response."""
    if kind == "none":
        return 0.0
    if kind == "nll":
        return -logps[label]
    return -log_sigmoid(beta * _advantage(kind, logps, label, ref_logps))


def regularization_gradient(kind, logps, label, beta=0.1, ref_logps=None):
    """Gradient of one row's text-generation loss with respect to its responses' log-probabilities."""
    gradient = [0.0] * len(logps)
    if kind == "nll":
        gradient[label] = -1.0
    elif kind != "none":
        slope = -beta * sigmoid(-beta * _advantage(kind, logps, label, ref_logps))
        gradient[label] = slope
        if kind != "sft":
            gradient[1 - label] = -slope
    return gradient


def _advantage(kind, logps, label, ref_logps):
    if kind == "sft":
        return logps[label]
    if kind == "dpo_reference_free":
        return logps[label] - logps[1 - label]
    if kind == "dpo":
        return (logps[label] - ref_logps[label]) - (logps[1 - label] - ref_logps[1 - label])
    raise ValueError(kind)


def grm(
    rewards,
    response_token_logps,
    labels,
    regularization="sft",
    weight=0.01,
    beta=0.1,
    logps_reduction="sum",
    margins=None,
    ref_logps=None,
    label_smoothing=0.0,
    center_rewards_coefficient=None,
):
    """
    The loss of a batch, its parts and its gradients.

    `rewards[row][response]`, `response_token_logps[row][response][token]`, `labels[row]`, `margins[row]`, and
    `ref_logps[row][response]` summed over tokens. `rewards_gradient` and `token_logps_gradient` have the shapes of the
    first two.
    """
    count = len(rewards)
    reward_loss = reg_loss = 0.0
    summed, rewards_gradient, token_logps_gradient = [], [], []
    for row in range(count):
        options = {
            "margin": None if margins is None else margins[row],
            "label_smoothing": label_smoothing,
            "center_rewards_coefficient": center_rewards_coefficient,
        }
        reward_loss += preference_loss(rewards[row], labels[row], **options) / count
        share = 1.0 if regularization == "none" else 1 - weight
        gradient = preference_gradient(rewards[row], labels[row], **options)
        rewards_gradient.append([share * value / count for value in gradient])

        # How much one token counts in its response's log-probability.
        per_token = [
            1 / max(len(tokens), 1) if logps_reduction == "mean" else 1.0 for tokens in response_token_logps[row]
        ]
        summed.append([sum(tokens) for tokens in response_token_logps[row]])
        logps = [value * factor for value, factor in zip(summed[-1], per_token)]
        reference = None
        if ref_logps is not None:
            reference = [value * factor for value, factor in zip(ref_logps[row], per_token)]
        reg_loss += regularization_loss(regularization, logps, labels[row], beta, reference) / count
        gradient = regularization_gradient(regularization, logps, labels[row], beta, reference)
        token_logps_gradient.append(
            [
                [weight * slope * factor / count] * len(tokens)
                for slope, factor, tokens in zip(gradient, per_token, response_token_logps[row])
            ]
        )
    loss = reward_loss if regularization == "none" else (1 - weight) * reward_loss + weight * reg_loss
    return {
        "loss": loss,
        "reward_loss": reward_loss,
        "regularization_loss": reg_loss,
        "logps": summed,
        "rewards_gradient": rewards_gradient,
        "token_logps_gradient": token_logps_gradient,
    }


def central_difference(function, values, index, step=1e-5):
    """Derivative of `function(values)` with respect to `values[index]`."""
    higher, lower = list(values), list(values)
    higher[index] += step
    lower[index] -= step
    return (function(higher) - function(lower)) / (2 * step)
