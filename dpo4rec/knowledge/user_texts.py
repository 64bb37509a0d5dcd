"""Users' texts from files, and their vectors beside the items': what a recommender that is fitted alone reads."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo4rec import files
from dpo4rec.data.lines import Record, each_record
from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet
from dpo4rec.knowledge.encoders import Encoder, EncoderWorkerConfig, TfidfEncoder


def read_user_texts(paths: list[Path]) -> pa.Table:
    """Table user_id, sample, text of all files together: Parquet (or a folder of such) or JSON-lines with `user_id` and `text`.

    A user may have several texts, numbered from 0; all get as many as the one with the most by repeating their own in turn, so that
    every user's texts are as many.

    Raises:
        InputError: a file cannot be read or lacks a column, or naming line or row (of a folder counted over its files), it lacks a text.
    """
    texts: dict[str, list[str]] = {}
    for path in paths:
        if path.suffix in (".jsonl", ".json", ".gz"):
            each_record(path, lambda record: _add(record, texts))
            continue
        if path.suffix == ".csv":
            raise InputError(str(path), "texts cannot be read from CSV", "Give Parquet, or JSON-lines (.jsonl, .json, .gz)")
        table = read_parquet(path)
        for column in ("user_id", "text"):
            if column not in table.column_names:
                raise InputError(str(path), f"there is no column {column!r}", f"It has {', '.join(table.column_names)}")
        for row, record in enumerate(table.select(["user_id", "text"]).to_pylist(), start=1):
            try:
                _add(record, texts)
            except ValueError as error:
                raise InputError(f"{path}, row {row}", str(error), "Correct the row, or leave it out") from error
    most = max((len(of) for of in texts.values()), default=0)
    rows = [(user, sample, of[sample % len(of)]) for user, of in texts.items() for sample in range(most)]
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    return pa.table(dict(zip(("user_id", "sample", "text"), columns, strict=True)))


def encode_texts(config: EncoderWorkerConfig, items: pa.Table, user_texts: pa.Table | None, learners: list[str]) -> dict[str, Any]:
    """Writes into `config.folder`: `item_vectors.safetensors`, `users/vectors.parquet` (with user texts), and a fitted TF-IDF.

    Args:
        items: with the column text; vectors keep its order.
        user_texts: columns user_id, sample, text.
        learners: users whose texts TF-IDF may learn its words from.

    Returns:
        How many dimensions the vectors have, and how many texts were longer than the encoder reads.
    """
    folder, of_items = Path(config.folder), items["text"].to_pylist()
    if config.encoder.kind == "tfidf":
        known = set(learners)
        pairs = [] if user_texts is None else zip(user_texts["user_id"].to_pylist(), user_texts["text"].to_pylist(), strict=True)
        TfidfEncoder.fit(of_items + [text for user, text in pairs if user in known], config.encoder.dimensions, folder)
    encode = Encoder(config)
    vectors = encode(items.select(["item_id", "text"]))
    files.write_tensors({"item_vectors": files.matrix(vectors["vector"])}, folder / "item_vectors.safetensors")
    report = {"dimensions": vectors["vector"].type.list_size, "cut_item_texts": sum(vectors["cut"].to_pylist())}
    if user_texts is not None:
        of_users = encode(user_texts)
        files.write_parquet(of_users, folder / "users" / "vectors.parquet")
        report["cut_user_texts"] = sum(of_users["cut"].to_pylist())
    return report


def _add(record: Record, texts: dict[str, list[str]]) -> None:
    user, text = record["user_id"], record["text"]
    if not isinstance(user, str | int) or not isinstance(text, str):
        raise ValueError(f"user_id {user!r} or text {str(text)[:60]!r} is not a text")
    texts.setdefault(str(user), []).append(text)
