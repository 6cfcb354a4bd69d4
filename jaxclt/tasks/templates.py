"""The tasks: templates of our own, each a pure function of draws.

A template gets `draw`, which picks from a sequence, and returns the prompt and its
counterfactual as lists of parts: texts, or (name, text), whose places become spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxclt.tasks.words import (
    ACRONYMS,
    CAPITALS,
    EVENTS,
    FEMALE,
    FORMS,
    GIFTS,
    MALE,
    NOUNS,
    OPENINGS,
    PEOPLE,
    PLACES,
    THINGS,
    VERBS,
)

__all__ = ["TASKS", "Draw", "Filled", "Parts"]

Draw = Callable[..., Any]  # (sequence, *not these) -> one of it
Parts = Sequence[str | tuple[str, str]]


class Filled(NamedTuple):
    """A filled template."""

    prompt: Parts
    counterfactual: Parts
    answer: str
    foil: str


def indirect_object(draw: Draw) -> Filled:
    """Two names, one gives: the other one gets. There the other one gives."""
    first = draw(MALE + FEMALE)
    second = draw(MALE + FEMALE, first)
    receiver = draw((first, second))
    giver = second if receiver == first else first
    place, gift = draw(PLACES), draw(GIFTS)

    def text(who: str) -> Parts:
        both = ["When ", ("first", first), " and ", ("second", second)]
        gives = [f" went to the {place}, ", ("giver", who), f" gave the {gift} to"]
        return [*both, *gives]

    return Filled(text(giver), text(receiver), f" {receiver}", f" {giver}")


def agreement(draw: Draw) -> Filled:
    """A verb in the number of its subject, which stands next to it."""
    start = draw(OPENINGS)
    return _agree(draw, lambda noun: [f"{start} that the ", ("subject", noun)])


def agreement_clause(draw: Draw) -> Filled:
    """The same across a relative clause with one person, whose number misleads."""
    person, verb = draw(PEOPLE), draw(VERBS)
    clause = f" that the {person} {verb}"
    return _agree(draw, lambda noun: ["The ", ("subject", noun), clause])


def _agree(draw: Draw, text: Callable[[str], Parts]) -> Filled:
    noun, forms = draw(NOUNS), draw(FORMS)
    number = draw((0, 1))
    here, there = noun[number], noun[1 - number]
    return Filled(text(here), text(there), forms[number], forms[1 - number])


def greater_than(draw: Draw) -> Filled:
    """An end after its beginning: a higher digit. There the lower one would do too."""
    tens = draw(tuple(range(3, 7)))
    century, event = draw((15, 16, 17, 18)), draw(EVENTS)
    high, low = draw(tuple(range(tens + 1, 10))), draw(tuple(range(1, tens)))
    unit = draw(tuple(range(1, 9)))

    def text(digit: int) -> Parts:
        year = ("year", f"{century}{digit}{unit}")
        return [f"The {event} lasted from the year ", year, f" to the year {century}"]

    return Filled(text(tens), text(0), str(high), str(low))


def capital(draw: Draw) -> Filled:
    """A country's capital. There another country."""
    country, city = draw(CAPITALS)
    other, there = draw(CAPITALS, (country, city))

    def text(name: str) -> Parts:
        return ["The capital of ", ("country", name), " is the city of"]

    return Filled(text(country), text(other), f" {city}", f" {there}")


def addition(draw: Draw) -> Filled:
    """A sum, for the bundled model. There another second number of as many digits."""
    first, second = draw(tuple(range(100))), draw(tuple(range(100)))
    same = tuple(x for x in range(100) if len(str(x)) == len(str(second)))
    other = draw(same, second)

    def text(number: int) -> Parts:
        return ["calc: ", ("first", f"{first}"), "+", ("second", f"{number}"), "="]

    return Filled(text(second), text(other), f"{first + second}", f"{first + other}")


def induction(draw: Draw) -> Filled:
    """A list that begins again: what followed before. There another word did."""
    words: list[str] = []
    while len(words) < 6:
        words.append(draw(THINGS, *words))
    *shown, last, other = words

    def text(word: str) -> Parts:
        once = " ".join(shown)
        return [f" {once} ", ("source", word), f" {once}"]

    return Filled(text(last), text(other), f" {last}", f" {other}")


def pronoun(draw: Draw) -> Filled:
    """He or she by a name. There a name of the other kind."""
    kinds = (MALE, " he"), (FEMALE, " she")
    number, trait = draw((0, 1)), draw(("great", "good", "kind", "close", "dear"))
    (names, answer), (others, foil) = kinds[number], kinds[1 - number]
    name, other = draw(names), draw(others)

    def text(who: str) -> Parts:
        return ["So ", ("name", who), f" is a really {trait} friend, isn't"]

    return Filled(text(name), text(other), answer, foil)


def acronym(draw: Draw) -> Filled:
    """The last letter of an acronym. There the last word has another initial."""
    first, second, last = (draw(words) for words in ACRONYMS)
    other = draw(tuple(x for x in ACRONYMS[2] if x[0] != last[0]))

    def text(word: str) -> Parts:
        return [f"The {first} {second} ", ("last", word), f" ({first[0]}{second[0]}"]

    return Filled(text(last), text(other), last[0], other[0])


TASKS: dict[str, Callable[[Draw], Filled]] = {
    "indirect_object": indirect_object,
    "agreement": agreement,
    "agreement_clause": agreement_clause,
    "greater_than": greater_than,
    "capital": capital,
    "addition": addition,
    "induction": induction,
    "pronoun": pronoun,
    "acronym": acronym,
}
