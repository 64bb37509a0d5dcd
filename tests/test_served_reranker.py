"""Exported re-rankers: the scores are the model's, also for fewer or more lists, candidates and history items than they were made with."""

import zipfile
from pathlib import Path

import pytest
import torch
from recommender_data import text_vectors, write_data

from dpo4rec.files import read_json, write_tensors
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.exported import write_reranker
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker, Sizes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    write_tensors({"item_vectors": text_vectors()[0]}, folder / "item_vectors.safetensors")
    return folder


@pytest.mark.parametrize(("kind", "signal"), [("prm", "history+text"), ("dlcm", "history+text"), ("setrank", "text")])
def test_the_program_scores_as_the_model(data: Path, tmp_path: Path, kind: str, signal: str) -> None:
    torch.manual_seed(0)
    tables = RankingData.load(data)
    config = RecommenderConfig(model=kind, user_signal=signal, embedding_dim=8, hidden_dim=16, expert_hidden_dim=16)
    model = Reranker(config, Sizes.of(tables, 8)).bind(tables, text_vectors()[0]).eval()
    model.items.warm[5::2] = 0  # as of items that no training user has
    model.save(tmp_path / "fitted")
    report = write_reranker(tmp_path / "fitted", data, data / "item_vectors.safetensors", tmp_path)
    assert report["largest_difference"] <= 1e-5
    program = torch.export.load(tmp_path / "program.pt2").module()
    reads_history = "history" in signal
    for lists, length in ((1, 10), (5, 4), (200, 10)):
        users = tables.list_users[:lists]
        vectors = torch.randn(lists, 8)
        raw = torch.where(tables.history_ratings[users] > 0, 5.0, 1.0)  # what the data was made with
        more = (tables.histories[users], raw) if reads_history else ()
        with torch.no_grad():
            expected = model(tables.candidates[:lists, :length], users, vectors)
            found = program(tables.candidates[:lists, :length], vectors, *more)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    named = read_json(tmp_path / "recommender.json")
    assert list(named["inputs"]) == ["candidates", "user_vectors", *(["history", "ratings"] if reads_history else [])]
    assert named["longest_list"] == (4096 if kind == "setrank" else 10)
    with zipfile.ZipFile(tmp_path / "program.pt2") as archive:  # nothing pickled, no histories of users
        assert archive.read("program/data/sample_inputs/model.pt") == b""
    shapes = [tuple(tensor.shape) for tensor in torch.export.load(tmp_path / "program.pt2").state_dict.values()]
    assert tuple(tables.histories.shape) not in shapes
