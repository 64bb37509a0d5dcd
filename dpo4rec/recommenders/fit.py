"""Fitting a re-ranker on the lists of some users, choosing the epoch on the lists of others.

U users with S texts each, L lists of K candidates, text vectors of width D.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dpo4rec.errors import InputError
from dpo4rec.evaluation.metrics import ndcg, per_user
from dpo4rec.files import stable_seed
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker, Sizes
from dpo4rec.recommenders.scoring import logits_of


@dataclass(frozen=True)
class FitReport:
    """How a fit went, by epoch: training loss in nats (bce: a candidate; softmax: a list), NDCG@selection_cutoff of the validation users.

    Epochs are counted from 1.
    """

    train_losses: list[float]
    validation_ndcg: list[float]
    chosen_epoch: int
    seconds: float


def fit(
    config: RecommenderConfig,
    data: RankingData,
    item_vectors: Tensor | None,
    user_vectors: Tensor | None,
    train_users: Tensor,
    validation_users: Tensor,
    seed: int,
) -> tuple[Reranker, FitReport]:
    """Fits a re-ranker, keeps its best epoch on the validation users, and returns it bound and in evaluation mode.

    In each epoch every list draws one of its user's texts anew: that is how the model learns to react to texts before it judges them.
    The result depends on the arguments alone; the global random state is left as it was.

    Args:
        item_vectors: text vectors [I, D] in the order of `data.item_ids`; None without `item_text`.
        user_vectors: text vectors [U, S, D]; None when `user_signal` has no text. Users in neither mask may be NaN.
        train_users: mask [U] of the users to learn from.
        validation_users: mask [U] of the users that choose the epoch.

    Raises:
        InputError: vectors do not fit configuration or data, a user in a mask lacks a text, is in both masks, or a mask has no lists.
    """
    started = time.perf_counter()
    _check(config, data, item_vectors, user_vectors, train_users, validation_users)
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from the global generator
        torch.manual_seed(stable_seed("recommender", seed))
        model = _build(config, data, item_vectors, user_vectors, train_users)
        lists = _training_lists(config, data, train_users)
        model.items.warm.copy_(_seen(config, data, lists))
        losses, scores, best = _train(model, data, user_vectors, lists, data.lists_of(validation_users), seed)
    model.load_state_dict(best)
    report = FitReport(losses, scores, 1 + scores.index(max(scores)), time.perf_counter() - started)
    return model.eval(), report


def _build(
    config: RecommenderConfig, data: RankingData, item_vectors: Tensor | None, user_vectors: Tensor | None, train_users: Tensor
) -> Reranker:
    vectors = item_vectors if item_vectors is not None else user_vectors
    model = Reranker(config, Sizes.of(data, 0 if vectors is None else vectors.shape[-1])).bind(data, item_vectors)
    if model.adaptor is not None and model.adaptor.item is not None and item_vectors is not None:
        model.adaptor.item.standardise.measure(item_vectors)
    if model.adaptor is not None and model.adaptor.user is not None and user_vectors is not None:
        model.adaptor.user.standardise.measure(user_vectors[train_users].flatten(0, 1))
    return model


def _train(
    model: Reranker, data: RankingData, user_vectors: Tensor | None, lists: Tensor, validation: Tensor, seed: int
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and validation scores by epoch, and the weights of the best epoch."""
    config = model.config
    generator = Generator().manual_seed(stable_seed("lists", seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * -(-len(lists) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    losses: list[float] = []
    scores: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        for batch in lists[torch.randperm(len(lists), generator=generator)].split(config.batch_size):
            users = data.list_users[batch]
            logits = model(data.candidates[batch], users, _drawn(user_vectors, users, generator))
            loss = _loss(config, logits, data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(lists))
        scores.append(_validation_ndcg(model, data, user_vectors, validation))
        if scores[-1] == max(scores) and scores.count(scores[-1]) == 1:
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return losses, scores, best


def _seen(config: RecommenderConfig, data: RankingData, lists: Tensor) -> Tensor:
    """1 for each item code [I+1] whose id vector the lists teach: it is a candidate, or in a history that is read; 0 for the others."""
    seen = torch.zeros(len(data.item_ids) + 1)
    seen[data.candidates[lists].unique()] = 1
    if config.reads_history:
        seen[data.histories[data.list_users[lists].unique()].unique()] = 1
    return seen


def _training_lists(config: RecommenderConfig, data: RankingData, users: Tensor) -> Tensor:
    """Numbers of the lists that teach something: to a softmax, those with a positive."""
    lists = data.lists_of(users)
    return lists[data.labels[lists].any(1)] if config.loss == "softmax" else lists


def _loss(config: RecommenderConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy a candidate, or the attention rank loss of DLCM (Ai et al., SIGIR 2018) a list, both of [B, K].

    The latter is the cross-entropy of the softmax over the candidates against labels / number of positives.
    """
    if config.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels / labels.sum(1, keepdim=True))


def _drawn(user_vectors: Tensor | None, users: Tensor, generator: Generator) -> Tensor | None:
    """One text of each of the users [B], [B, D]."""
    if user_vectors is None:
        return None
    return user_vectors[users, torch.randint(user_vectors.shape[1], users.shape, generator=generator)]


def _validation_ndcg(model: Reranker, data: RankingData, user_vectors: Tensor | None, lists: Tensor) -> float:
    """Mean over users of the mean NDCG@k over their lists, k = `selection_cutoff`; a user's texts take turns at the lists."""
    users = data.list_users[lists]
    vectors = None if user_vectors is None else user_vectors[users, torch.arange(len(lists)) % user_vectors.shape[1]]
    values = ndcg(logits_of(model, data, lists, vectors), data.labels[lists], model.config.selection_cutoff)
    return float(per_user(values, users, len(data.user_ids)).nanmean())


def _check(
    config: RecommenderConfig,
    data: RankingData,
    item_vectors: Tensor | None,
    user_vectors: Tensor | None,
    train_users: Tensor,
    validation_users: Tensor,
) -> None:
    if (user_vectors is not None) != config.reads_user_text:
        given = "absent" if user_vectors is None else "given"
        raise InputError("recommender.user_signal", f"it is {config.user_signal!r} but user vectors are {given}", "Make them agree")
    if user_vectors is not None:
        if len(user_vectors) != len(data.user_ids):
            raise InputError("user vectors", f"there are {len(user_vectors)} for {len(data.user_ids)} users", "Give one row for each user")
        if item_vectors is not None and item_vectors.shape[1] != user_vectors.shape[2]:
            widths = f"item vectors have width {item_vectors.shape[1]}, user vectors {user_vectors.shape[2]}"
            raise InputError("item and user vectors", widths, "Encode both with the same encoder")
        lacking = user_vectors.isnan().flatten(1).any(1) & (train_users | validation_users)
        if lacking.any():
            cause = f"has no text vector, nor have {int(lacking.sum()) - 1} others who are learned from or choose the epoch"
            raise InputError(f"user {data.user_ids[int(lacking.int().argmax())]}", cause, "Give a text for each of them")
    if (train_users & validation_users).any():
        raise InputError("users", "some are in both the training and the validation mask", "Choose the epoch on other users")
    labels = data.labels[data.lists_of(validation_users)]
    if not len(_training_lists(config, data, train_users)) or not labels.any():
        raise InputError("lists", "no training lists, or no validation list with a positive", "Use more users or longer histories")
