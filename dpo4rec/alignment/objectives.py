"""The objectives, as pure functions.

Shapes: B comparisons, K rejected texts each. A `gap` [B] is beta * (log-ratio of the chosen text - log-ratio of the rejected one), where
the log-ratio of a text is log(policy / reference), summed over its tokens: the difference of DPO's implicit rewards (Rafailov et al. 2023,
arXiv 2305.18290, eq. 5).
"""

import torch
from torch import Tensor
from torch.nn import functional


def sigmoid(gap: Tensor) -> Tensor:
    """DPO: -log sigmoid(gap), [B] (arXiv 2305.18290, eq. 7); log 2 where the policy is the reference."""
    return -functional.logsigmoid(gap)


def smoothed(gap: Tensor, epsilon: Tensor) -> Tensor:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3), [B].

    (1 - epsilon) * sigmoid(gap) + epsilon * sigmoid(-gap): lowest where the pair's odds are (1 - epsilon) / epsilon.

    Args:
        epsilon: [B] probability that a pair is the wrong way round, in [0, 0.5).
    """
    return (1 - epsilon) * sigmoid(gap) + epsilon * sigmoid(-gap)


def robust(gap: Tensor, epsilon: Tensor) -> Tensor:
    """Robust DPO (Ray Chowdhury et al. 2024, "Provably Robust DPO", arXiv 2403.00409, the rDPO loss), [B].

    ((1 - epsilon) * sigmoid(gap) - epsilon * sigmoid(-gap)) / (1 - 2 epsilon): its mean over pairs of which a share epsilon [B] is the
    wrong way round is what DPO's would be without them.
    """
    return ((1 - epsilon) * sigmoid(gap) - epsilon * sigmoid(-gap)) / (1 - 2 * epsilon)


def margin(gap: Tensor, by: Tensor) -> Tensor:
    """DPO with an offset (Amini et al. 2024, arXiv 2402.10571, the ODPO loss): -log sigmoid(gap - by), [B]."""
    return sigmoid(gap - by)


def hinge(gap: Tensor, by: Tensor) -> Tensor:
    """max(0, by - gap), [B]: the loss of SLiC on DPO's gap (Liu et al. 2024, "RSO", arXiv 2309.06657; there `by` is 1)."""
    return torch.relu(by - gap)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (chosen - rejected - 1 / (2 beta))^2, [B].

    Args:
        chosen: [B] log-ratios per token, as TRL and, it says, the authors take them; `rejected` likewise.
        beta: the paper's tau.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, by: Tensor) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), [B]; there is no reference.

    Args:
        chosen: [B] log-probabilities per token; `rejected` likewise.
        by: [B] the paper's gamma.
    """
    return margin(beta * (chosen - rejected), by)


def softmax(gaps: Tensor, present: Tensor) -> Tensor:
    """S-DPO (Chen et al. 2024, arXiv 2406.09215, its loss): -log sigmoid(-log sum_k exp(-gap_k)), [B]; with one rejected text, DPO.

    Args:
        gaps: [B, K] of the chosen text against each rejected one.
        present: [B, K] which of them there are.
    """
    return functional.softplus((-gaps).masked_fill(~present, -torch.inf).logsumexp(1))


def dmpo(gaps: Tensor, present: Tensor) -> Tensor:
    """DMPO (Bai et al. 2024, arXiv 2405.16127, its loss): -log sigmoid(mean over k of gap_k), [B]; arguments as of `softmax`."""
    return sigmoid(mean_gap(gaps, present))


def mean_gap(gaps: Tensor, present: Tensor) -> Tensor:
    """Mean over the rejected texts that there are, [B]."""
    return gaps.masked_fill(~present, 0.0).sum(1) / present.sum(1)


def nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of every text, [B].

    The mean is taken inside a text and not over a batch, so that the average over pairs does not depend on how they are batched.

    Args:
        log_probs: [B] sums over the tokens of a text.
        tokens: [B] their number, at least 1.
    """
    return -log_probs / tokens
