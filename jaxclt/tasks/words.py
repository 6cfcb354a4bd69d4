"""Words that the templates are filled with; all common, most of them single tokens."""

from __future__ import annotations

__all__ = ["ACRONYMS", "CAPITALS", "EVENTS", "FEMALE", "GIFTS", "MALE", "NOUNS"]
__all__ += ["OPENINGS", "PEOPLE", "PLACES", "THINGS", "VERBS"]

MALE = ("John", "James", "David", "Michael", "Robert", "William", "Peter", "Paul")
MALE += ("Mark", "Daniel", "Thomas", "Richard", "Tom", "Jack", "George", "Henry")
FEMALE = ("Mary", "Sarah", "Anna", "Emma", "Jane", "Alice", "Laura", "Susan")
FEMALE += ("Lisa", "Maria", "Emily", "Kate", "Linda", "Helen", "Rachel", "Elizabeth")
PLACES = ("store", "park", "school", "office", "station", "market", "garden", "house")
GIFTS = ("book", "drink", "gift", "letter", "ticket", "ball", "key", "ring")
# Singular, plural.
NOUNS = (
    ("author", "authors"), ("car", "cars"), ("cat", "cats"), ("chair", "chairs"),
    ("dog", "dogs"), ("doctor", "doctors"), ("friend", "friends"), ("girl", "girls"),
    ("house", "houses"), ("key", "keys"), ("letter", "letters"),
    ("picture", "pictures"), ("student", "students"), ("teacher", "teachers"),
    ("tree", "trees"), ("window", "windows"),
)  # fmt: skip
PEOPLE = ("boy", "guard", "farmer", "man", "woman", "child", "manager", "artist")
VERBS = ("liked", "saw", "wanted", "found", "knew", "remembered")
OPENINGS = ("I think", "We know", "They said", "It seems", "You see")
# Of the verb that follows: for one, for many.
FORMS = ((" is", " are"), (" was", " were"), (" has", " have"))
EVENTS = ("war", "project", "journey", "search", "trial", "work", "dispute", "study")
CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Germany", "Berlin"), ("Spain", "Madrid"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("Russia", "Moscow"), ("Egypt", "Cairo"),
    ("Greece", "Athens"), ("Austria", "Vienna"), ("Ireland", "Dublin"),
    ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Cuba", "Havana"),
    ("Norway", "Oslo"), ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Turkey", "Ankara"),
    ("India", "Delhi"), ("England", "London"),
)  # fmt: skip
THINGS = (
    "apple", "river", "stone", "cloud", "table", "music", "horse", "bread", "glass",
    "paper", "light", "water", "metal", "chair", "tiger", "green", "circle", "market",
    "sugar", "winter",
)  # fmt: skip
# Words of acronyms: two that begin, one that ends.
ACRONYMS = (
    ("Central", "National", "General", "Local", "Modern", "United", "Open", "Royal"),
    ("Energy", "Health", "Travel", "Sports", "Media", "Data", "Food", "Music"),
    ("Agency", "Board", "Council", "Group", "Institute", "Office", "Union", "Fund"),
)
