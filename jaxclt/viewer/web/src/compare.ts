// Two graphs side by side: which nodes they share, which only one of them has.

import type { App } from "./app";
import { asText } from "./document";
import { $, button, clip, count, el, plural, short, visible } from "./dom";
import type { GraphNode, Model } from "./model";
import { Picture } from "./picture";

const ROWS = 200;

export interface Match { here: GraphNode; there: GraphNode }
export interface Comparison { shared: Match[]; lost: GraphNode[]; gained: GraphNode[]; sameDictionary: boolean }

/** Nodes that stand for the same in both: features by layer, number and position (in
 * prompts of different length counted from the start, then from the end); features of
 * different dictionaries never. */
export function compareModels(here: Model, there: Model): Comparison {
  const dictionary = (m: Model) => asText(m.doc.jaxclt.dictionary ?? JSON.stringify(m.doc.metadata.transcoder_list ?? "")) + m.doc.metadata.scan;
  const sameDictionary = dictionary(here) === dictionary(there);
  const moved = positions(here.tokens, there.tokens), keyed = new Map<string, GraphNode>();
  const key = (n: GraphNode, pos: number) =>
    n.kind === "embedding" ? `E ${pos}` : n.kind === "logit" ? `out ${n.token}` : n.kind === "error" ? `error ${n.layer} ${pos}` : `${n.key} ${pos}`;
  for (const n of there.nodes) keyed.set(key(n, n.pos), n);
  const shared: Match[] = [], lost: GraphNode[] = [], met = new Set<GraphNode>();
  for (const n of here.nodes) {
    const pos = moved[n.pos] ?? -1, other = keyed.get(key(n, pos));
    const same = other && (n.kind !== "embedding" || here.tokens[n.pos] === there.tokens[pos]) && (n.kind !== "feature" || sameDictionary);
    if (same) { shared.push({ here: n, there: other }); met.add(other); } else lost.push(n);
  }
  return { shared, lost, gained: there.nodes.filter((n) => !met.has(n)), sameDictionary };
}

/** Where a position of one prompt is in the other, -1 where nowhere. */
function positions(a: string[], b: string[]): number[] {
  if (a.length === b.length) return a.map((_, i) => i);
  let start = 0, end = 0;
  const short = Math.min(a.length, b.length);
  while (start < short && a[start] === b[start]) start += 1;
  while (end < short - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  return a.map((_, i) => (i < start ? i : i >= a.length - end ? i - a.length + b.length : -1));
}

export class Compare {
  private readonly pictures: Picture[];
  private found: Comparison | null = null;
  private only = new Set<GraphNode>(); // in one of the graphs
  private list: "shared" | "lost" | "gained" = "shared";

  constructor(private readonly app: App) {
    const mark = (n: GraphNode) => (this.only.has(n) ? getComputedStyle(document.documentElement).getPropertyValue("--gained").trim() : null);
    this.pictures = [
      new Picture(app, $("here"), { model: () => app.model, mark, says: false, choose: (n) => app.select(n) }),
      new Picture(app, $("there"), {
        model: () => app.other ?? app.model, mark, says: false,
        choose: (n) => app.select(this.found?.shared.find((m) => m.there === n)?.here ?? null),
      }),
    ];
  }

  /** After either graph changed. */
  reset(): void {
    const { model, other } = this.app;
    this.found = other ? compareModels(model, other) : null;
    this.only = new Set([...(this.found?.lost ?? []), ...(this.found?.gained ?? [])]);
  }

  show(): void {
    const { app, found } = this;
    $("compared").hidden = !app.other;
    $("nocompare").hidden = app.other !== null;
    if (!app.other || !found) return;
    $("heretitle").textContent = visible(app.model.doc.metadata.prompt);
    $("theretitle").textContent = visible(app.other.doc.metadata.prompt);
    for (const picture of this.pictures) picture.resize();
    const say = { shared: `Shared (${count(found.shared.length)})`, lost: `Only left (${count(found.lost.length)})`, gained: `Only right (${count(found.gained.length)})` };
    $("comparetabs").replaceChildren(...(["shared", "lost", "gained"] as const).map((name) => {
      const made = button(say[name], "", () => { this.list = name; this.show(); });
      made.setAttribute("aria-pressed", String(this.list === name));
      return made;
    }));
    $("comparenote").textContent = found.sameDictionary ? "" : "The dictionaries differ, so no feature is the same in both.";
    this.rows(app.other, found);
  }

  again(): void { if (this.app.other) for (const picture of this.pictures) picture.again(); }
  redraw(): void { if (this.app.other) for (const picture of this.pictures) picture.draw(); }
  restyle(): void { for (const picture of this.pictures) picture.restyle(); }

  private rows(other: Model, found: Comparison): void {
    const { app } = this, rank = (n: GraphNode | null) => (n?.rank == null ? "" : count(n.rank)), act = (n: GraphNode | null) => (n?.activation == null ? "" : short(n.activation));
    const pairs: [GraphNode | null, GraphNode | null][] = this.list === "shared" ? found.shared.map((m) => [m.here, m.there])
      : this.list === "lost" ? found.lost.map((n) => [n, null]) : found.gained.map((n) => [null, n]);
    pairs.sort((a, b) => best(a) - best(b));
    $("comparerows").replaceChildren(...pairs.slice(0, ROWS).map(([here, there]) => {
      const model = here ? app.model : other, n = (here ?? there) as GraphNode, text = clip(model.label(n), 100);
      return el("tr", "", el("td", "", here ? button(text, "", () => app.select(here)) : text), el("td", "", model.brief(n)),
        ...[rank(here), rank(there), act(here), act(there)].map((t) => el("td", "num", t)));
    }));
    $("comparemore").textContent = pairs.length > ROWS ? `The ${count(ROWS)} most influential of ${plural(pairs.length, "node")}.` : "";
  }
}

const best = (pair: [GraphNode | null, GraphNode | null]): number => Math.min(...pair.map((n) => n?.rank ?? Infinity));
