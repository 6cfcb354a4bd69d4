from pathlib import Path

import pytest

from jaxclt.errors import InputError
from jaxclt.io.atomic import atomic_directory, atomic_path


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
