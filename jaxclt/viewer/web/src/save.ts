// Saving through the server. If the file was saved elsewhere since this page read it, what
// was changed here goes on top of what it holds now: a label of a node, a pin, a group by
// its name and the place of a card are each taken from here if they were changed here,
// removed ones too, and from the file otherwise.

import type { App } from "./app";
import { type Json, asObject, asText, readView } from "./document";
import { inPath } from "./dom";
import { tell } from "./files";
import type { GraphNode, Model } from "./model";
import { cardsOf, toSave } from "./state";

const TRIES = 5; // others may save all the time

/** What a file keeps of a reader's work, by what it belongs to. */
interface Work {
  labels: Map<string, string>;
  pins: Map<string, string>;
  groups: Map<string, string[]>;
  cards: Map<string, [string, number, number]>;
}

export class Saver {
  private version: string;
  private base: Work; // what the file held when it had that version
  private readonly model: Model;
  private saving = false;

  constructor(private readonly app: App) {
    this.version = app.serve?.version ?? "";
    this.model = app.model;
    this.base = workOf(app);
  }

  async save(): Promise<void> {
    if (this.saving) return;
    this.saving = true;
    try {
      tell(await this.tried() ? "Saved, with what was saved elsewhere" : "Saved");
    } catch (error) {
      tell(`Not saved: ${error instanceof Error ? error.message : String(error)}`, true);
    }
    this.saving = false;
  }

  /** Whether the work of others was merged in. */
  private async tried(): Promise<boolean> {
    const { app } = this;
    if (app.model !== this.model) throw new Error("this file was opened here and is not the server's; export it");
    for (let merged = 0; merged < TRIES; merged++) {
      const work = workOf(app);
      const answer = await fetch(`/api/save/${inPath(app.serve?.path ?? "")}`, {
        method: "POST", headers: { "Content-Type": "application/json", "If-Match": `"${this.version}"` }, body: JSON.stringify(toSave(app)),
      });
      const said = asObject(await answer.json().catch(() => ({})));
      if (answer.ok) {
        this.version = asText(said.version);
        this.base = work;
        return merged > 0;
      }
      if (answer.status !== 409) throw new Error(asText(said.error) || String(answer.status));
      this.merge(said);
    }
    throw new Error("it is saved elsewhere all the time; try again");
  }

  /** Put what was changed here on top of what the file holds now. */
  private merge(now: Json): void {
    const { app, base } = this, { model } = app, mine = workOf(app), view = readView(now.qParams), saved = asObject(now.labels);
    const written = (n: GraphNode): string => model.doc.written[n.index] ?? n.id;
    const idOf = new Map(model.nodes.map((n) => [written(n), n.id])), known = (id: string): string[] => { const own = idOf.get(id); return own === undefined ? [] : [own]; };
    const here = new Set(model.nodes.filter((n) => n.kind !== "logit").map(written)), there = Object.keys(saved);
    if (there.length !== here.size || !there.every((id) => here.has(id))) throw new Error("the graph was traced again; load the page again");
    const theirs: Work = {
      labels: new Map(model.nodes.filter((n) => n.kind === "feature").map((n) => [n.id, asText(saved[written(n)])])),
      pins: new Map(view.pinned.flatMap(known).map((id) => [id, id])),
      groups: byName(view.supernodes.map((g) => [g.label, ...g.ids.flatMap(known)])),
      cards: new Map(view.cards.map((card) => [card[0], card])),
    };
    for (const [id, label] of merged(base.labels, mine.labels, theirs.labels)) {
      const n = model.byId.get(id);
      if (n && model.named(n) !== label) model.labels.set(n.key, label);
    }
    const groups = merged(base.groups, mine.groups, theirs.groups);
    app.setPins([...merged(base.pins, mine.pins, theirs.pins).keys()], [...groups.values()].map(([label, ...ids]) => ({ label: label ?? "", ids })));
    app.place([...merged(base.cards, mine.cards, theirs.cards).values()]);
    if (app.group) app.selectGroup(app.groups.find((g) => g.label === app.group?.label) ?? null);
    this.base = theirs;
    this.version = asText(now.version);
    app.changed("graph", "side", "pins", "labels", "layout");
  }
}

function workOf(app: App): Work {
  return {
    labels: new Map(app.model.nodes.filter((n) => n.kind === "feature").map((n) => [n.id, app.model.named(n)])),
    pins: new Map(app.pinned.map((id) => [id, id])),
    groups: byName(app.groups.map((g) => [g.label, ...g.ids])),
    cards: new Map(cardsOf(app).map((card) => [card[0], card])),
  };
}

/** Groups by their name; the second of a name is another. */
function byName(groups: string[][]): Map<string, string[]> {
  const found = new Map<string, string[]>();
  for (const group of groups) {
    let name = group[0] ?? "";
    while (found.has(name)) name += "\n";
    found.set(name, group);
  }
  return found;
}

/** Those changed since `base` in `mine`, then the others of `theirs`. */
function merged<T>(base: Map<string, T>, mine: Map<string, T>, theirs: Map<string, T>): Map<string, T> {
  const same = (a: T | undefined, b: T | undefined) => JSON.stringify(a) === JSON.stringify(b);
  const found = new Map([...mine].filter(([key, value]) => !same(value, base.get(key))));
  for (const [key, value] of theirs) if (!found.has(key) && same(mine.get(key), base.get(key))) found.set(key, value);
  return found;
}
