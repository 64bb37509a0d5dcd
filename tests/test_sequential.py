"""Models of the next item: losses, retrieval, fitting, cold users and items."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import torch.nn.functional as F

from dpo4rec.data.config import DataConfig
from dpo4rec.data.sequences import SequenceConfig, prepare_sequences
from dpo4rec.errors import InputError
from dpo4rec.files import read_json, read_parquet, write_json, write_parquet
from dpo4rec.recommenders import losses
from dpo4rec.recommenders.fit_sequential import SequentialFit
from dpo4rec.recommenders.retrieval import hits_of, retrieve
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import Dropout, SequentialConfig, SequentialRecommender

ITEMS = 30
QUICK = {"embedding_dim": 32, "epochs": 15, "patience": 15, "dropout": 0.0, "learning_rate": 1e-2, "tokens_per_step": 150}


def write_source(folder: Path, users: int = 80, events: int = 12) -> DataConfig:
    """Users walk in a circle of items from a start of their own; every fifth also has an item that only it touches, at the end."""
    rows = [(f"u{u}", f"i{(u + step) % ITEMS}", step + u % 7) for u in range(users) for step in range(events)]
    rows += [(f"u{u}", f"rare{u}", 1000) for u in range(0, users, 5)]
    user, item, time = zip(*rows, strict=True)
    write_parquet(pa.table({"user_id": user, "item_id": item, "timestamp": time}), folder / "interactions.parquet")
    ids = [f"i{i}" for i in range(ITEMS)] + [f"rare{u}" for u in range(0, users, 5)]
    write_parquet(pa.table({"item_id": ids, "title": [f"title {name}" for name in ids]}), folder / "items.parquet")
    return DataConfig.model_validate({"source": "table", "folder": str(folder), "table": {"rating_column": None}, "like_threshold": 0.0})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SequenceData:
    folder = tmp_path_factory.mktemp("sequences")
    prepare_sequences(write_source(folder / "source"), SequenceConfig(), 0, folder / "out")
    return SequenceData.load(folder / "out")


def write_table(folder: Path, rows: list[tuple[str, str, int]]) -> DataConfig:
    """A table source of (user, item, time); every item has its id as title."""
    user, item, time = zip(*rows, strict=True)
    write_parquet(pa.table({"user_id": user, "item_id": item, "timestamp": time}), folder / "interactions.parquet")
    names = sorted(set(item))
    write_parquet(pa.table({"item_id": names, "title": names}), folder / "items.parquet")
    return DataConfig.model_validate({"source": "table", "folder": str(folder), "table": {"rating_column": None}, "like_threshold": 0.0})


def of_rare(data: SequenceData, rare: bool) -> torch.Tensor:
    """The users whose last item is one that only they touch, or the others."""
    return torch.tensor([place for place, name in enumerate(data.user_ids) if (int(name[1:]) % 5 == 0) == rare])


def fitted(data: SequenceData, tmp_path: Path, model: str = "sasrec", **config: object) -> SequentialRecommender:
    settings = SequentialConfig.model_validate({**QUICK, **config})
    return SequentialFit(model, settings, data, None, None, 0, tmp_path / "state").run()[0]


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunked_cross_entropy_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(losses, "FEWEST_ROWS", rows)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, items = (torch.randn(n, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (20, 50))
    targets = torch.randint(50, (20,), generator=generator)
    found, expected = losses.cross_entropy(hidden, items, targets), F.cross_entropy(hidden @ items.T, targets)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, items)), torch.autograd.grad(expected, (hidden, items)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_sampled_losses_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, items = torch.randn(4, 8, generator=generator), torch.randn(20, 8, generator=generator)
    targets, negatives = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 4, 9])
    softmax, bce = [], []
    beta = 1 - 0.75 * (1 - 3 / 19)
    for state, target in zip(hidden, targets.tolist(), strict=True):
        others = [n for n in negatives.tolist() if n != target]
        scores = items @ state
        softmax.append(-(scores[target] - scores[[target, *others]].logsumexp(0)))
        bce.append(-(beta * F.logsigmoid(scores[target]) + sum(F.logsigmoid(-scores[n]) for n in others)))
    torch.testing.assert_close(losses.sampled_softmax(hidden, items, targets, negatives), torch.stack(softmax).mean())
    torch.testing.assert_close(losses.generalised_bce(hidden, items, targets, negatives, 20, 0.75), torch.stack(bce).mean())


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("sasrec", {}),
        ("gru4rec", {"layers": 1}),
        ("sasrec", {"loss": "sampled-softmax", "negatives": 10}),
        ("sasrec", {"loss": "gbce", "negatives": 10, "epochs": 40, "patience": 40}),
        ("sasrec", {"precision": "bf16"}),
    ],
)
def test_a_circle_is_learned(data: SequenceData, tmp_path: Path, model: str, config: dict) -> None:
    users = of_rare(data, False)
    trained = fitted(data, tmp_path, model, **config)
    found = retrieve(trained, data, users, data.validation_ends[users], 5, None)
    hits, relevant = hits_of(found.items, data, users, "test")
    assert (relevant == 1).all()
    assert hits[:, 0].float().mean() > 0.8


def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(data: SequenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SequentialConfig(
        embedding_dim=8, epochs=4, dropout=0.2, loss="sampled-softmax", negatives=5, max_length=6, tokens_per_step=200
    )
    whole = SequentialFit("sasrec", config, data, None, None, 3, tmp_path / "whole").run()[0]
    cut = SequentialFit("sasrec", config, data, None, None, 3, tmp_path / "cut")
    save, calls = cut._save, []

    def killed() -> None:
        save()
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cut, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    torch.rand(5)  # somebody else draws in between
    resumed, report = SequentialFit("sasrec", config, data, None, None, 3, tmp_path / "cut").run()
    assert len(report["history"]) == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_retrieval_in_chunks_is_the_plain_ranking(data: SequenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(data, tmp_path, epochs=2)
    users, ends = torch.arange(len(data.user_ids)), data.validation_ends
    whole = retrieve(model, data, users, ends, 7, None)
    monkeypatch.setattr("dpo4rec.recommenders.retrieval.SCORES_AT_ONCE", 3 * (len(data.item_ids) + 1))
    chunked = retrieve(model, data, users, ends, 7, None)
    assert torch.equal(whole.items, chunked.items)
    torch.testing.assert_close(whole.scores, chunked.scores)
    for user in range(10):
        touched = set(data.codes[data.starts[user] : ends[user]].tolist())
        assert not touched & set(whole.items[user].tolist())
    everything, touched = retrieve(model, data, users[:1], ends[:1], 1000, None), data.codes[data.starts[0] : ends[0]].tolist()
    assert set(everything.items[0].tolist()) - {0} == set(range(1, ITEMS + 1)) - {*touched}  # nor items that nobody touched in training


def test_items_without_training_are_ranked_by_their_text(data: SequenceData, tmp_path: Path) -> None:
    """A rare item is described like the item that would come next."""
    vectors = torch.zeros(len(data.item_ids), ITEMS)
    for row, name in enumerate(data.item_ids):
        place = int(name[1:]) if name.startswith("i") else (int(name[4:]) + 12) % ITEMS
        vectors[row, place] = 1
    config = SequentialConfig.model_validate({**QUICK, "epochs": 30, "item_text": True})
    model = SequentialFit("sasrec", config, data, vectors, None, 0, tmp_path / "state").run()[0]
    users = of_rare(data, True)
    found = retrieve(model, data, users, data.validation_ends[users], 10, None)
    hits, _ = hits_of(found.items, data, users, "test")
    assert hits.any(1).float().mean() > 0.8
    model.save(tmp_path / "saved")
    again = SequentialRecommender.load(tmp_path / "saved").bind(data, vectors)
    assert torch.equal(retrieve(again, data, users, data.validation_ends[users], 10, None).items, found.items)
    with pytest.raises(InputError, match="item vectors are absent"):
        SequentialRecommender.load(tmp_path / "saved").bind(data, None)
    with pytest.raises(InputError, match="other items"):
        again.bind(dataclasses.replace(data, item_ids=data.item_ids[::-1]), vectors)


def test_user_texts_tell_what_histories_do_not(tmp_path: Path) -> None:
    """Every user touches one random item after a text that names it."""
    generator = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{item}", time) for u in range(300) for time, item in enumerate(generator.permutation(20)[:3])]
    config = write_table(tmp_path, rows)
    prepare_sequences(config, SequenceConfig(), 0, tmp_path / "out")
    data = SequenceData.load(tmp_path / "out")
    texts = torch.stack([F.one_hot(data.codes[a:b].long() - 1, 20).sum(0) for a, b in itertools.pairwise(data.starts)])
    settings = SequentialConfig(embedding_dim=32, epochs=25, dropout=0.0, learning_rate=1e-2, user_text=True, patience=25)
    model = SequentialFit("gru4rec", settings, data, None, texts.float()[:, None], 0, tmp_path / "state").run()[0]
    users = torch.arange(len(data.user_ids))
    found = retrieve(model, data, users, data.validation_ends, 1, texts.float())
    assert hits_of(found.items, data, users, "test")[0].float().mean() > 0.8
    with pytest.raises(InputError, match="user vectors are absent"):
        SequentialFit("gru4rec", settings, data, None, None, 0, tmp_path / "other")


def test_a_fit_needs_the_texts_of_those_it_reads_and_no_others(data: SequenceData, tmp_path: Path) -> None:
    texts = torch.randn(len(data.user_ids), 1, 4, generator=torch.Generator().manual_seed(0))
    texts[3] = torch.nan
    config = SequentialConfig(embedding_dim=8, epochs=1, user_text=True)
    with pytest.raises(InputError, match=f"user {data.user_ids[3]}: has no text vector"):
        SequentialFit("sasrec", config, data, None, texts, 0, tmp_path / "state")
    train, validation = data.train_ends.clone(), data.validation_ends.clone()
    train[3] = validation[3] = data.starts[3]  # everything that this user did is in the test
    cold = dataclasses.replace(data, train_ends=train, validation_ends=validation)
    model = SequentialFit("sasrec", config, cold, None, texts, 0, tmp_path / "state").run()[0]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_global_time_cuts_by_the_clock_and_counts_the_cold(tmp_path: Path) -> None:
    rows = [("old", f"i{t}", t) for t in range(80)] + [("new", "i0", 95), ("new", "late", 99), ("both", "i1", 5), ("both", "late", 98)]
    rows += [("mid", f"i{t}", t) for t in range(80, 96)]
    config = write_table(tmp_path, rows)
    prepare_sequences(config, SequenceConfig(split="global-time", test_share=0.05, validation_share=0.1), 0, tmp_path / "out")
    summary, data = read_json(tmp_path / "out" / "summary.json"), SequenceData.load(tmp_path / "out")
    new = data.user_ids.index("new")
    assert data.train_ends[new] == data.starts[new]  # nothing to learn from
    assert summary["cold_test_users"] == 1
    assert summary["cold_test_interactions"] >= 2  # "late", twice
    config = SequentialConfig(embedding_dim=8, epochs=1)
    model = SequentialFit("sasrec", config, data, None, None, 0, tmp_path / "state").run()[0]
    found = retrieve(model, data, torch.tensor([new]), data.starts[[new]], 3, None)
    assert (found.items > 0).all()  # a user without history gets the ranking of the start


def test_long_histories_are_learned_from_everywhere(tmp_path: Path) -> None:
    """What follows on an early item is only to be seen in windows that do not end with the history."""
    rows = [(f"long{u}", f"i{t}", t) for u in range(60) for t in range(40)] + [
        (f"short{u}", f"i{t}", t) for u in range(5) for t in range(8)
    ]
    source = write_table(tmp_path, rows)
    prepare_sequences(source, SequenceConfig(), 0, tmp_path / "out")
    data = SequenceData.load(tmp_path / "out")
    config = SequentialConfig(embedding_dim=16, max_length=10, epochs=60, patience=60, dropout=0.0, learning_rate=1e-2, tokens_per_step=200)
    model = SequentialFit("sasrec", config, data, None, None, 0, tmp_path / "state").run()[0]
    users = torch.tensor([place for place, name in enumerate(data.user_ids) if name.startswith("short")])
    found = retrieve(model, data, users, data.validation_ends[users], 1, None)
    assert hits_of(found.items, data, users, "test")[0].all()


def test_every_position_that_is_read_is_learned(data: SequenceData, tmp_path: Path) -> None:
    """Everybody has more items than the model reads, so that each ranking is made at the last position."""
    config = SequentialConfig(embedding_dim=8, epochs=2, max_length=6, tokens_per_step=150)
    fit = SequentialFit("sasrec", config, data, None, None, 0, tmp_path / "state")
    before = fit.model.get_parameter("encoder.positions").clone()
    after = fit.run()[0].get_parameter("encoder.positions")
    assert (before != after).all(1).tolist() == [True] * 7  # the start and six items


def test_some_users_choose_and_the_others_learn_from_one_more(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    whole, some = tmp_path / "whole", tmp_path / "some"
    prepare_sequences(source, SequenceConfig(), 0, whole)
    prepare_sequences(source, SequenceConfig(validation_users=7), 0, some)
    all_hold, few_hold = SequenceData.load(whole), SequenceData.load(some)
    held = few_hold.validation_ends - few_hold.train_ends
    assert int(held.sum()) == 7 == read_json(some / "summary.json")["validation_users"]
    assert torch.equal(few_hold.validation_ends, all_hold.validation_ends)  # the test is the same
    assert torch.equal(few_hold.train_ends, all_hold.validation_ends - held)
    with pytest.raises(ValueError, match="belongs to split=leave-one-out"):
        SequenceConfig(split="global-time", validation_users=7)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for settings, cause in [
        ({"negatives": 5}, "whole catalogue"),
        ({"loss": "sampled-softmax", "calibration": 0.5}, "calibration"),
        ({"heads": 3}, "multiple of heads"),
    ]:
        with pytest.raises(ValueError, match=cause):
            SequentialConfig.model_validate(settings)
    with pytest.raises(ValueError, match="global-time"):
        SequenceConfig(test_share=0.1)
    rows = pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    write_parquet(rows, tmp_path / "interactions.parquet")
    write_parquet(pa.table({"item_id": ["x", "y"], "title": ["x", "y"]}), tmp_path / "items.parquet")
    config = DataConfig.model_validate(
        {"source": "table", "folder": str(tmp_path), "table": {"rating_column": None}, "like_threshold": 0.0}
    )
    with pytest.raises(InputError, match="nobody has a validation and a test"):
        prepare_sequences(config, SequenceConfig(), 0, tmp_path / "out")


def test_damaged_files_of_sequences_are_input_errors(tmp_path: Path) -> None:
    prepare_sequences(write_source(tmp_path / "source"), SequenceConfig(), 0, tmp_path)
    items, summary = read_parquet(tmp_path / "items.parquet"), read_json(tmp_path / "summary.json")
    write_parquet(items.filter(pc.not_equal(items["item_id"], "i4")), tmp_path / "items.parquet")
    with pytest.raises(InputError, match=r"sequences.parquet: .*item_ids is 'i4', which is unknown"):
        SequenceData.load(tmp_path)
    write_parquet(items, tmp_path / "items.parquet")
    write_json({key: value for key, value in summary.items() if key != "candidates_hash"}, tmp_path / "summary.json")
    with pytest.raises(InputError, match=r"summary.json: .*damaged.*candidates_hash"):
        SequenceData.load(tmp_path)


@pytest.mark.parametrize(("probability", "dropped"), [(0.0, 0.0), (0.001, 1 / 256), (0.3, 77 / 256), (0.9999, 255 / 256)])
def test_dropout_drops_its_share_at_every_place_and_keeps_the_mean(probability: float, dropped: float) -> None:
    torch.manual_seed(0)
    dropout, ones = Dropout(probability), torch.ones(4096, 131, requires_grad=True)  # not a multiple of the eight bytes of a number
    found = dropout(ones)
    found.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad, found)  # what is dropped learns nothing, what is kept is scaled alike
    assert found.unique().tolist() == pytest.approx([1.0] if not dropped else [0.0, 1 / (1 - dropped)])
    for place in range(8):
        assert float((found.flatten()[place::8] == 0).float().mean()) == pytest.approx(dropped, abs=0.01)
    assert torch.equal(dropout.eval()(ones), ones)
