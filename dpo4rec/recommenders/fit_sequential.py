"""Fitting a model of the next item on the training parts of all sequences, choosing the epoch on the validation targets."""

import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo4rec import files
from dpo4rec.errors import InputError
from dpo4rec.evaluation.metrics import accuracy
from dpo4rec.files import stable_seed
from dpo4rec.recommenders.losses import cross_entropy, generalised_bce, sampled_softmax
from dpo4rec.recommenders.retrieval import hits_of, retrieve
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialConfig, SequentialRecommender

SELECTION_METRIC = "ndcg@10"


class SequentialFit:
    """One fit, epoch by epoch; what it needs to go on after an interruption is in a folder.

    Args:
        item_vectors: text vectors [I, D] in the order of `data.item_ids`; None without `item_text`.
        user_vectors: text vectors [U, S, D], of which every epoch draws one a user, NaN without a text; None without `user_text`.
        seed: of weights, order, dropout and negatives.
        checkpoint: folder of the state after the last whole epoch; a fit that finds one there continues it.

    Raises:
        InputError: vectors do not fit configuration or data, a user who is learned from or chooses the epoch has none (NaN), or nobody has
            anything to learn from.
    """

    def __init__(
        self,
        model: Literal["sasrec", "gru4rec"],
        config: SequentialConfig,
        data: SequenceData,
        item_vectors: Tensor | None,
        user_vectors: Tensor | None,
        seed: int,
        checkpoint: Path,
    ) -> None:
        _check(config, data, user_vectors)
        self.config, self.data, self.user_vectors, self.seed, self.checkpoint = config, data, user_vectors, seed, checkpoint
        self.window = config.max_length + 1  # items learned from at once: the most that the model reads, and what follows them
        self.learners = (data.train_ends - data.starts[:-1] > 0).nonzero().squeeze(1)
        vectors = item_vectors if item_vectors is not None else user_vectors
        with torch.random.fork_rng(devices=[]):  # initial weights draw from the global generator
            torch.manual_seed(stable_seed("sequential", seed))
            self.model = SequentialRecommender.made_for(model, config, data, item_vectors, 0 if vectors is None else vectors.shape[-1])
        self._measure_texts(item_vectors)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        if (checkpoint / "state.json").exists():
            self._restore()

    def run(self) -> tuple[SequentialRecommender, dict[str, Any]]:
        """Fits to the end; returns the model of the best epoch and the report: history by epoch (from 1), chosen epoch, seconds."""
        while len(self.history) < self.config.epochs and len(self.history) - self.chosen_epoch < self.config.patience:
            started = time.perf_counter()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stable_seed("epoch", self.seed, len(self.history)))  # a resumed fit draws the same
                loss = self._epoch(len(self.history))
            learned = time.perf_counter()
            score = self.validation_score()
            times = {"seconds": learned - started, "evaluation_seconds": time.perf_counter() - learned}
            self.history.append({"loss": loss, SELECTION_METRIC: score, **times})
            if self.chosen_epoch == len(self.history):
                self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self._save()
        self.model.load_state_dict(self.best)
        seconds = sum(epoch["seconds"] + epoch["evaluation_seconds"] for epoch in self.history)
        return self.model.eval(), {"history": self.history, "chosen_epoch": self.chosen_epoch, "seconds": seconds}

    @property
    def chosen_epoch(self) -> int:
        """The first of the best epochs, from 1; 0 before the first."""
        scores = [epoch[SELECTION_METRIC] for epoch in self.history]
        return 1 + scores.index(max(scores)) if scores else 0

    def validation_score(self) -> float:
        """Mean NDCG@10 over the users with a validation target, on the whole catalogue."""
        first, last = self.data.target_range("validation")
        users = (last > first).nonzero().squeeze(1)
        vectors = None if self.user_vectors is None else self.user_vectors[users, 0]
        found = retrieve(self.model, self.data, users, self.data.train_ends[users], 10, vectors)
        hits, relevant = hits_of(found.items, self.data, users, "validation")
        return float(accuracy(hits, relevant, [10])[SELECTION_METRIC].mean())

    def _epoch(self, epoch: int) -> float:
        """One pass over all training parts; the mean loss of a prediction in nats."""
        self.model.train()
        batches = self._batches()
        total, predictions = 0.0, 0
        for number, users in enumerate(batches):
            self._set_rate(epoch + number / len(batches))
            sequences = self.data.windows(users, self._window_ends(users), self.window)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self._loss(sequences, users)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            count = int((sequences > 0).sum())
            total, predictions = total + loss.item() * count, predictions + count
        return total / predictions

    def _window_ends(self, users: Tensor) -> Tensor:
        """Where to cut the training part of each user [B]: one that is longer than a window is learned in random ones."""
        starts, ends = self.data.starts[users], self.data.train_ends[users]
        spare = (ends - starts - self.window).clamp(min=0)
        return ends - (torch.rand(len(users)) * (spare + 1)).long().minimum(spare)

    def _loss(self, sequences: Tensor, users: Tensor) -> Tensor:
        matrix = self.model.item_matrix()
        vectors = None
        if self.user_vectors is not None:
            vectors = self.user_vectors[users, torch.randint(self.user_vectors.shape[1], users.shape)]
        if self.config.loss != "cross-entropy":
            return self._sampled_loss(matrix, sequences, vectors)
        hidden = self.model(matrix, sequences[:, :-1], vectors)[sequences > 0]
        return cross_entropy(*self._cast(hidden, matrix[1:]), sequences[sequences > 0] - 1)

    def _sampled_loss(self, matrix: Tensor, sequences: Tensor, vectors: Tensor | None) -> Tensor:
        """Only the vectors of the batch's items take part, so that no gradient as large as a huge catalogue is made more than once."""
        catalogue = len(matrix) - 1
        negatives = 1 + torch.randint(catalogue, (min(self.config.negatives or 1000, catalogue - 1),))
        codes, places = torch.cat([sequences.flatten(), negatives]).unique(return_inverse=True)
        rows, at = F.embedding(codes, matrix), places[: sequences.numel()].view_as(sequences)
        hidden, items = self._cast(self.model(rows, at[:, :-1], vectors)[sequences > 0], rows)
        targets, others = at[sequences > 0], places[sequences.numel() :]
        if self.config.loss == "sampled-softmax":
            return sampled_softmax(hidden, items, targets, others)
        calibration = 0.75 if self.config.calibration is None else self.config.calibration
        return generalised_bce(hidden, items, targets, others, catalogue, calibration)

    def _cast(self, hidden: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return (hidden.bfloat16(), items.bfloat16()) if self.config.precision == "bf16" else (hidden, items)

    def _batches(self) -> list[Tensor]:
        """Users in batches of similar lengths, so that little is padding, in random order."""
        sizes = (self.data.train_ends - self.data.starts[:-1])[self.learners].clamp(max=self.window)
        order = torch.argsort(sizes + 0.2 * self.window * torch.rand(len(sizes)))  # not always the same neighbours
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0
        for place in order.tolist():
            longest = max(longest, int(sizes[place]))
            if batch and longest * (len(batch) + 1) > self.config.tokens_per_step:
                batches.append(batch)
                batch, longest = [], int(sizes[place])
            batch.append(place)
        batches.append(batch)
        return [self.learners[torch.tensor(batches[i])] for i in torch.randperm(len(batches)).tolist()]

    def _set_rate(self, epochs: float) -> None:
        """Rises over the first epoch, then falls linearly to nothing at the last."""
        share = epochs if epochs < 1 else 1 - (epochs - 1) / max(1, self.config.epochs - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share

    def _measure_texts(self, item_vectors: Tensor | None) -> None:
        if self.model.item_side is not None and item_vectors is not None:
            self.model.item_side.standardise.measure(item_vectors)
        if self.model.user_side is not None and self.user_vectors is not None:
            self.model.user_side.standardise.measure(self.user_vectors[self.learners].flatten(0, 1))

    def _save(self) -> None:
        moments = {f"{i}.{name}": value for i, of in self.optimizer.state_dict()["state"].items() for name, value in of.items()}
        with files.atomic(self.checkpoint) as partial:
            files.write_tensors(self.model.state_dict(), partial / "model.safetensors")
            files.write_tensors(self.best, partial / "best.safetensors")
            files.write_tensors(moments, partial / "optimizer.safetensors")
            files.write_json(self.history, partial / "state.json")

    def _restore(self) -> None:
        self.history = files.read_json(self.checkpoint / "state.json")
        self.best = files.read_tensors(self.checkpoint / "best.safetensors")
        self.model.load_state_dict(files.read_tensors(self.checkpoint / "model.safetensors"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in files.read_tensors(self.checkpoint / "optimizer.safetensors").items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def bf16_products() -> bool:
    """Whether this processor multiplies matrices in bf16, and not number by number."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT")


def _check(config: SequentialConfig, data: SequenceData, user_vectors: Tensor | None) -> None:
    if (user_vectors is not None) != config.user_text:
        given = "absent" if user_vectors is None else "given"
        raise InputError("sequential.user_text", f"it is {config.user_text} but user vectors are {given}", "Make them agree")
    if config.precision == "bf16" and not bf16_products():
        warnings.warn("sequential.precision=bf16: this processor has no such products, they take fifty times as long as fp32", stacklevel=2)
    if user_vectors is not None:
        if len(user_vectors) != len(data.user_ids):
            raise InputError("user vectors", f"there are {len(user_vectors)} for {len(data.user_ids)} users", "Give one row for each user")
        lacking = user_vectors.isnan().flatten(1).any(1) & (data.validation_ends > data.starts[:-1])  # evaluation asks for the others'
        if lacking.any():
            raise InputError(f"user {data.user_ids[int(lacking.int().argmax())]}", "has no text vector", "Add its text to --texts")
    if not (data.train_ends > data.starts[:-1]).any():
        raise InputError("sequences", "nobody has anything to learn from", "Give longer histories, or another sequences.split")
