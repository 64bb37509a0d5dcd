import errno
import json
from pathlib import Path

import pytest
import torch

from dpo4rec import files
from dpo4rec.errors import InputError
from dpo4rec.files import atomic, content_hash, read_json, read_tensors, stable_seed, write_json, write_tensors


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


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"kept": 1}, path)
    with pytest.raises(InputError, match=r"a.json: no space is left.*finished stages are kept"), atomic(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_json(path) == {"kept": 1}


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["new"]


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
