"""One process that has imported everything, for all commands that are killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from killing import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("log")) as found:
        yield found
