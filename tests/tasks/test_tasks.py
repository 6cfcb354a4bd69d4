"""Tasks: the same of a seed, aligned, right by an oracle; bad files are one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxclt
from jaxclt import tasks
from jaxclt.errors import InputError
from jaxclt.tasks.words import CAPITALS, FEMALE, FORMS, MALE, NOUNS

LINE = {"prompt": "The keys", "answer": " are", "foil": " is"}


class Words:
    """A tokenizer of words with the space before them, and of single digits."""

    def encode(self, text: str) -> list[int]:
        ids, word = [], ""
        for letter in f"{text} ":
            if word and (letter == " " or letter.isdigit() or word[-1].isdigit()):
                ids.append(hash(word))
                word = ""
            word += letter
        return ids

    def find(self, text: str) -> int | None:
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


@pytest.mark.parametrize("name", tasks.TASKS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**40), n=st.integers(1, 12))
def test_examples_are_those_of_their_seed_and_aligned(
    name: str, seed: int, n: int
) -> None:
    made = tasks.make(name, n, seed)
    assert made == tasks.make(name, n + 3, seed)[:n]
    assert len({(x.prompt, x.counterfactual) for x in made}) == n
    for x in made:
        assert x.task == name
        assert x.answer != x.foil
        assert x.prompt != x.counterfactual
        assert x.spans.keys() == x.counterfactual_spans.keys() != set()
        # Outside of what is named, and of what is written the same, nothing differs.
        parts = []
        for text, spans in (
            (x.prompt, x.spans),
            (x.counterfactual, x.counterfactual_spans),
        ):
            at, rest = 0, ""
            for start, end in sorted(spans.values()):
                assert text[start:end].strip() == text[start:end] != ""
                rest, at = rest + text[at:start], end
            parts.append(rest + text[at:])
        assert parts[0] == parts[1]
        assert len(x.prompt.split(" ")) == len(x.counterfactual.split(" "))


def test_another_seed_has_others() -> None:
    for name in tasks.TASKS:
        assert tasks.make(name, 5, 0) != tasks.make(name, 5, 1)


def span(x: tasks.Example, name: str, there: bool = False) -> str:
    text = x.counterfactual if there else x.prompt
    start, end = (x.counterfactual_spans if there else x.spans)[name]
    return text[start:end]


def right(x: tasks.Example, answer: str, there: bool = False) -> bool:
    """Whether an answer is right, by a rule of its own for each task."""
    text = x.counterfactual if there else x.prompt
    if x.task == "indirect_object":
        names = {span(x, name, there) for name in ("first", "second")}
        return {answer.strip()} == names - {span(x, "giver", there)}
    if x.task in ("agreement", "agreement_clause"):
        plural = span(x, "subject", there) in {many for _, many in NOUNS}
        return answer in [form[plural] for form in FORMS]
    if x.task == "greater_than":
        return int(answer) > int(span(x, "year", there)[2])
    if x.task == "capital":
        return dict(CAPITALS)[span(x, "country", there)] == answer.strip()
    if x.task == "addition":
        first, second = text.removeprefix("calc: ").removesuffix("=").split("+")
        return int(first) + int(second) == int(answer)
    if x.task == "induction":
        words = text.split()
        return words[words.index(words[-1]) + 1] == answer.strip()
    if x.task == "pronoun":
        return (span(x, "name", there) in FEMALE) == (answer == " she")
    words, _, letters = text.partition(" (")
    return [w[0] for w in words.split()[1:]] == [*letters, answer]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_right_and_foils_wrong(name: str) -> None:
    assert not set(MALE) & set(FEMALE)
    for x in tasks.make(name, 30, 3):
        assert right(x, x.answer)
        assert not right(x, x.foil)
        # There the foil is right; after a low year both are.
        assert right(x, x.foil, there=True)
        assert right(x, x.answer, there=True) == (name == "greater_than")


def test_what_a_tokenizer_does_not_take() -> None:
    good = tasks.Example(**LINE, counterfactual="The key")
    bad = {
        "answer ' are not' is not one token": {"answer": " are not"},
        "foil 's' merges": {"foil": "s"},
        "the same token": {"foil": " are"},
        "2 tokens, its counterfactual 3": {"counterfactual": "The old key"},
        "its counterfactual is the prompt": {"counterfactual": "The keys"},
    }
    rows = [dataclasses.replace(good, **change) for change in bad.values()]
    found = tasks.check([good, *rows], Words())
    assert found.kept == [good]
    assert [x for x, _ in found.dropped] == rows
    for why, (_, said) in zip(bad, found.dropped, strict=True):
        assert why.split("'")[0] in said


def test_a_models_tokenizer_chooses() -> None:
    """The bundled model's digits; the words of other tasks it does not have."""
    tokenizer = jaxclt.load_model("addition").tokenizer
    made = tasks.make("addition", 50, tokenizer=tokenizer)
    assert tasks.check(made, tokenizer).kept == made
    with pytest.raises(InputError, match="found 0 different examples that this"):
        tasks.make("capital", 2, tokenizer=tokenizer)
    with pytest.raises(InputError, match="did you mean"):
        tasks.make("capitals", 2)
    with pytest.raises(InputError, match="not 1000"):
        tasks.make("agreement", 1000)
    with pytest.raises(InputError, match="--n 0"):
        tasks.make("agreement", 0)


def test_files_are_read_as_written(tmp_path: Path) -> None:
    made = [x for name in tasks.TASKS for x in tasks.make(name, 3)]
    tasks.write_tasks(made, tmp_path / "all.jsonl")
    assert tasks.read_tasks(tmp_path / "all.jsonl") == made
    (tmp_path / "one.jsonl").write_text(json.dumps(LINE) + "\n\n")
    assert tasks.read_tasks(tmp_path / "one.jsonl") == [tasks.Example(**LINE)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "holds no example"),
        ("{", "one.jsonl:1"),
        ("[1]", "line 1: write an object"),
        ({}, "`prompt` is missing"),
        (LINE | {"answer": ""}, "`answer` is missing"),
        (LINE | {"foil": None}, "`foil` is missing"),
        (LINE | {"answer": 7}, "`answer` is int"),
        (LINE | {"foil": " are"}, "the foil is the answer"),
        (LINE | {"anwser": "x"}, "has no 'anwser'"),
        (LINE | {"spans": 3}, "`spans`: write"),
        (LINE | {"spans": {"a": [1]}}, "write [from, to]"),
        (LINE | {"spans": {"a": [True, 2]}}, "write [from, to]"),
        (LINE | {"spans": {"a": [4, 99]}}, "of a text of 8 characters"),
        (LINE | {"counterfactual_spans": {"a": [0, 1]}}, "of a text of 0"),
        (LINE | {"spans": {"x" * 4000: [3, 1]}}, "give a part of it"),
    ],
)
def test_bad_files_are_refused_in_a_line(
    line: object, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(InputError) as refused:
        tasks.read_tasks(file)
    said = str(refused.value)
    assert words in said
    assert "\n" not in said
    assert len(said) <= 300
