"""A small data folder in the contract's layout whose labels follow from the users' favourite genre, for tests of the re-rankers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec.files import write_json, write_parquet

GENRES = ["Comedy", "Crime", "Drama", "Horror", "War"]


def write_data(
    folder: Path, users: int = 150, items: int = 60, lists_per_user: int = 6, list_length: int = 10, ranked: bool | None = None
) -> None:
    """A user likes the items of one genre, u mod 5, and rates 5 in history what it likes and 1 what it does not.

    Without `ranked` the candidates' order is random; else what is liked tends to the front, and `summary.json` says so or denies it.
    """
    generator = np.random.default_rng(0)
    genre_of = [i % 5 for i in range(items)]
    ids = [f"i{i}" for i in range(items)]
    histories, lists = [], []
    for user in range(users):
        history = generator.permutation(items)[:10]
        histories.append((f"u{user}", [ids[i] for i in history], [5.0 if genre_of[i] == user % 5 else 1.0 for i in history]))
        for _ in range(lists_per_user):
            candidates = generator.permutation(items)[:list_length]
            if ranked is not None:
                liked = np.array([genre_of[i] == user % 5 for i in candidates])
                candidates = candidates[np.argsort(generator.random(list_length) - liked * 0.8)]
            labels = [int(genre_of[i] == user % 5) for i in candidates]
            lists.append((len(lists), f"u{user}", [ids[i] for i in candidates], labels))
    if ranked is not None:
        write_json({"ranked": ranked}, folder / "summary.json")
    splits = ["train" if u < 0.7 * users else "validation" if u < 0.85 * users else "test" for u in range(users)]
    years = pa.array([None if i == 0 else 1950 + i for i in range(items)], pa.int32())
    columns = {"item_id": ids, "title": ids, "genres": [[GENRES[g]] for g in genre_of], "year": years, "people": [[]] * items, "text": ids}
    write_parquet(pa.table(columns), folder / "items.parquet")
    user_ids = [f"u{u}" for u in range(users)]
    write_parquet(pa.table({"user_id": user_ids, "profile": [""] * users, "split": splits}), folder / "users.parquet")
    names = ["user_id", "item_ids", "ratings"]
    types = [pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())]
    write_parquet(_table(histories, names, types), folder / "histories.parquet")
    names = ["list_id", "user_id", "candidates", "labels"]
    types = [pa.int64(), pa.string(), pa.list_(pa.string()), pa.list_(pa.int8())]
    write_parquet(_table(lists, names, types), folder / "lists.parquet")


def _table(rows: list[tuple], names: list[str], types: list[pa.DataType]) -> pa.Table:
    return pa.table([pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)], names=names)


def text_vectors(users: int = 150, items: int = 60, samples: int = 2) -> tuple[Tensor, Tensor]:
    """Item vectors [I, 8] and user vectors [U, S, 8] in one space: the genre, and noise."""
    generator = torch.Generator().manual_seed(0)
    genre = torch.eye(8)
    item_vectors = genre[torch.arange(items) % 5] + 0.1 * torch.randn(items, 8, generator=generator)
    user_vectors = genre[torch.arange(users) % 5][:, None] + 0.1 * torch.randn(users, samples, 8, generator=generator)
    return item_vectors, user_vectors
