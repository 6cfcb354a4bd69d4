"""Damaged files of every kind: refused in one line, or opened and safe to use.

A reader that raises anything but InputError has failed. The damage is drawn from a
seed, so that a failure comes again: its number is in the message.
"""

from __future__ import annotations

import random
import traceback
from pathlib import Path

import pytest
from mutate import mutated
from readers import READERS

from jaxclt.errors import InputError

FEW, MANY = 20, 2000
LONGEST = 300  # characters of a message


def tried(reader: str, folder: Path, numbers: range) -> tuple[int, dict[int, str]]:
    """How many damaged samples opened, and what failed by its number."""
    make, open_ = READERS[reader]
    samples = [(file, file.read_bytes()) for file in make(folder)]
    open_(folder)  # which is whole
    opened, failed = 0, {}
    for number in numbers:
        rng = random.Random(f"{reader} {number}")
        file, raw = samples[number % len(samples)]
        file.write_bytes(mutated(rng, file, raw))
        try:
            open_(folder)
            opened += 1
        except InputError as error:
            said = str(error)
            if len(said) > LONGEST or "\n" in said or not said:
                failed[number] = f"{file.name}: a message of {len(said)}: {said}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            where = traceback.extract_tb(error.__traceback__)
            ours = [x for x in where if "jaxclt" in x.filename] or list(where)
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            failed[number] = f"{file.name}: {type(error).__name__} at {place}: {error}"
        finally:
            for whole, content in samples:  # some readers write what they mend
                whole.write_bytes(content)
    return opened, failed


def check(reader: str, folder: Path, numbers: range) -> None:
    opened, failed = tried(reader, folder, numbers)
    print(f"{reader}: {len(numbers)} tried, {opened} opened, {len(failed)} failed")  # noqa: T201
    kinds = {said[:150]: number for number, said in failed.items()}
    assert not failed, "\n".join(f"{n}: {said}" for said, n in list(kinds.items())[:20])


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_refused_in_one_line(reader: str, tmp_path: Path):
    check(reader, tmp_path, range(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_thousands_of_damaged_files(reader: str, tmp_path: Path):
    check(reader, tmp_path, range(FEW, FEW + MANY))
