"""The export of a finished run: the commands and the program of docs/export.md, users who arrive later, interruptions."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.export import Export
from dpo4rec.files import read_json, read_parquet
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker
from dpo4rec.user_table import UserTable

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
NEW = [f"new{n}" for n in range(20)]


def write_interactions(path: Path, items: list[str], users: list[str], more: tuple[str, str, float, int] | None = None) -> Path:
    rows = [(user, items[(7 * place + step) % len(items)], 1.0 + step % 5, step) for place, user in enumerate(users) for step in range(6)]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("user_id", "item_id", "rating", "timestamp"), *rows, *([more] if more else [])])
    return path


@pytest.fixture(scope="module")
def items(micro_run: Path) -> list[str]:
    return read_parquet(micro_run / "data" / "items.parquet")["item_id"].to_pylist()


@pytest.fixture(scope="module")
def old_user(micro_run: Path) -> str:
    return read_parquet(micro_run / "data" / "users.parquet")["user_id"][5].as_py()


@pytest.fixture(scope="module")
def folder(micro_run: Path, items: list[str], old_user: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands were executed: OUT, and as it was after the first of them, OUT-1."""
    here = tmp_path_factory.mktemp("export")
    write_interactions(here / "new.csv", items, [old_user, *NEW], (NEW[0], "unheard of", 5.0, 9))
    places = {"R": str(micro_run), "OUT": str(here / "OUT"), "new.csv": str(here / "new.csv")}
    commands = re.findall(r"^\$ (dpo4rec .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(app, [places.get(word, word) for word in shlex.split(command)[1:]])
        assert done.exit_code == 0, done.output
        if not (here / "OUT-1").exists():
            shutil.copytree(here / "OUT", here / "OUT-1")
    return here


def rows_of(out: Path) -> dict[str, dict[str, object]]:
    return {row["user_id"]: row for row in pq.read_table(out / "users.parquet").to_pylist()}


def test_every_user_has_the_text_that_was_evaluated(folder: Path, micro_run: Path) -> None:
    users = read_parquet(micro_run / "data" / "users.parquet")["user_id"].to_pylist()
    table = pq.read_table(folder / "OUT-1" / "users.parquet")
    assert sorted(table["user_id"].to_pylist()) == sorted(users)
    dimensions = read_json(micro_run / "manifest.json")["stages"]["encoder"]["report"]["dimensions"]
    assert table["vector"].type == pa.list_(pa.float32(), dimensions)
    drawn = micro_run / "evaluation" / "texts" / "tuned-test-t1"
    texts, vectors = (read_parquet(drawn / name).to_pylist() for name in ("samples", "vectors"))
    rows = rows_of(folder / "OUT-1")
    for text, vector in zip(texts, vectors, strict=True):
        if text["sample"] == 0:
            assert (rows[text["user_id"]]["text"], rows[text["user_id"]]["vector"]) == (text["text"], vector["vector"])
    assert read_json(folder / "OUT-1" / "manifest.json")["parts"]["users.parquet"]["written"] == 0  # all were drawn in the run


def test_new_users_are_added_and_the_others_stay(folder: Path, old_user: str) -> None:
    before, after = rows_of(folder / "OUT-1"), rows_of(folder / "OUT")
    assert after.keys() == before.keys() | set(NEW)
    assert {user for user in before if before[user] != after[user]} == {old_user}
    assert before[old_user]["prompt_hash"] != after[old_user]["prompt_hash"]
    report = read_json(folder / "OUT" / "manifest.json")["parts"]["users.parquet"]
    counts = {name: report[name] for name in ("rows", "kept", "reused", "written", "unknown_items", "users_without_history")}
    assert counts == {
        "rows": len(after),
        "kept": len(before) - 1,
        "reused": 0,
        "written": 1 + len(NEW),
        "unknown_items": 1,
        "users_without_history": 0,
    }


@pytest.mark.parametrize("again", [[], ["--users", "new.csv"]])
def test_exporting_again_writes_nothing(folder: Path, micro_run: Path, again: list[str]) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "OUT").rglob("*") if path.is_file()}
    words = [str(folder / word) if word == "new.csv" else word for word in again]
    done = CliRunner().invoke(app, ["export", str(micro_run), str(folder / "OUT"), *words])
    assert done.exit_code == 0, done.output
    manifest = folder / "OUT" / "manifest.json"
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "OUT").rglob("*") if path.is_file()}
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {manifest}


def test_an_interrupted_export_keeps_its_finished_units(folder: Path, micro_run: Path, micro: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "OUT-1", tmp_path / "OUT")

    def interrupt(stage: str, done: int, of: int, files: Path | None) -> None:
        if stage == "export/sample" and done == 1:
            raise KeyboardInterrupt

    run = Run(resolve("quickstart", micro, []), micro_run, interrupt)
    with pytest.raises(KeyboardInterrupt):
        Export(run, tmp_path / "OUT").write(folder / "new.csv")
    run.folder.release()
    (unit,) = (tmp_path / "OUT").glob(".users-*/samples/*.parquet")
    assert rows_of(tmp_path / "OUT") == rows_of(folder / "OUT-1")
    begun: list[tuple[str, int, int]] = []
    run = Run(resolve("quickstart", micro, []), micro_run, lambda stage, done, of, files: begun.append((stage, done, of)))
    Export(run, tmp_path / "OUT").write(folder / "new.csv")
    run.folder.release()
    assert ("export/sample", 1, 2) in begun
    assert ("export/sample", 0, 2) not in begun  # the finished unit is not drawn again
    assert not unit.exists()
    assert (tmp_path / "OUT" / "users.parquet").read_bytes() == (folder / "OUT" / "users.parquet").read_bytes()


def test_rows_of_another_encoder_are_refused(folder: Path) -> None:
    file = folder / "OUT" / "users.parquet"
    origin = json.loads(pq.read_schema(file).metadata[b"dpo4rec"])
    assert len(UserTable(file, origin).hashes) == len(rows_of(folder / "OUT"))
    with pytest.raises(InputError, match="another encoder, and such"):
        UserTable(file, {**origin, "encoder": "0123456789abcdef"})


def test_adapter_and_merged_model_are_the_policy(folder: Path, micro_run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(micro_run / "language_model")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "OUT" / "model")("The user rated:")["input_ids"]])
    with torch.no_grad():
        untuned = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "OUT" / "model")(ids).logits
        policy = PeftModel.from_pretrained(base, str(micro_run / "round-0" / "adapter"))(ids).logits
        base = AutoModelForCausalLM.from_pretrained(micro_run / "language_model")
        exported = PeftModel.from_pretrained(base, str(folder / "OUT" / "adapter"))(ids).logits
    assert torch.equal(exported, policy)
    torch.testing.assert_close(merged, policy, atol=1e-4, rtol=0)
    assert not torch.allclose(merged, untuned, atol=1e-4, rtol=0)


def test_no_path_of_this_machine_is_in_it(folder: Path, micro_run: Path) -> None:
    for file in (folder / "OUT").rglob("*.json"):
        assert str(micro_run.parent) not in file.read_text(encoding="utf-8"), file


def test_the_program_of_the_page_scores_as_the_run_does(folder: Path, micro_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    named: dict[str, torch.Tensor] = {}
    exec(code[1], named)
    assert named["scores"].shape == (2, 7)
    data, vectors = RankingData.load(micro_run / "data"), torch.randn(3, named["vectors"].shape[1])
    model = Reranker.load(folder / "OUT" / "reranker").bind(data, named_item_vectors(micro_run))
    with torch.no_grad():
        expected = model(data.candidates[:3], data.list_users[:3], vectors)
    torch.testing.assert_close(named["program"](data.candidates[:3], vectors), expected, atol=1e-5, rtol=0)


def named_item_vectors(run: Path) -> torch.Tensor:
    from dpo4rec.files import read_tensors

    return read_tensors(run / "encoder" / "item_vectors.safetensors")["item_vectors"]


def test_a_damaged_part_is_made_again(folder: Path, micro_run: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "OUT-1", tmp_path / "OUT")
    (tmp_path / "OUT" / "model" / "model.safetensors").write_bytes(b"")
    done = CliRunner().invoke(app, ["export", str(micro_run), str(tmp_path / "OUT")])
    assert done.exit_code == 0, done.output
    whole = (folder / "OUT-1" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "OUT" / "model" / "model.safetensors").read_bytes() == whole


def test_a_re_ranker_without_a_program_is_refused_before_anything_is_written(micro: Path, tmp_path: Path) -> None:
    run = Run(resolve("quickstart", micro, ["recommender.model=mir"]), tmp_path / "run")
    with pytest.raises(InputError, match="prm, dlcm or setrank"):
        Export(run, tmp_path / "OUT")
    run.folder.release()
    assert not (tmp_path / "OUT").exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    shutil.copytree(micro_run, tmp_path / "run")
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "weights.bin").touch()
    run = Run(resolve("quickstart", micro, []), tmp_path / "run")
    for folder in (tmp_path / "mine", tmp_path / "run"):  # somebody's own; a run folder, which has a manifest of another kind
        with pytest.raises(InputError, match="no export and not empty"):
            Export(run, folder)
    run.folder.release()
    assert (tmp_path / "mine" / "model" / "weights.bin").exists()


def test_an_unfinished_run_is_refused(micro: Path, tmp_path: Path) -> None:
    run = Run(resolve("quickstart", micro, []), tmp_path / "run")
    with pytest.raises(InputError, match="there is no such file"):
        Export(run, tmp_path / "OUT").write()
    run.folder.release()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("user_id,item_id,rating,timestamp\na,nothing,1,1\n", "nobody has an interaction with an item that the run knows"),
        ("user_id,item,rating,timestamp\na,b,1,1\n", "there is no column 'item_id'"),
        ("user_id,item_id,rating,timestamp\na,b,1,1\na,b,2,2\n", "row 2: user 'a' has item 'b' a second time"),
        ("user_id,item_id,rating,timestamp\na,b,1,1\n,b,2,2\n", "row 2: an id or a title is missing"),
    ],
)
def test_a_file_of_users_that_cannot_be_used(folder: Path, micro_run: Path, tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    done = CliRunner().invoke(app, ["export", str(micro_run), str(folder / "OUT"), "--users", str(tmp_path / "bad.csv")])
    assert done.exit_code == 2
    assert cause in done.output
