"""What runs keep: identities, directories, states, answers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from jaxclt.errors import InputError
from jaxclt.files.json_file import TEXT, json_schema, record
from jaxclt.runs import kept
from jaxclt.runs.kept import Answers, State, claimed, intact_json, refuse_other

OURS = {"config": {"lr": 0.1, "heads": (1, 2)}, "model": "a" * 64, "data": "x"}
KEPT = json.loads(json.dumps(OURS))


def test_another_run_is_refused_by_what_differs():
    here = Path("here")
    refuse_other(here, KEPT | {"newer": 1}, OURS)
    for theirs, said in (
        (OURS | {"config": {"lr": 0.2, "heads": [1, 2]}}, r"in lr \(0\.2, not 0\.1\):"),
        (OURS | {"config": {"lr": 0.1, "heads": [1]}}, "in heads: give the same"),
        (OURS | {"config": 3}, "in lr: give"),
        (KEPT | {"model": "b" * 64}, "in model: give the same settings to go on, or"),
        ({}, "here holds another run, which differs in lr: "),
    ):
        with pytest.raises(InputError, match=said):
            refuse_other(here, theirs, OURS)


def test_equal_records_have_equal_digests():
    assert kept.digest(OURS) == kept.digest(KEPT)
    assert kept.digest(OURS) != kept.digest(OURS | {"data": "y"})


def test_a_directory_belongs_to_a_run_that_left_something(tmp_path: Path):
    out = tmp_path / "a" / "run"
    for leaves in (False, True):
        with contextlib.suppress(KeyError), claimed(out, OURS, ["state"]):
            assert (out / kept.RUN).is_file()
            if leaves:
                (out / "state").write_text("x")
            raise KeyError
        assert out.exists() == leaves
    with claimed(out, OURS, ["state"]):
        pass
    with pytest.raises(InputError, match="in data"):
        claimed(out, OURS | {"data": "y"}).__enter__()
    with pytest.raises(InputError, match="in top"):  # another command's run
        claimed(out, {"top": 1, "model": "a" * 64}, ["features"]).__enter__()
    assert json.loads((out / kept.RUN).read_text()) == KEPT
    (out / kept.RUN).write_text("{")
    with pytest.raises(InputError, match=r"run\.json is not JSON"):
        claimed(out, OURS).__enter__()
    (out / kept.RUN).unlink()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        claimed(out, OURS).__enter__()
    with claimed(out, OURS, ["other"]):  # what is there is not a run's
        assert (out / "state").is_file()


def test_a_state_is_saved_now_and_then_and_when_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, saved = [0.0], []
    monkeypatch.setattr(kept.time, "monotonic", lambda: now[0])

    def write(path: Path) -> None:
        path.write_text("x")
        saved.append(now[0])
        now[0] += 10.0

    def stop() -> None:
        raise KeyboardInterrupt

    state = State(tmp_path / "state")
    for at in range(60):
        now[0] += 5.0
        state.step(at + 1, write, lambda: None)
    # After half a minute; then so rarely that it takes a twentieth of the time.
    assert saved == [30.0, 240.0]
    at = 60
    with pytest.raises(KeyboardInterrupt):
        state.step(at, write, stop)
    assert len(saved) == 3
    with pytest.raises(KeyboardInterrupt):
        state.step(at, write, stop)  # nothing new
    assert len(saved) == 3
    state.remove()
    assert not list(tmp_path.iterdir())
    nothing = State(None)
    nothing.save(1, write, now=True)
    nothing.remove()
    assert len(saved) == 3


def test_results_that_are_damaged_are_made_again(tmp_path: Path):
    schema, file = json_schema(record({"a": TEXT})), tmp_path / "part.json"
    assert intact_json(file, schema) is None
    for text in ('{"a": "b"', '{"a": 1}', "[]"):
        file.write_text(text)
        assert intact_json(file, schema) is None
    file.write_text('{"a": "b"}')
    assert intact_json(file, schema) == {"a": "b"}


def test_answers_are_on_disk_at_once(tmp_path: Path):
    schema, file = json_schema(record({"key": TEXT})), tmp_path / "log" / "x.jsonl"
    rows: dict[Any, Any] = {k: {"key": k, "said": [k]} for k in "abc"}
    for key, row in rows.items():
        first = Answers(file, schema)
        assert key not in first
        first.add(key, row)
    file.write_bytes(file.read_bytes() + b'{"key": "d"')
    assert Answers(file, schema) == rows
    silent = Answers(None, schema)
    silent.add("a", rows["a"])
    assert silent["a"] == rows["a"]
