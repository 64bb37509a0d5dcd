"""A fitted re-ranker for production: weights and settings as this package reads them, and a program that needs neither it nor the run."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.files import read_json, write_json, write_parquet
from dpo4rec.recommenders.lists import RankingData, RankingFiles
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.served import Inputs, ServedReranker, check_program, write_program

CHECKED = 64
"""Lists of the run that the program's scores are compared on."""
NAMES = ("candidates", "user_vectors", "history", "ratings")


def write_reranker(fitted: Path, data_folder: Path, item_vectors: Path, out: Path) -> dict[str, Any]:
    """Writes `model.safetensors`, `recommender.json`, `items.parquet` (item_id and code of each item) and `program.pt2` into a folder.

    Args:
        fitted: folder of a model for the run's frozen lists that reads user texts.
        data_folder: what it was fitted on.
        item_vectors: the items' text vectors (safetensors).
        out: the folder.

    Returns:
        The largest difference between the scores of the program, read back, and the model's.

    Raises:
        RuntimeError: the difference is above `TOLERANCE`.
    """
    source, model = RankingFiles(data_folder), Reranker.load(fitted)
    data = source.read()
    model.bind(data, files.read_tensors(item_vectors)["item_vectors"] if model.config.item_text else None)
    mean, deviation = source.rating_scale
    served = ServedReranker(model, mean, deviation).eval()
    users = data.list_users[:CHECKED]
    example = _example(model, data, users, mean, deviation)
    program = write_program(served, example, out / "program.pt2")
    with torch.no_grad():
        expected = [(example, model(*example[:1], users, example[1])), *((given, served(*given)) for given in _smaller(example))]
    worst = check_program(program, expected)
    shutil.copy(fitted / "model.safetensors", out / "model.safetensors")
    inputs = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in zip(NAMES, example, strict=False)}
    write_json({**read_json(fitted / "recommender.json"), "inputs": inputs, "longest_list": served.longest}, out / "recommender.json")
    write_parquet(pa.table({"item_id": data.item_ids, "code": list(range(1, len(data.item_ids) + 1))}), out / "items.parquet")
    return {"fitted": fitted.name, "largest_difference": worst}


def _example(model: Reranker, data: RankingData, users: Tensor, mean: Tensor, deviation: Tensor) -> Inputs:
    """The program's inputs for the first lists of the data, with made-up text vectors."""
    vectors = torch.randn(len(users), model.sizes.text_dim, generator=torch.Generator().manual_seed(0))
    inputs = (data.candidates[: len(users)], vectors)
    if not model.config.reads_history:
        return inputs
    ratings = data.history_ratings[users] * deviation + mean if deviation.isfinite() else torch.ones(data.histories[users].shape)
    return *inputs, data.histories[users], ratings


def _smaller(example: Inputs) -> list[Inputs]:
    """Fewer lists, candidates and history items than the program was made with."""
    lists, length = example[0].shape
    smaller = []
    for rows, candidates in ((1, length), (2, max(1, length // 2)), (lists - 1, 1)):
        histories = (tensor[:rows, : max(1, tensor.shape[1] // 3)] for tensor in example[2:])
        smaller.append((example[0][:rows, :candidates], example[1][:rows], *histories))
    return smaller
