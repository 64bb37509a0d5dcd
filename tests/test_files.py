import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError

from dpo4rec import files
from dpo4rec.cluster.role_log import RoleLog
from dpo4rec.data.user_rows import UserRows
from dpo4rec.errors import InputError
from dpo4rec.files import atomic, batches, content_hash, read_json, read_tensors, stable_seed, write_json, write_tensors


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"kept": 1}, path)

    def fail_midway() -> None:
        with atomic(path) as partial:
            partial.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert read_json(path) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused for a run; a worker's log is then told apart by its process."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)  # such a mount is no one's to make
    with pytest.raises(InputError, match=r"no locks \(Function not implemented\).*the option flock"):
        files.lock(tmp_path / "run")
    log = RoleLog(tmp_path / "logs", "sampler")
    log.close()
    assert f"-{os.getpid()}.log" in log.name


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"kept": 1}, path)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(InputError, match=r"a.json: no space is left.*finished stages are kept"), atomic(path):
            raise OSError(number, "as the system says it")
    assert read_json(path) == {"kept": 1}


def test_a_full_disk_is_said_where_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", save)  # a disk that is really full is no one's to make
    with pytest.raises(InputError, match="no space is left"):
        write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")


def test_a_folder_that_was_being_replaced_is_mended(tmp_path: Path) -> None:
    """Killed between the two renames the old folder stands aside; killed after them it is not wanted any more."""
    for name in ("a", "b"):
        (tmp_path / f".{name}.before").mkdir()
        (tmp_path / f".{name}.before" / "old").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / ".a.partial-7").mkdir()
    files.mend(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/old", "b"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["new"]


def test_a_folder_that_another_process_made_meanwhile_may_stay(tmp_path: Path) -> None:
    with atomic(tmp_path / "folder", replace=False) as partial:
        partial.mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/theirs"]


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    read = read_json if name.endswith("json") else read_tensors
    with pytest.raises(InputError, match=f"{name}: there is no such file"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x07{")
    with pytest.raises(InputError, match=f"{name}: the file is damaged"):
        read(tmp_path / name)


def test_shared_tensors_come_back_equal(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    write_tensors({"a": shared, "b": shared.T}, tmp_path / "t.safetensors")
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["b"], shared.T)


def test_the_hash_sees_content_and_names_but_no_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = content_hash(tmp_path)
    (tmp_path / ".partial").write_text("x")
    assert content_hash(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(tmp_path) != before


def test_seeds_are_stable_and_parts_do_not_run_together() -> None:
    assert stable_seed(0, "round-0", "u1", 3) == stable_seed(0, "round-0", "u1", 3)
    assert stable_seed("a", "bc") != stable_seed("ab", "c")
    assert 0 <= stable_seed("x") < 2**63
    assert json.dumps(files.stable_seed(1))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("order", [range(50), [(7 * place) % 50 for place in range(50)]], ids=["by user", "mixed"])
def test_rows_of_some_users_are_those_of_the_whole_table(order: list[int], statistics: bool, tmp_path: Path) -> None:
    table = pa.table({"number": list(order), "user_id": [f"u{place:02d}" for place in order]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8, write_statistics=statistics)
    rows = UserRows(tmp_path / "a.parquet")
    for wanted in ([], ["u07"], ["u49", "u00", "u00", "nobody"], ["u15", "u16", "u17"]):
        expected = [row for row in table.to_pylist() if row["user_id"] in wanted]
        assert rows.read(wanted).to_pylist() == expected
        assert rows.read(wanted, ["user_id"]).to_pylist() == [{"user_id": row["user_id"]} for row in expected]


def test_only_the_row_groups_that_may_hold_the_users_are_read(tmp_path: Path) -> None:
    table = pa.table({"user_id": [f"u{place:02d}" for place in range(48)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8, compression="none", use_dictionary=False)
    rows, content = UserRows(tmp_path / "a.parquet"), bytearray((tmp_path / "a.parquet").read_bytes())
    start = content.index(b"u17")  # in the third group
    content[start - 30 : start + 20] = bytes(50)
    (tmp_path / "a.parquet").write_bytes(content)
    assert rows.read(["u04", "u30"])["user_id"].to_pylist() == ["u04", "u30"]
    with pytest.raises(InputError, match=r"a.parquet: the file is damaged"):
        rows.read(["u16"])


def test_a_file_and_a_folder_are_read_in_parts(tmp_path: Path) -> None:
    table = pa.table({"a": range(10), "b": range(10)})
    pq.write_table(table.slice(0, 6), tmp_path / "1.parquet")
    pq.write_table(pa.table({}), tmp_path / "2.parquet")
    pq.write_table(table.slice(6), tmp_path / "3.parquet")
    assert [part["a"].to_pylist() for part in batches(tmp_path, ["a"], 4)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    with pytest.raises(InputError, match="no such file"):
        list(batches(tmp_path / "nowhere"))
