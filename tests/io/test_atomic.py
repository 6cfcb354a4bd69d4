import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_directory, atomic_path, is_temporary, sweep
from jaxclt.files.owner import owner


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_file_appears_whole(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.json"]
    # not private, as a bare mkstemp would leave it
    assert target.stat().st_mode & 0o777 == _new_file_mode(tmp_path)


def test_failure_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize("atomic", [atomic_path, atomic_directory])
def test_a_full_disk_is_one_line(tmp_path, atomic):
    """What the operating system says is seen through the real file that is full."""
    with (
        pytest.raises(InputError, match=r"no room left to write .*graph"),
        atomic(tmp_path / "graph"),
    ):
        Path("/dev/full").write_text("anything")
    assert names(tmp_path) == []


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write .*file/x"),
        atomic_path(tmp_path / "file" / "x"),
    ):
        pass
    with pytest.raises(InputError, match="is a directory"), atomic_path(tmp_path):
        pass


def test_directory_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "model"
    for version in ("one", "two"):
        with atomic_directory(target) as temporary:
            (temporary / version).write_text(version)
    assert names(target) == ["two"]
    assert names(tmp_path) == ["model"]


def test_directory_failure_keeps_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("")

    def write():
        with atomic_directory(target) as temporary:
            (temporary / "half").write_text("")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert names(target) == ["kept"]
    assert names(tmp_path) == ["model"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="is a file"),
        atomic_directory(tmp_path / "file"),
    ):
        pass


def _new_file_mode(folder):
    plain = folder / "plain"
    plain.write_text("")
    mode = plain.stat().st_mode & 0o777
    plain.unlink()
    return mode


@pytest.fixture
def dead():
    """The word of a process that has ended."""
    code = "import os; print(os.getpid())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    machine, boot, _, process = owner().split("-")
    return f"{machine}-{boot}-{int(done.stdout)}-{process}"


def test_what_dead_processes_left_is_swept(tmp_path, dead):
    machine, boot, pid, process = owner().split("-")
    gone = {
        dead,
        f"{machine}-ffffff-{pid}-{process}",  # before this machine was started anew
        f"{machine}-{boot}-{pid}-ffffff",  # another that had our number
    }
    kept = {
        owner(),
        f"{machine}-{boot}-{os.getppid()}-ffffff",
        f"ffffff-{boot}-{pid}-ffffff",  # on another machine: who knows
    }
    deep = tmp_path / "a" / "b"
    (deep / "c").mkdir(parents=True)
    for folder in (tmp_path, deep):
        for word in gone | kept:
            (folder / f".x.npz.{word}-k3_9a").write_text("")
            assert is_temporary(f".x.npz.{word}-k3_9a")
    (deep / "c" / f".x.{dead}-abc").write_text("")  # too deep to be one of ours
    (tmp_path / ".x.npz.mine").write_text("")
    (tmp_path / f".new.{dead}-abc" / "new").mkdir(parents=True)
    sweep(tmp_path)
    left = {f".x.npz.{word}-k3_9a" for word in kept}
    assert set(names(tmp_path)) == left | {".x.npz.mine", "a"}
    assert set(names(deep)) == left | {"c"}
    assert len(names(deep / "c")) == 1


def test_what_is_written_has_its_owner_in_its_name(tmp_path):
    with atomic_path(tmp_path / "a.json") as temporary:
        assert is_temporary(temporary.name)
        assert owner() in temporary.name
        sweep(tmp_path)
        assert temporary.exists()
    assert not is_temporary("a.json")
    assert not is_temporary(".a.json.x7_kq2mz")


def test_a_directory_that_was_all_but_there_is_finished(tmp_path, dead):
    """Killed between the two renames: the old one aside, the new one not yet there."""
    scratch = tmp_path / f".model.{dead}-abc"
    for name in ("old", "new"):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "version").write_text(name)
    sweep(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "version").read_text() == "new"


def test_a_directory_sweeps_only_its_own_beside_it(tmp_path, dead):
    for name in ("model", "other"):
        (tmp_path / f".{name}.{dead}-abc" / "new").mkdir(parents=True)
    with atomic_directory(tmp_path / "model"):
        pass
    assert names(tmp_path) == [f".other.{dead}-abc", "model"]
