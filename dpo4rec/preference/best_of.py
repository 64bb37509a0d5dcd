"""Selection at inference: among several texts of a user, that which the user's lists are ranked best with."""

import torch
from torch import Tensor

from dpo4rec.preference.config import RewardConfig
from dpo4rec.preference.reward import reward_of


def best_by_other_half(config: RewardConfig, logits: Tensor, labels: Tensor, users: Tensor) -> Tensor:
    """The text to rank each list with, [L], as the other half of the user's lists chooses it.

    Halves are every other list of a user. Each chooses for the other, so that all lists are measured and none with a text that it has
    chosen itself: most of the gain on the choosing lists is luck. The only list of a user gets text 0.

    Args:
        config: what is best; rewards are averaged over recommenders.
        logits: [S, N, L, K] by S recommenders with each of N texts.
        labels: [L, K].
        users: [L] number of each list's user.
    """
    recommenders, texts, lists, _ = logits.shape
    rewards = reward_of(config, logits.flatten(0, 2), labels.repeat(recommenders * texts, 1)).view(logits.shape[:3])
    rewards = rewards.nan_to_num(0.0).mean(0)  # [N, L]; a list without positives has no NDCG
    order = users.argsort(stable=True)
    place = torch.empty_like(users)
    place[order] = torch.arange(lists) - torch.searchsorted(users[order], users[order])  # among the lists of its user
    half = 2 * users + place % 2
    totals = rewards.new_zeros(texts, 2 * int(users.max()) + 2).index_add_(1, half, rewards)
    return totals.argmax(0)[half ^ 1]
