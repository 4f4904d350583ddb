"""A GRM's rewards, log-probabilities, loss and gradients by another way than `GRMForRewardModeling.forward`.

An untouched causal language model in float64 reads each sequence alone, without padding, and makes all of its logits; the
loss and its gradients with respect to rewards and log-probabilities come from the plain-Python reference.
"""

import copy

import reference_grm as reference
import torch


class IndependentGRM:
    """
    Args:
        model: The GRM to copy the weights of the head from; also of the language model unless `base` is given.
        base: The language model.
    """

    def __init__(self, model, base=None):
        self.base = copy.deepcopy(model.backbone if base is None else base).double().eval()
        self.head = [
            (layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_())
            for layer in model.score.layers
        ]

    def read(self, input_ids, prompt_length):
        """Reward `()` of a sequence and log-probabilities `(num_response_tokens,)` of its response's tokens."""
        output = self.base(torch.tensor([input_ids]), output_hidden_states=True, use_cache=False)
        state = output.hidden_states[-1][0, -1]
        for weight, bias in self.head[:-1]:
            state = torch.relu(weight @ state + bias)
        weight, bias = self.head[-1]
        logps = output.logits[0].double().log_softmax(-1)
        positions = range(max(prompt_length, 1), len(input_ids))
        response = [logps[position - 1, input_ids[position]] for position in positions]
        return (weight @ state + bias)[0], torch.stack(response) if response else state.new_zeros(0)

    def rewards_and_logps(self, rows):
        """Rewards and summed log-probabilities, both `(num_rows, num_responses)`."""
        with torch.no_grad():
            read = [[self.read(*response) for response in row] for row in rows]
        rewards = torch.stack([torch.stack([reward for reward, _ in row]) for row in read])
        return rewards, torch.stack([torch.stack([logps.sum() for _, logps in row]) for row in read])

    def loss_and_gradients(self, rows, labels, **options):
        """What `reference_grm.grm` gives, and under "gradients" those of all weights, named as in the GRM."""
        read = [[self.read(*response) for response in row] for row in rows]
        result = reference.grm(
            [[reward.item() for reward, _ in row] for row in read],
            [[logps.tolist() for _, logps in row] for row in read],
            labels,
            **options,
        )
        # Its gradient with respect to the weights is the loss's, by the chain rule.
        surrogate = 0.0
        for row, reward_slopes, logp_slopes in zip(read, result["rewards_gradient"], result["token_logps_gradient"]):
            for (reward, logps), reward_slope, logp_slope in zip(row, reward_slopes, logp_slopes):
                surrogate = surrogate + reward * reward_slope + (logps * logps.new_tensor(logp_slope)).sum()
        names = {f"backbone.{name}": parameter for name, parameter in self.base.named_parameters()}
        for index, (weight, bias) in enumerate(self.head):
            names[f"score.layers.{index}.weight"], names[f"score.layers.{index}.bias"] = weight, bias
        gradients = torch.autograd.grad(surrogate, list(names.values()), allow_unused=True)
        result["gradients"] = dict(zip(names, gradients))
        result["rewards"] = [[reward.item() for reward, _ in row] for row in read]
        return result


def assert_gradients_close(model, gradients, tolerance=1e-4):
    """The gradients of `model`'s parameters, within `tolerance` of the largest gradient of each parameter."""
    # Some are zero by symmetry, that of the last bias for one: there float32 leaves noise of the others' size.
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in gradients.values() if gradient is not None)
    compared = 0
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        if not parameter.requires_grad:
            continue
        if expected is None or parameter.grad is None:
            # One of them may be zeros.
            given = parameter.grad if expected is None else expected
            assert given is None or given.abs().max() == 0, name
            continue
        error = (parameter.grad.double() - expected).abs().max().item()
        assert error <= tolerance * expected.abs().max().item() + noise, (name, error)
        compared += 1
    assert compared
