"""A fitted re-ranker as a program of its own: plain tensors in, scores out, without this package or the run's data behind it.

B lists of K candidates, B histories of H items, text vectors of width D. The program is a `torch.export` archive (`.pt2`).
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.rerankers import DLCM

TOLERANCE = 1e-5
"""How far the program's scores may be from the model's."""
LONGEST = 4096
"""Candidates and history items of a list, at most; PRM and DLCM take as many candidates as the lists had that they were fitted on."""
Inputs = tuple[Tensor, ...]


class ServedReranker(nn.Module):
    """Scores lists of any users: what `Reranker` looks up of its run's users, this one is given.

    Args:
        model: bound and fitted on unranked lists.
        mean, deviation: of the ratings of the training users' histories, as `rating_scale` gives them.
    """

    genres: Tensor
    eras: Tensor
    item_vectors: Tensor | None
    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Reranker, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.items, self.history, self.adaptor = model.items, model.history, model.adaptor
        self.longest = LONGEST if model.config.model == "setrank" else model.sizes.list_length
        self.backbone = PaddedDLCM(model.backbone, self.longest) if isinstance(model.backbone, DLCM) else model.backbone
        tables = {"genres": model.genres, "eras": model.eras, "item_vectors": model.item_vectors, "mean": mean, "deviation": deviation}
        for name, tensor in tables.items():  # of items alone: no user's history is in the program
            self.register_buffer(name, tensor)

    def forward(self, candidates: Tensor, user_vectors: Tensor, history: Tensor | None = None, ratings: Tensor | None = None) -> Tensor:
        """Scores [B, K].

        Args:
            candidates: item codes [B, K].
            user_vectors: text vectors [B, D].
            history: item codes [B, H], oldest first, padded with 0 at the end; None where the model reads no history.
            ratings: as the data has them [B, H].
        """
        items, places = self._items(candidates)
        features = [items]
        if self.history is not None and history is not None and ratings is not None:
            present = history > 0
            rated = ((ratings - self.mean) / self.deviation).masked_fill(~present, 0)
            memory, memory_places = self._items(history)
            features.append(self.history(items, memory.flatten(0, 1), memory_places, rated, present))
        if self.adaptor is not None:
            item_vectors = None if self.item_vectors is None else self.item_vectors[candidates.flatten()]
            features.append(self.adaptor(item_vectors, places, user_vectors))
        return self.backbone(torch.cat(features, -1))

    def _items(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, K, width] of items, and the number of each among all of the batch [B, K]."""
        flat = codes.flatten()
        features = self.items(flat, self.genres[flat], self.eras[flat])
        return features.unflatten(0, codes.shape), torch.arange(codes.shape[0] * codes.shape[1]).view(codes.shape)


class PaddedDLCM(nn.Module):
    """DLCM with lists filled up to one length, the only way to trace a GRU over lists of any length: what comes behind changes nothing."""

    def __init__(self, dlcm: DLCM, longest: int) -> None:
        super().__init__()
        self.dlcm, self.longest = dlcm, longest

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dlcm.inputs(features)
        length = hidden.shape[1]
        states = self.dlcm.context(F.pad(hidden, (0, 0, 0, self.longest - length)))[0][:, :length]
        return self.dlcm.head(torch.cat([hidden, states, states[:, -1:].expand_as(states)], -1)).squeeze(-1)


def write_program(model: ServedReranker, example: Inputs, path: Path) -> ExportedProgram:
    """Writes the program, with any number of lists, candidates and history items, and returns it as it reads back.

    Args:
        example: arguments of `forward`; two or more lists, candidates and history items.
    """
    lists, length, history = Dim("lists", min=1), Dim("candidates", min=1, max=model.longest), Dim("history", min=1, max=LONGEST)
    shapes: list[dict[int, Dim]] = [{0: lists, 1: length}, {0: lists}, {0: lists, 1: history}, {0: lists, 1: history}]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights")  # what a GRU keeps of its weights, put back after
        program = torch.export.export(model.eval(), example, dynamic_shapes=tuple(shapes[: len(example)]))
    program.example_inputs = None  # they would be pickled into the archive
    torch.export.save(program, path)
    return torch.export.load(path)


def check_program(program: ExportedProgram, expected: list[tuple[Inputs, Tensor]]) -> float:
    """The largest difference between the program's scores and those expected.

    Args:
        expected: arguments of the program, and the scores of them.

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    run = program.module()
    with torch.no_grad():
        worst = max(float((run(*given) - scores).abs().max()) for given, scores in expected)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"the exported re-ranker's scores are off by {worst:g}, more than {TOLERANCE:g}")
    return worst
