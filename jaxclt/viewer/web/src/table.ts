// All nodes as text: the equal of the picture for who cannot or will not look at it.

import type { App } from "./app";
import { $, button, clip, count, el, short, visible } from "./dom";

const ROWS = 500;
let all = false;

export function showTable(app: App): void {
  const { model } = app;
  const list = model.ranked.filter((n) => app.shows(n) && (app.query === "" || app.matches(n)))
    .sort((a, b) => (a.rank ?? 0) - (b.rank ?? 0));
  const shown = all ? list : list.slice(0, ROWS);
  $("rows").replaceChildren(...shown.map((n) => {
    const layer = n.kind === "embedding" ? "–" : n.kind === "logit" ? "output" : String(n.layer);
    const numbers = [n.activation === null ? "" : short(n.activation), n.rank === null ? "" : count(n.rank),
      count(model.insOf(n).length), count(model.outsOf(n).length)];
    return el("tr", n === app.selected ? "on" : "",
      el("td", "", button(clip(model.label(n), 120), "", () => app.select(n))),
      el("td", "", layer), el("td", "", clip(visible(model.tokens[n.pos] ?? ""), 40)), ...numbers.map((t) => el("td", "num", t)));
  }));
  $("more").replaceChildren();
  if (shown.length < list.length) {
    $("more").append(button(`Show all ${count(list.length)} rows`, "plain", () => { all = true; showTable(app); }));
  }
}
