"""The objectives, as pure functions of log-probabilities.

Shapes: B pairs, T positions.
"""

from torch import Tensor
from torch.nn import functional


def dpo_margin(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> Tensor:
    """Implicit reward of the chosen text minus that of the rejected one, [B].

    The implicit reward is beta * log(policy / reference) of the whole text (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    Args:
        policy_chosen: [B] sums of the log-probabilities of the tokens of the chosen texts; the others likewise.
        beta: strength of the pull towards the reference.
    """
    return beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(margin), [B] (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); log 2 where the policy is the reference."""
    return -functional.logsigmoid(dpo_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta))


def nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of every text, [B].

    The mean is taken inside a text and not over a batch, so that the average over pairs does not depend on how they are batched.

    Args:
        log_probs: [B] sums over the tokens of a text.
        tokens: [B] their number, at least 1.
    """
    return -log_probs / tokens
