"""The hub, played by a folder."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors


class FakeHub:
    """Repositories are folders; what is asked for is copied to a cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "hub", root / "cache"
        self.fetched: list[str] = []
        self.error: Exception | None = None

    @classmethod
    def instead_of_the_real_one(
        cls, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> FakeHub:
        made = cls(root)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", made.snapshot_download
        )
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        return made

    def add(self, repo: str, source: Path, folder: str = "") -> Path:
        place = self.root / repo / folder
        shutil.copytree(source, place, dirs_exist_ok=True)
        return place

    def model_info(self, repo, *, revision=None, timeout=None, files_metadata=False):
        assert timeout is not None
        assert files_metadata
        if self.error is not None:
            raise self.error
        place = self.root / repo
        files = [x for x in place.rglob("*") if x.is_file()]
        siblings = [
            SimpleNamespace(
                rfilename=x.relative_to(place).as_posix(), size=x.stat().st_size
            )
            for x in files
        ]
        return SimpleNamespace(siblings=siblings, sha=revision or "0" * 40)

    def snapshot_download(self, repo, *, revision=None, allow_patterns=None, **how):
        target = self.cache / repo
        if how.get("local_files_only"):
            if not target.is_dir():
                raise errors.LocalEntryNotFoundError("nothing there")
            return str(target)
        for file in (x for x in (self.root / repo).rglob("*") if x.is_file()):
            name = file.relative_to(self.root / repo).as_posix()
            if any(fnmatch.fnmatch(name, x) for x in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
                self.fetched.append(name)
        return str(target)
