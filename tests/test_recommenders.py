"""The re-rankers through their public doors: loading, fitting, scoring, saving."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from recommender_data import text_vectors, write_data

from dpo4rec.config import resolve
from dpo4rec.data.config import DataConfig
from dpo4rec.data.prepare import prepare
from dpo4rec.errors import InputError
from dpo4rec.evaluation.metrics import ndcg, per_user
from dpo4rec.files import read_parquet, read_tensors, write_parquet, write_tensors
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.fit import FitReport, fit
from dpo4rec.recommenders.lists import RankingData, RankingFiles
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.scoring import logits_of

ITEMS, USERS = text_vectors()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> RankingData:
    return RankingData.load(folder)


def small(**changes: object) -> RecommenderConfig:
    settings = {
        "embedding_dim": 8,
        "hidden_dim": 16,
        "expert_hidden_dim": 8,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "epochs": 6,
        "dropout": 0.1,
    }
    return RecommenderConfig(**(settings | changes))


def fitted(data: RankingData, config: RecommenderConfig, seed: int = 0) -> tuple[Reranker, FitReport]:
    items, users = (ITEMS if config.item_text else None), (USERS if config.reads_user_text else None)
    return fit(config, data, items, users, data.users_of("train"), data.users_of("validation"), seed)


def test_data_is_coded_as_in_the_files(data: RankingData, folder: Path) -> None:
    row = read_parquet(folder / "lists.parquet").slice(7, 1).to_pylist()[0]
    assert data.user_ids[data.list_users[7]] == row["user_id"]
    assert [data.item_ids[code - 1] for code in data.candidates[7]] == row["candidates"]
    assert data.labels[7].tolist() == row["labels"]
    history = read_parquet(folder / "histories.parquet").slice(3, 1).to_pylist()[0]
    assert [data.item_ids[code - 1] for code in data.histories[3]] == history["item_ids"]
    assert (data.history_ratings[3] > 0).tolist() == [rating > 3 for rating in history["ratings"]]
    assert data.popularity[0] == 0
    assert data.popularity.sum() == 10 * data.users_of("train").sum()
    assert data.eras[1] == 0  # its year is unknown
    torch.testing.assert_close(data.genres.sum(1), torch.tensor([0.0] + [1.0] * 60))


def test_splits_and_lists_of_users(data: RankingData) -> None:
    masks = torch.stack([data.users_of(split) for split in ("train", "validation", "test")])
    assert (masks.sum(0) == 1).all()
    lists = data.lists_of(data.users_of("test"))
    assert data.users_of("test")[data.list_users[lists]].all()
    assert len(lists) == 6 * data.users_of("test").sum()


def test_data_of_some_users_are_theirs_of_the_whole(data: RankingData, folder: Path) -> None:
    chosen = ["u130", "u3", "u4", "u90"]
    some = RankingFiles(folder).read(chosen)
    assert some.user_ids == ["u3", "u4", "u90", "u130"]  # as in the file
    rows = torch.tensor([data.user_ids.index(user) for user in some.user_ids])
    for name in ("user_splits", "histories", "history_ratings"):
        torch.testing.assert_close(getattr(some, name), getattr(data, name)[rows], rtol=0, atol=0)
    lists = torch.isin(data.list_users, rows).nonzero().squeeze(1)
    assert rows[some.list_users].tolist() == data.list_users[lists].tolist()
    assert torch.equal(some.candidates, data.candidates[lists])
    assert torch.equal(some.labels, data.labels[lists])
    bare = RankingFiles(folder, histories=False).read(chosen)
    assert bare.histories.shape == (4, 0)
    assert torch.equal(bare.candidates, some.candidates)


@pytest.mark.parametrize(
    ("file", "column", "named"), [("lists", "user_id", "user_id"), ("histories", "user_id", "user_id"), ("users", "split", "split")]
)
def test_unknown_names_in_files_are_input_errors(tmp_path: Path, file: str, column: str, named: str) -> None:
    write_data(tmp_path, users=20)
    table = read_parquet(tmp_path / f"{file}.parquet")
    values = table[column].to_pylist()
    write_parquet(table.set_column(table.schema.get_field_index(column), column, [[*values[:-1], "nobody"]]), tmp_path / f"{file}.parquet")
    with pytest.raises(InputError, match=f"{file}.parquet.*{named}.*'nobody'"):
        RankingData.load(tmp_path)


def test_lists_of_unequal_length_are_an_input_error(tmp_path: Path) -> None:
    write_data(tmp_path, users=20)
    table = read_parquet(tmp_path / "lists.parquet")
    labels = table["labels"].to_pylist()
    labels[0] = labels[0][:-1]
    write_parquet(table.set_column(3, "labels", [labels]), tmp_path / "lists.parquet")
    with pytest.raises(InputError, match="length"):
        RankingData.load(tmp_path)


@pytest.mark.parametrize("model", ["prm", "dlcm", "setrank"])
def test_every_backbone_learns_from_the_text(data: RankingData, model: str) -> None:
    test = data.lists_of(data.users_of("test"))
    reranker, report = fitted(data, small(model=model))
    own = logits_of(reranker, data, test, USERS[data.list_users[test], 0])
    others = logits_of(reranker, data, test, USERS[data.list_users[test] - 1, 0])
    assert ndcg(own, data.labels[test], 5).nanmean() > 0.9
    assert ndcg(others, data.labels[test], 5).nanmean() < 0.6
    assert report.validation_ndcg[report.chosen_epoch - 1] == max(report.validation_ndcg)
    assert report.train_losses[-1] < report.train_losses[0]


def test_history_personalises_and_no_signal_does_not(data: RankingData) -> None:
    test = data.lists_of(data.users_of("test"))
    quality = {}
    for signal in ("none", "history"):
        reranker, _ = fitted(data, small(user_signal=signal, item_text=False, epochs=12))
        quality[signal] = ndcg(logits_of(reranker, data, test, None), data.labels[test], 5).nanmean()
    assert quality["none"] < 0.6
    assert quality["history"] > quality["none"] + 0.15


def test_fit_depends_on_its_seed_alone(data: RankingData) -> None:
    torch.manual_seed(1)
    first, report = fitted(data, small(epochs=2))
    expected = torch.rand(1)  # fit leaves the global state alone
    torch.manual_seed(1)
    assert torch.rand(1) == expected
    second, again = fitted(data, small(epochs=2))
    other, _ = fitted(data, small(epochs=2), seed=1)
    assert (report.train_losses, report.validation_ndcg) == (again.train_losses, again.validation_ndcg)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.state_dict()["items.ids.weight"], other.state_dict()["items.ids.weight"])


@pytest.mark.parametrize("signal", ["none", "history", "text", "history+text"])
@pytest.mark.parametrize("item_text", [True, False])
def test_saved_and_loaded_model_scores_the_same(data: RankingData, tmp_path: Path, signal: str, item_text: bool) -> None:
    reranker, _ = fitted(data, small(user_signal=signal, item_text=item_text, epochs=1))
    reranker.save(tmp_path / "recommender")
    loaded = Reranker.load(tmp_path / "recommender").bind(data, ITEMS if item_text else None)
    lists = torch.arange(50)
    vectors = USERS[data.list_users[lists], 1] if reranker.config.reads_user_text else None
    assert torch.equal(logits_of(loaded, data, lists, vectors), logits_of(reranker, data, lists, vectors))


def test_a_row_scores_the_same_in_any_company(data: RankingData) -> None:
    reranker, _ = fitted(data, small(user_signal="history+text", epochs=1))
    lists = torch.randint(len(data.labels), (200,), generator=torch.Generator().manual_seed(0))
    vectors = USERS[data.list_users[lists], 0]
    together = logits_of(reranker, data, lists, vectors)
    torch.testing.assert_close(logits_of(reranker, data, lists, vectors, batch_candidates=70), together)
    torch.testing.assert_close(logits_of(reranker, data, lists.flip(0), vectors.flip(0)).flip(0), together)
    assert logits_of(reranker, data, lists[:0], vectors[:0]).shape == (0, 10)


@pytest.mark.parametrize("model", ["setrank", "mir", "prm", "dlcm"])
@pytest.mark.parametrize("ranked", [False, True])
def test_only_the_set_models_ignore_the_order_of_unranked_candidates(data: RankingData, model: str, ranked: bool) -> None:
    data = replace(data, ranked=ranked)
    reranker, _ = fitted(data, small(model=model, user_signal="history+text", epochs=1))
    users, order = data.list_users[:20], torch.randperm(10, generator=torch.Generator().manual_seed(0))
    before = reranker(data.candidates[:20], users, USERS[users, 0])[:, order]
    after = reranker(data.candidates[:20, order], users, USERS[users, 0])
    assert torch.allclose(after, before, atol=1e-5) == (model in ("setrank", "mir") and not ranked)


def test_mir_learns_from_the_history_and_more_from_a_text(data: RankingData) -> None:
    test = data.lists_of(data.users_of("test"))
    history, _ = fitted(data, small(model="mir", user_signal="history", item_text=False, epochs=8))
    both, _ = fitted(data, small(model="mir", user_signal="history+text"))
    none, _ = fitted(data, small(model="setrank", user_signal="none", item_text=False))
    others = replace(data, histories=data.histories.roll(1, 0), history_ratings=data.history_ratings.roll(1, 0))

    def quality(logits: torch.Tensor) -> float:
        return float(ndcg(logits, data.labels[test], 5).nanmean())

    assert quality(logits_of(history, data, test, None)) > quality(logits_of(none, data, test, None)) + 0.2
    assert quality(logits_of(history.bind(others, None), others, test, None)) < 0.6
    text = quality(logits_of(both, data, test, USERS[data.list_users[test], 0]))
    assert text > 0.9
    assert text > quality(logits_of(both, data, test, USERS[data.list_users[test] - 1, 0])) + 0.2


@pytest.mark.parametrize("signal", ["history", "history+text"])
def test_mir_takes_users_without_history_and_does_not_see_padding(data: RankingData, signal: str) -> None:
    histories = data.histories.clone()
    histories[::2] = 0
    histories[1::2, 6:] = 0
    data = replace(data, histories=histories, history_ratings=data.history_ratings.masked_fill(histories == 0, 0))
    reranker, _ = fitted(data, small(model="mir", user_signal=signal, epochs=1))
    lists = torch.arange(40)
    vectors = USERS[data.list_users[lists], 0] if "text" in signal else None
    logits = logits_of(reranker, data, lists, vectors)
    assert logits.isfinite().all()
    shorter = replace(data, histories=histories[:, :6], history_ratings=data.history_ratings[:, :6])
    torch.testing.assert_close(logits_of(reranker.bind(shorter, ITEMS), shorter, lists, vectors), logits)


@pytest.mark.parametrize("signal", ["none", "text"])
def test_mir_may_be_kept_from_the_history(data: RankingData, signal: str) -> None:
    reranker, _ = fitted(data, small(model="mir", user_signal=signal, epochs=1))
    lists = torch.arange(40)
    vectors = USERS[data.list_users[lists], 0] if "text" in signal else None
    before = logits_of(reranker, data, lists, vectors)
    others = replace(data, histories=data.histories.roll(1, 0), history_ratings=data.history_ratings.roll(1, 0))
    assert torch.equal(logits_of(reranker.bind(others, ITEMS), others, lists, vectors), before)


@pytest.mark.parametrize("model", ["prm", "dlcm", "setrank", "mir"])
def test_the_rank_of_the_first_stage_is_a_feature(tmp_path: Path, model: str) -> None:
    quality = {}
    for ranked in (True, False) if model in ("setrank", "mir") else (True,):  # the others see the order itself, whatever is said of it
        write_data(tmp_path, users=120, ranked=ranked)
        data = RankingData.load(tmp_path)
        reranker, _ = fitted(data, small(model=model, user_signal="none", item_text=False))
        test = data.lists_of(data.users_of("test"))
        quality[ranked] = ndcg(logits_of(reranker, data, test, None), data.labels[test], 5).nanmean()
    assert quality[True] > 0.75
    assert quality.get(False, 0) < 0.6


def test_ranked_and_unranked_lists_do_not_mix(data: RankingData, tmp_path: Path) -> None:
    for ranked in (True, False):
        reranker, _ = fitted(replace(data, ranked=ranked), small(model="mir", user_signal="history+text", epochs=1))
        reranker.save(tmp_path / "recommender")
        loaded = Reranker.load(tmp_path / "recommender").bind(replace(data, ranked=ranked), ITEMS)
        vectors = USERS[data.list_users[:20], 0]
        assert torch.equal(logits_of(loaded, data, torch.arange(20), vectors), logits_of(reranker, data, torch.arange(20), vectors))
        with pytest.raises(InputError, match="fitted on other items or lists"):
            loaded.bind(replace(data, ranked=not ranked), ITEMS)


def test_ranked_must_be_a_boolean_and_may_be_absent(tmp_path: Path) -> None:
    write_data(tmp_path, users=20)
    assert not RankingData.load(tmp_path).ranked
    (tmp_path / "summary.json").write_text('{"lists": 3}')
    assert not RankingData.load(tmp_path).ranked
    (tmp_path / "summary.json").write_text('{"ranked": "yes"}')
    with pytest.raises(InputError, match=r"summary.json: ranked is 'yes'"):
        RankingData.load(tmp_path)


def test_models_saved_before_lists_could_be_ranked_still_load(data: RankingData, tmp_path: Path) -> None:
    reranker, _ = fitted(data, small(epochs=1))
    reranker.save(tmp_path / "recommender")
    file = tmp_path / "recommender" / "recommender.json"
    stored = json.loads(file.read_text())
    del stored["sizes"]["ranked"], stored["config"]["loss"], stored["config"]["selection_cutoff"]
    file.write_text(json.dumps(stored))
    loaded, vectors = Reranker.load(tmp_path / "recommender").bind(data, ITEMS), USERS[data.list_users[:20], 0]
    assert torch.equal(logits_of(loaded, data, torch.arange(20), vectors), logits_of(reranker, data, torch.arange(20), vectors))


@pytest.mark.parametrize("model", ["setrank", "mir"])
def test_softmax_learns_from_one_positive_among_many(data: RankingData, model: str) -> None:
    first = data.labels.cumsum(1) == 1  # one positive a list, and none in a third of the lists
    labels = (data.labels.bool() & first & (torch.arange(len(data.labels)) % 3 > 0)[:, None]).float()
    data = replace(data, labels=labels)
    reranker, report = fitted(data, small(model=model, user_signal="history+text", loss="softmax"))
    test = data.lists_of(data.users_of("test"))
    found = ndcg(logits_of(reranker, data, test, USERS[data.list_users[test], 0]), labels[test], 5)
    assert found.isnan().float().mean() > 0.3
    assert found.nanmean() > 0.6
    assert report.train_losses[-1] < report.train_losses[0] < 2.4  # log 10 = 2.3 where nothing is known
    with pytest.raises(InputError, match="no training lists"):
        fitted(replace(data, labels=labels * data.users_of("validation")[data.list_users][:, None]), reranker.config)


def test_softmax_loss_is_the_cross_entropy_against_equal_shares_of_the_positives(data: RankingData) -> None:
    config = small(loss="softmax", dropout=0.0, text_dropout=0.0, epochs=1, batch_size=10_000, learning_rate=1e-30, weight_decay=0.0)
    texts = USERS[:, :1]
    reranker, report = fit(config, data, ITEMS, texts, data.users_of("train"), data.users_of("validation"), seed=0)
    lists = data.lists_of(data.users_of("train"))
    logits = logits_of(reranker, data, lists, texts[data.list_users[lists], 0]).log_softmax(1)
    each = [float(-row[liked].mean()) for row, liked in zip(logits, data.labels[lists].bool(), strict=True) if liked.any()]
    assert report.train_losses[0] == pytest.approx(sum(each) / len(each), abs=1e-5)


@pytest.mark.parametrize("cutoff", [1, 10])
def test_the_epoch_is_chosen_at_the_cutoff(data: RankingData, cutoff: int) -> None:
    reranker, report = fitted(data, small(user_signal="history", item_text=False, selection_cutoff=cutoff, epochs=3))
    lists = data.lists_of(data.users_of("validation"))
    values = ndcg(logits_of(reranker, data, lists, None), data.labels[lists], cutoff)
    best = per_user(values, data.list_users[lists], len(data.user_ids)).nanmean()
    assert report.validation_ndcg[report.chosen_epoch - 1] == max(report.validation_ndcg) == pytest.approx(float(best))


HUNDRED = """
import resource, sys, torch
from pathlib import Path
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.fit import fit
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.scoring import logits_of
data = RankingData.load(Path(sys.argv[1]))
items, users = torch.randn(len(data.item_ids), 768), torch.randn(len(data.user_ids), 1, 768)
lists = torch.arange(len(data.labels))
for model in ("prm", "dlcm", "setrank", "mir"):
    config = RecommenderConfig(model=model, user_signal="history+text", epochs=1, batch_size=256)
    reranker, _ = fit(config, data, items, users, data.users_of("train"), data.users_of("validation"), seed=0)
    logits = logits_of(reranker, data, lists, users[data.list_users[lists], 0])
    assert logits.shape == (len(lists), 100) and logits.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_lists_of_a_hundred_stay_under_four_gib(tmp_path: Path) -> None:
    write_data(tmp_path, users=61, items=120, lists_per_user=6, list_length=100, ranked=True)  # one batch of 252 training lists
    done = subprocess.run([sys.executable, "-c", HUNDRED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4


def test_users_outside_the_masks_may_lack_texts(data: RankingData) -> None:
    masks = data.users_of("train"), data.users_of("validation")
    texts = USERS.clone()
    texts[data.users_of("test")] = torch.nan
    _, report = fit(small(epochs=1), data, ITEMS, texts, *masks, seed=0)
    assert report.validation_ndcg[0] > 0
    texts[3, 1] = torch.nan
    with pytest.raises(InputError, match="user u3"):
        fit(small(epochs=1), data, ITEMS, texts, *masks, seed=0)


def test_arguments_that_do_not_fit_are_input_errors(data: RankingData, tmp_path: Path) -> None:
    train, validation = data.users_of("train"), data.users_of("validation")
    with pytest.raises(InputError, match="user vectors are absent"):
        fit(small(), data, ITEMS, None, train, validation, seed=0)
    with pytest.raises(InputError, match="user vectors are given"):
        fit(small(user_signal="history"), data, ITEMS, USERS, train, validation, seed=0)
    with pytest.raises(InputError, match="item vectors are absent"):
        fit(small(), data, None, USERS, train, validation, seed=0)
    with pytest.raises(InputError, match="same encoder"):
        fit(small(), data, ITEMS[:, :4], USERS, train, validation, seed=0)
    with pytest.raises(InputError, match="both"):
        fit(small(), data, ITEMS, USERS, train, train, seed=0)
    with pytest.raises(InputError, match="no training lists"):
        fit(small(), data, ITEMS, USERS, torch.zeros_like(train), validation, seed=0)
    with pytest.raises(ValidationError, match="heads"):
        RecommenderConfig(hidden_dim=30, heads=4)
    with pytest.raises(InputError, match="level of its logits"):
        resolve("quickstart", None, ["recommender.loss=softmax"])
    assert resolve("quickstart", None, ["recommender.loss=softmax", "reward.kind=ndcg"]).recommender.loss == "softmax"


def test_a_model_refuses_another_catalogue_and_damaged_files(data: RankingData, tmp_path: Path) -> None:
    reranker, _ = fitted(data, small(epochs=1))
    reranker.save(tmp_path / "recommender")
    write_data(tmp_path / "other", items=50)
    with pytest.raises(InputError, match="shape"):
        Reranker.load(tmp_path / "recommender").bind(RankingData.load(tmp_path / "other"), ITEMS[:50])
    write_data(tmp_path / "other", users=20)
    table = read_parquet(tmp_path / "other" / "items.parquet")
    renamed = table.set_column(1, "title", table["title"]).take(list(range(59, -1, -1)))
    write_parquet(renamed, tmp_path / "other" / "items.parquet")
    with pytest.raises(InputError, match="fitted on other items"):
        Reranker.load(tmp_path / "recommender").bind(RankingData.load(tmp_path / "other"), ITEMS)
    (tmp_path / "recommender" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="damaged"):
        Reranker.load(tmp_path / "recommender")
    with pytest.raises(InputError, match="no such file"):
        Reranker.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("model", "signal"), [("prm", "text"), ("dlcm", "history"), ("mir", "history+text")])
def test_an_item_that_no_training_user_has_is_known_by_its_attributes_alone(
    data: RankingData, tmp_path: Path, model: str, signal: str
) -> None:
    last, test = len(data.item_ids), data.users_of("test")
    elsewhere = data.candidates.masked_fill((data.candidates == last) & ~test[data.list_users, None], 1)
    histories = data.histories.masked_fill((data.histories == last) & ~test[:, None], 1)
    data = replace(data, candidates=elsewhere, histories=histories)
    lists = data.lists_of(test)
    lists = lists[(data.candidates[lists] == last).any(1)]
    vectors = USERS[data.list_users[lists], 0] if "text" in signal else None
    fitted(data, small(model=model, user_signal=signal, epochs=1))[0].save(tmp_path / "fitted")

    def scores(changed: int) -> torch.Tensor:
        reranker = Reranker.load(tmp_path / "fitted").bind(data, ITEMS)
        reranker.items.ids.weight.data[changed] += 1
        return logits_of(reranker, data, lists, vectors)

    other = next(code for code in data.candidates[lists[0]].tolist() if code != last)
    before = logits_of(Reranker.load(tmp_path / "fitted").bind(data, ITEMS), data, lists, vectors)
    assert torch.equal(scores(last), before)
    assert not torch.equal(scores(other), before)


def test_a_model_saved_before_items_could_be_cold_is_read(data: RankingData, tmp_path: Path) -> None:
    reranker, _ = fitted(data, small(user_signal="history", item_text=False, epochs=1))
    reranker.save(tmp_path / "fitted")
    weights = read_tensors(tmp_path / "fitted" / "model.safetensors")
    del weights["items.warm"]
    write_tensors(weights, tmp_path / "fitted" / "model.safetensors")
    old, lists = Reranker.load(tmp_path / "fitted").bind(data, None), torch.arange(5)
    assert torch.equal(logits_of(old, data, lists, None), logits_of(reranker, data, lists, None))


def test_items_without_genres_or_years_and_ratings_of_one_value(tmp_path: Path) -> None:
    write_data(tmp_path, users=40)
    items = read_parquet(tmp_path / "items.parquet")
    bare = items.set_column(2, "genres", pa.array([[]] * 60, pa.list_(pa.string()))).set_column(3, "year", pa.nulls(60, pa.int32()))
    write_parquet(bare, tmp_path / "items.parquet")
    histories = read_parquet(tmp_path / "histories.parquet")
    write_parquet(histories.set_column(2, "ratings", pa.array([[1.0] * 10] * 40, pa.list_(pa.float32()))), tmp_path / "histories.parquet")
    data = RankingData.load(tmp_path)
    assert not data.history_ratings.any()
    reranker, report = fitted(data, small(user_signal="history", epochs=2))
    assert report.train_losses[1] < report.train_losses[0]
    assert logits_of(reranker, data, torch.arange(3), None).isfinite().all()


def test_on_movielens_the_history_beats_popularity(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    prepare(DataConfig(source="ml-100k", folder=str(real_data("ml-100k"))), seed=0, out=tmp_path)
    data = RankingData.load(tmp_path)
    test = data.lists_of(data.users_of("test"))
    config = RecommenderConfig(user_signal="history", item_text=False, epochs=4)
    reranker, _ = fit(config, data, None, None, data.users_of("train"), data.users_of("validation"), seed=0)
    popularity = ndcg(data.popularity[data.candidates[test]].float(), data.labels[test], 5).nanmean()
    assert ndcg(logits_of(reranker, data, test, None), data.labels[test], 5).nanmean() > popularity + 0.03
