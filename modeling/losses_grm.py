"""The losses of a GRM as pure functions: one value per row, so that a batch is the mean of its rows.

Equations: arXiv 2406.10216, section 3. `batch` counts rows (a prompt with its responses); log-probabilities are nats.
"""

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F


def preference_loss(
    rewards: torch.Tensor,
    labels: torch.Tensor,
    margin: Optional[torch.Tensor] = None,
    label_smoothing: float = 0.0,
    center_rewards_coefficient: Optional[float] = None,
) -> torch.Tensor:
    r"""
    Negative log-likelihood of the preferred response: Bradley-Terry, or Plackett-Luce with more than two responses.

    With two responses \\(-\log\sigma(r_c - r_r - m)\\), that is cross-entropy over the rewards. With label smoothing
    \\(\epsilon\\) the label counts with \\(1 - \epsilon\\) and every other response with \\(\epsilon / (n - 1)\\).

    Args:
        rewards (`torch.Tensor` of shape `(batch, num_responses)`): Rewards.
        labels (`torch.Tensor` of shape `(batch,)`): Index of the preferred response.
        margin (`torch.Tensor` of shape `(batch,)`, *optional*): Reward by which the preferred response has to lead.
        label_smoothing (`float`, defaults to 0.0): Probability that a label is wrong.
        center_rewards_coefficient (`float`, *optional*): Weight of the squared sum of the row's rewards.

    Returns:
        `torch.Tensor` of shape `(batch,)`.
    """
    num_responses = rewards.shape[-1]
    logits = rewards
    if margin is not None:
        preferred = F.one_hot(labels, num_responses).to(rewards.dtype)
        logits = rewards - preferred * margin.to(rewards.dtype).unsqueeze(-1)
    # torch spreads its smoothing over all classes, the label's included.
    smoothing = label_smoothing * num_responses / (num_responses - 1)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * rewards.sum(-1) ** 2
    return loss


def sft_loss(logps: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    r"""\\(-\log\sigma(\beta \log\pi(y_c|x))\\), the paper's choice. `logps` `(batch, num_responses)` -> `(batch,)`."""
    return -F.logsigmoid(beta * _at(logps, labels))


def nll_loss(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""\\(-\log\pi(y_c|x)\\). `logps` `(batch, num_responses)` -> `(batch,)`, nats."""
    return -_at(logps, labels)


def dpo_loss(
    logps: torch.Tensor, labels: torch.Tensor, beta: float, ref_logps: Optional[torch.Tensor] = None
) -> torch.Tensor:
    r"""
    \\(-\log\sigma(\beta(\log\rho(y_c|x) - \log\rho(y_r|x)))\\) with \\(\rho = \pi/\pi_{ref}\\), or \\(\rho = \pi\\)
    without `ref_logps`. `logps` and `ref_logps` `(batch, 2)` -> `(batch,)`.
    """
    ratios = logps if ref_logps is None else logps - ref_logps.to(logps.dtype)
    return -F.logsigmoid(beta * (_at(ratios, labels) - _at(ratios, 1 - labels)))


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def response_logps(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    language_model_head: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    r"""
    Log-probability of each response, \\(\sum_t \log\pi(y_t|x, y_{<t})\\).

    The language-model head runs on the positions that predict a response's token, and on no others.

    Args:
        hidden_states (`torch.Tensor` of shape `(rows, seq_len, hidden_size)`): Final hidden states.
        input_ids (`torch.Tensor` of shape `(rows, seq_len)`): Tokens.
        completion_mask (`torch.Tensor` of shape `(rows, seq_len)`):
            1 on the response's tokens. A response's token in the first column has no prediction and is left out.
        language_model_head (`Callable`): Maps `(tokens, hidden_size)` to logits `(tokens, vocab_size)`.

    Returns:
        `torch.Tensor` of shape `(rows,)`: float32, nats.
    """
    mask = completion_mask[:, 1:].bool().to(hidden_states.device)
    # (tokens,)
    targets = input_ids[:, 1:].to(mask.device)[mask]
    logits = language_model_head(hidden_states[:, :-1][mask])
    # A bf16 log-softmax is biased by hundredths of a nat per token.
    token_logps = -F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").to(mask.device)
    rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(-1).expand_as(mask)[mask]
    return token_logps.new_zeros(mask.shape[0]).index_add(0, rows, token_logps)
