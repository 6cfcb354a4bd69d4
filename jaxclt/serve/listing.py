"""The list of a folder's graphs as a page: to search, to look at, to compare two."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from jaxclt.serve.answers import shell

__all__ = ["list_page"]


def list_page(graphs: Sequence[dict[str, Any]]) -> str:
    """The graphs as rows of a table; those that cannot be opened with what is wrong.

    Args:
      graphs: see `jaxclt.serve.folder.Folder.graphs`.
    """
    if not graphs:
        return shell("Attribution graphs", "<p>No graphs yet: trace a prompt.</p>")
    rows = "".join(map(_row, graphs))
    return shell("Attribution graphs", _BODY.replace("<!--ROWS-->", rows), _STYLE)


def _row(graph: dict[str, Any]) -> str:
    path = html.escape(graph["path"])
    if "error" in graph:
        why = html.escape(graph["error"])
        return (
            f'<tr class="bad"><td></td><td></td><td colspan="6"><b>{path}</b>'
            f"<small>not shown: {why}</small></td></tr>"
        )
    where = quote(graph["path"])
    name = html.escape(graph["prompt"] or graph["slug"])
    numbers = (graph.get(key) for key in ("replacement", "completeness"))
    scores = "".join(f'<td class="num">{_share(x)}</td>' for x in numbers)
    return (
        f'<tr><td><input type="checkbox" value="{where}" '
        f'aria-label="Compare {name}"></td><td class="picture"></td>'
        f'<td><a href="/view/{where}">{name}</a><small>{path}</small></td>'
        f"<td>{_answer(graph)}</td><td>{_model(graph)}</td>{scores}"
        f"<td>{_date(graph['changed'])}</td></tr>"
    )


def _answer(graph: dict[str, Any]) -> str:
    if "answer" not in graph:
        return ""
    token = html.escape(graph["answer"].replace("\n", "⏎"))
    return f"<b>{token}</b> <small>{_share(graph['probability'])}</small>"


def _model(graph: dict[str, Any]) -> str:
    model, dictionary = (graph.get(key, "") for key in ("model", "dictionary"))
    return f"{html.escape(model)}<small>{html.escape(dictionary)}</small>"


def _share(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %"


def _date(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    told = when.isoformat(timespec="minutes").replace("+00:00", "Z")
    return f'<time datetime="{told}">{told[:16].replace("T", " ")}</time>'


_BODY = """<div class="bar">
<label>Search <input type="search" id="search" autocomplete="off" spellcheck="false"
 placeholder="prompt, answer, model"></label>
<output id="count"></output>
<a id="compare" hidden>Compare these two</a><span id="hint">Tick two to compare.</span>
</div>
<div class="scroll"><table><thead><tr><th><span class="sr">Compare</span></th>
<th><span class="sr">Picture</span></th><th>Prompt</th><th>Answer</th>
<th>Model, dictionary</th>
<th class="num" title="share of the influence that does not go through errors"
>Replacement</th>
<th class="num" title="share of what nodes read that is not errors">Completeness</th>
<th>Date (UTC)</th></tr></thead><tbody><!--ROWS--></tbody></table></div>
<script>
"use strict";
const rows = [...document.querySelectorAll("tbody tr")];
const find = (id) => document.getElementById(id);
const texts = rows.map((row) => row.textContent.toLowerCase());
const filter = () => {
  const words = find("search").value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  rows.forEach((row, i) => {
    row.hidden = !words.every((word) => texts[i].includes(word));
    shown += row.hidden ? 0 : 1;
  });
  find("count").textContent = `${shown} of ${rows.length} graphs`;
};
find("search").addEventListener("input", filter);
filter();
const chosen = []; // in the order of ticking: the first is opened
const boxes = rows.flatMap((row) => [...row.querySelectorAll("input")]);
for (const box of boxes) {
  box.checked = false;
  box.addEventListener("change", () => {
    if (box.checked) chosen.push(box.value);
    else chosen.splice(chosen.indexOf(box.value), 1);
    const two = chosen.length === 2;
    for (const other of boxes) other.disabled = two && !other.checked;
    find("compare").hidden = !two;
    find("hint").hidden = two;
    const with_ = encodeURIComponent(decodeURIComponent(chosen[1] ?? ""));
    find("compare").href = `/view/${chosen[0]}?compare=${with_}`;
  });
}
// Pictures of what is in sight, from numbers that the server read.
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) {
    seen.unobserve(target);
    const { value } = target.parentElement.querySelector("input");
    fetch(`/api/picture/${value}`).then((answer) => (answer.ok ? answer.text() : ""))
      .then((text) => {
        if (!text) return;
        const made = new DOMParser().parseFromString(text, "image/svg+xml");
        target.replaceChildren(document.importNode(made.documentElement, true));
      }).catch(() => {});
  }
}, { rootMargin: "200px" });
for (const row of rows) {
  if (row.querySelector("input")) seen.observe(row.querySelector(".picture"));
}
</script>"""

_STYLE = """
body { max-width: 1240px; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center;
  min-height: 36px; position: sticky; top: 0; background: Canvas; padding: 6px 0;
  z-index: 1; }
input[type=search] { font: inherit; width: 280px; max-width: 60vw; padding: 4px 8px;
  border: 1px solid var(--muted); border-radius: 6px; margin-left: 6px; }
input[type=checkbox] { width: 18px; height: 18px; }
output, #hint { color: var(--muted); font-size: 13px; }
#compare { border: 1px solid currentColor; border-radius: 6px; padding: 3px 10px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
[hidden] { display: none !important; }
.sr { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
  overflow: hidden; white-space: nowrap; }
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 10px; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
th { font-size: 13px; color: var(--muted); font-weight: 600; }
td { max-width: 420px; overflow-wrap: anywhere; }
td.num, th.num { text-align: right; }
td b, time { white-space: nowrap; }
tr:not(.bad) b { color: var(--ink); }
small { display: block; color: var(--muted); font-size: 12.5px; }
b + small { display: inline; }
.picture { width: 132px; padding: 4px; }
.picture svg { display: block; width: 132px; height: 48px; fill: var(--dot); }
.picture .s { fill: var(--ink); }
"""
