"""The rankings of fitted recommenders and of their controls, one protocol at a time.

M topics (users, or lists of users) with K ranked items each.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.data.retrieved import CANDIDATES
from dpo4rec.errors import InputError
from dpo4rec.evaluation.trec import rankings_of, write_qrels, write_run
from dpo4rec.fits import FitFolder
from dpo4rec.recommenders.fitter import user_vectors_of
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.retrieval import hits_of, retrieve
from dpo4rec.recommenders.scoring import logits_of
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialConfig, SequentialRecommender
from dpo4rec.recommenders.sequential_fitter import text_vectors

DEPTH = 100  # ranks of the whole catalogue that a TREC run has


@dataclass(frozen=True)
class Ranking:
    """What one model ranked, best first: item codes, scores and hits [M, K]; the scores of empty places (code 0) are -inf."""

    items: Tensor
    scores: Tensor
    hits: Tensor


class Catalogue:
    """Test targets of sequences, ranked against the whole catalogue."""

    cutoffs = (1, 5, 10, 20, 50)

    def __init__(self, folder: Path, depth: int = DEPTH) -> None:
        """`depth` is how many ranks are kept."""
        self.depth = depth
        self.data = SequenceData.load(folder)
        first, last = self.data.target_range("test")
        self.users = (last > first).nonzero().squeeze(1)
        self.relevant = (last - first)[self.users]
        self.topics = [self.data.user_ids[user] for user in self.users.tolist()]
        self.item_ids, self.hash, self.popularity = self.data.item_ids, self.data.candidates_hash, self.data.popularity
        self.histories = self.data.windows(self.users, self.data.validation_ends[self.users], 200)
        self.learners = int((self.data.train_ends > self.data.starts[:-1]).sum())

    def relevant_items(self, topic: int) -> list[str]:
        """The ids of what a topic's user touched in the test part."""
        user = int(self.users[topic])
        codes = self.data.codes[self.data.validation_ends[user] : self.data.starts[user + 1]]
        return [self.item_ids[code - 1] for code in dict.fromkeys(codes.tolist())]

    def rankings(self, fit: FitFolder) -> Iterator[Ranking]:
        """One for each seed and text."""
        items, users = text_vectors(fit.texts, _sequential(fit), self.data.user_ids)
        for seed in fit.seeds():
            model = SequentialRecommender.load(seed).bind(self.data, items)
            for text in range(1 if users is None else users.shape[1]):
                vectors = None if users is None else _present(users[self.users, text], self.topics, fit)
                found = retrieve(model, self.data, self.users, self.data.validation_ends[self.users], self.depth, vectors)
                yield self._judged(found.items, found.scores)

    def controls(self) -> Iterator[tuple[str, Ranking]]:
        """Items by their popularity in training, without those that the user touched."""
        parts = []
        for rows in torch.arange(len(self.users)).split(256):
            ends = self.data.validation_ends[self.users[rows]]
            longest = int((ends - self.data.starts[self.users[rows]]).max())
            scores = self.popularity.float().expand(len(rows), -1).clone()
            scores.scatter_(1, self.data.windows(self.users[rows], ends, longest), -torch.inf)  # padding empties place 0, which is none
            scores[:, 0] = -torch.inf
            parts.append(scores.topk(min(self.depth, len(self.item_ids))))
        yield "popularity", self._judged(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))

    def _judged(self, items: Tensor, scores: Tensor) -> Ranking:
        items = items.masked_fill(scores == -torch.inf, 0)
        return Ranking(items, scores, hits_of(items, self.data, self.users, "test")[0])


class Lists:
    """Re-ranking lists of the test users: frozen ones, or those of a retriever."""

    cutoffs = (1, 3, 5, 7, 10)

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        """`without` are users who are left out."""
        self.data = data = RankingData.load(folder).without(set(without))
        summary = files.read_json(folder / "summary.json")
        self.lists = data.lists_of(data.users_of("test"))
        self.owners = data.list_users[self.lists]
        self.relevant = data.labels[self.lists].sum(1).long()
        self.targets: dict[str, str] = {}
        if data.ranked:  # the target exists, whether or not it was retrieved
            self.relevant = self.relevant.clamp(min=1)
            self.targets = dict(zip(*files.read_parquet(folder / "targets.parquet").to_pydict().values(), strict=True))
        places = _place_among_own(self.owners)
        self.topics = [f"{data.user_ids[user]}#{place}" for user, place in zip(self.owners.tolist(), places, strict=True)]
        self.users, self.item_ids, self.hash, self.popularity = self.owners, data.item_ids, summary["lists_hash"], data.popularity
        self.histories = data.histories[self.owners]
        self.learners = int(data.users_of("train").sum())

    def relevant_items(self, topic: int) -> list[str]:
        """The ids of a list's positives, or, where a retriever made it, of the user's target, which may stand outside the list."""
        row = self.lists[topic]
        if self.targets:
            return [self.targets[self.data.user_ids[self.owners[topic]]]]
        return [self.item_ids[code - 1] for code in self.data.candidates[row][self.data.labels[row] > 0].tolist()]

    def rankings(self, fit: FitFolder) -> Iterator[Ranking]:
        """One for each seed and text."""
        users = user_vectors_of([fit.user_texts], self.data.user_ids) if fit.user_texts else None
        items = files.read_tensors(fit.item_texts)["item_vectors"] if fit.item_texts else None
        for seed in fit.seeds():
            model = Reranker.load(seed).bind(self.data, items)
            for text in range(1 if users is None else users.shape[1]):
                vectors = None if users is None else _present(users[self.owners, text], self.topics, fit)
                yield self.ranked(logits_of(model, self.data, self.lists, vectors))

    def controls(self) -> Iterator[tuple[str, Ranking]]:
        """The order of the lists where a retriever made it, popularity in the training users' histories, and chance."""
        candidates = self.data.candidates[self.lists]
        if self.data.ranked:
            yield "retriever's order", self.ranked(-torch.arange(candidates.shape[1]).float().expand(candidates.shape))
        yield "popularity", self.ranked(self.popularity[candidates].float())
        yield "random", self.ranked(torch.rand(candidates.shape, generator=torch.Generator().manual_seed(0)))

    def ranked(self, scores: Tensor) -> Ranking:
        """The lists by falling scores [M, K]."""
        order = scores.argsort(dim=1, descending=True, stable=True)
        items, labels = self.data.candidates[self.lists], self.data.labels[self.lists]
        return Ranking(items.gather(1, order), scores.gather(1, order), labels.gather(1, order) > 0)


def write_judgements(source: Catalogue | Lists, folder: Path) -> None:
    """`qrels` of the topics."""
    write_qrels(((topic, source.relevant_items(place)) for place, topic in enumerate(source.topics)), folder / "qrels")


def write_ranking(source: Catalogue | Lists, name: str, ranking: Ranking, folder: Path) -> None:
    """A TREC run of what `name` ranked; its file and tag are the name with "-" for what is no letter, digit, ".", "+" or "-"."""
    tag = re.sub(r"[^\w.+-]+", "-", name.replace("'", ""))
    write_run(rankings_of(source.topics, source.item_ids, ranking.items, ranking.scores), folder / f"{tag}.run", tag)


def candidates_of(retriever: FitFolder, sequences: Path, length: int) -> pa.Table:
    """The best `length` items of each user with one test target by the first seed of a model of the next item, schema `CANDIDATES`."""
    data = SequenceData.load(sequences)
    first, last = data.target_range("test")
    users = (last - first == 1).nonzero().squeeze(1)
    items, texts = text_vectors(retriever.texts, _sequential(retriever), data.user_ids)
    model = SequentialRecommender.load(retriever.seeds()[0]).bind(data, items)
    names = [data.user_ids[user] for user in users.tolist()]
    vectors = None if texts is None else _present(texts[users, 0], names, retriever)
    found = retrieve(model, data, users, first[users], length, vectors)
    lists = [[data.item_ids[code - 1] for code in row if code] for row in found.items.tolist()]
    return pa.table([names, lists, range(1, len(names) + 1)], schema=CANDIDATES)


def _sequential(fit: FitFolder) -> SequentialConfig:
    if fit.options.sequential is None:
        raise InputError(str(fit.path), f"{fit.options.model} does not rank the whole catalogue", "Name a model of the next item")
    return fit.options.sequential


def _present(vectors: Tensor, topics: list[str], fit: FitFolder) -> Tensor:
    lacking = vectors.isnan().any(1)
    if lacking.any():
        user = topics[int(lacking.int().argmax())]
        raise InputError(f"user {user}", f"{fit.options.name} reads user texts, and there is none", "Add it to --texts and fit again")
    return vectors


def _place_among_own(owners: Tensor) -> list[int]:
    """The number of each list among its user's, from 0."""
    seen: dict[int, int] = {}
    places = []
    for owner in owners.tolist():
        places.append(seen.get(owner, 0))
        seen[owner] = places[-1] + 1
    return places
