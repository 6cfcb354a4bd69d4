// Two graphs side by side: which nodes they share, which only one of them has, what differs.

import type { App } from "./app";
import { type Comparison, type Differs, compareModels, linkDifferences, nodeDifferences } from "./differ";
import { $, button, clip, count, el, percent, plural, short, visible } from "./dom";
import type { GraphNode, Model, Reading } from "./model";
import { Picture } from "./picture";

const ROWS = 200;
const LISTS = ["differ", "links", "shared", "lost", "gained"] as const;
const NODE_HEADS = ["Share left", "right", "Right − left", "Activation left", "right"], LINK_HEADS = ["Weight left", "right", "Right − left"];

type Listed = (typeof LISTS)[number];

interface Sorted { reading: Reading; nodes: Differs<GraphNode>[]; links: Differs<number>[] }

export class Compare {
  private readonly pictures: [Picture, Picture];
  private found: Comparison | null = null;
  private sorted: Sorted | null = null;
  private twins = new Map<GraphNode, GraphNode>(); // both ways
  private only = new Set<GraphNode>(); // in one of the graphs
  private right: GraphNode | null = null; // chosen on the right, where the left has none
  private list: Listed = "differ";

  constructor(private readonly app: App) {
    const mark = (n: GraphNode) => (this.only.has(n) ? getComputedStyle(document.documentElement).getPropertyValue("--gained").trim() : null);
    this.pictures = [
      new Picture(app, $("here"), { model: () => app.model, mark, says: false, choose: (n) => this.choose(n, null) }),
      new Picture(app, $("there"), { model: () => app.other ?? app.model, mark, says: false, choose: (n) => this.choose(null, n), chosen: () => this.chosenThere() }),
    ];
  }

  /** After either graph changed. */
  reset(): void {
    const { model, other } = this.app;
    this.found = other ? compareModels(model, other) : null;
    this.only = new Set([...(this.found?.lost ?? []), ...(this.found?.gained ?? [])]);
    this.twins = new Map(this.found?.shared.flatMap((m) => [[m.here, m.there], [m.there, m.here]] as const));
    this.sorted = this.right = null;
  }

  show(): void {
    const { app } = this;
    $("compared").hidden = !app.other;
    $("nocompare").hidden = app.other !== null;
    if (!app.other || !this.found) return;
    $("heretitle").textContent = visible(app.model.doc.metadata.prompt);
    $("theretitle").textContent = visible(app.other.doc.metadata.prompt);
    for (const picture of this.pictures) picture.resize();
    this.lists(app.other, this.found);
  }

  again(): void {
    const { other } = this.app;
    if (!other || !this.found) return;
    for (const picture of this.pictures) picture.again();
    if (this.sorted?.reading !== this.app.model.reading) this.lists(other, this.found);
  }

  /** For tests: what is listed, and what is chosen on the right alone. */
  get said(): Sorted & { right: GraphNode | null } | null {
    return this.app.other && this.found && { ...this.sort(this.app.other, this.found), right: this.right };
  }

  redraw(): void { if (this.app.other) for (const picture of this.pictures) picture.draw(); }
  restyle(): void { for (const picture of this.pictures) picture.restyle(); }

  /** The node that is chosen in the other graph: what stands for it, or its own. */
  private chosenThere(): GraphNode | null {
    const { selected } = this.app;
    return selected ? this.twins.get(selected) ?? null : this.right;
  }

  /** Go to a node, in both pictures where both have it. */
  private choose(here: GraphNode | null, there: GraphNode | null): void {
    const left = here ?? (there && this.twins.get(there)) ?? null;
    this.right = left ? null : there;
    this.app.select(left);
    const [one, two] = this.pictures, twin = this.chosenThere();
    if (left) one.reveal(left);
    if (twin) two.reveal(twin);
  }

  private sort(other: Model, found: Comparison): Sorted {
    const { model } = this.app;
    if (this.sorted?.reading !== model.reading) {
      this.sorted = { reading: model.reading, nodes: nodeDifferences(found), links: linkDifferences(model, other, found) };
    }
    return this.sorted as Sorted;
  }

  private lists(other: Model, found: Comparison): void {
    const { nodes, links } = this.sort(other, found), { model } = this.app;
    const differ = nodes.filter((d) => d.by !== 0 || !d.here || !d.there);
    const say: Record<Listed, string> = {
      differ: `Nodes that differ (${count(differ.length)})`, links: `Links that differ (${count(links.length)})`,
      shared: `Shared (${count(found.shared.length)})`, lost: `Only left (${count(found.lost.length)})`, gained: `Only right (${count(found.gained.length)})`,
    };
    $("comparetabs").replaceChildren(...LISTS.map((name) => {
      const made = button(say[name], "", () => { this.list = name; this.lists(other, found); });
      made.setAttribute("aria-pressed", String(this.list === name));
      return made;
    }));
    const scales = model.byChange === other.byChange ? "" : "One is ranked by change from another prompt, the other by influence.";
    $("comparenote").textContent = [found.sameDictionary ? "" : "The dictionaries differ, so no feature is the same in both.", scales].filter(Boolean).join(" ");
    if (this.list === "links") this.linkRows(other, links);
    else this.nodeRows(other, nodes.filter((d) => (this.list === "differ" ? d.by !== 0 || !d.here || !d.there : this.list === "shared" ? d.here && d.there : this.list === "lost" ? !d.there : !d.here)));
  }

  private nodeRows(other: Model, list: Differs<GraphNode>[]): void {
    const { app } = this, act = (n: GraphNode | null) => (n?.activation == null ? "" : short(n.activation));
    const share = (x: number | null) => (x ? percent(x) : "");
    this.rows(["Node", "Where"], NODE_HEADS, list.slice(0, ROWS).map((d) => {
      const model = d.here ? app.model : other, n = (d.here ?? d.there) as GraphNode;
      return { d, cells: [this.goes(n, d.here, d.there, model), model.brief(n)], numbers: [share(d.left), share(d.right), (d.by < 0 ? "−" : "+") + percent(Math.abs(d.by)), act(d.here), act(d.there)] };
    }));
    this.more(list.length, "node", "influence shares");
  }

  private linkRows(other: Model, list: Differs<number>[]): void {
    const { app } = this, weight = (x: number | null) => (x === null ? "" : short(x));
    this.rows(["From", "To"], LINK_HEADS, list.slice(0, ROWS).map((d) => {
      const model = d.here === null ? other : app.model, e = (d.here ?? d.there) as number;
      const end = (n: GraphNode) => this.goes(n, d.here === null ? null : n, d.here === null ? n : null, model);
      return { d, cells: [end(model.from(e)), end(model.to(e))], numbers: [weight(d.left), weight(d.right), (d.by < 0 ? "" : "+") + short(d.by)] };
    }));
    this.more(list.length, "link", "weights");
  }

  private rows(heads: string[], numbers: string[], rows: { d: Differs<unknown>; cells: (HTMLElement | string)[]; numbers: string[] }[]): void {
    const head = (text: string, name: string) => Object.assign(el("th", name, text), { scope: "col" });
    $("compareheads").replaceChildren(...heads.map((t) => head(t, "")), ...numbers.map((t) => head(t, "num")), head("In", ""));
    $("comparerows").replaceChildren(...rows.map(({ d, cells, numbers: values }) => el("tr", "",
      ...cells.map((c) => el("td", "", c)), ...values.map((t) => el("td", "num", t)), this.standing(d))));
  }

  /** Which of the graphs has it. */
  private standing({ here, there }: Differs<unknown>): HTMLElement {
    if (here !== null && there !== null) return el("td", "", "both");
    return el("td", "", el("i", "dot one"), here === null ? " only right" : " only left");
  }

  /** A node's name that goes to it. */
  private goes(n: GraphNode, here: GraphNode | null, there: GraphNode | null, model: Model): HTMLElement {
    const made = button(clip(model.label(n), 100), "", () => this.choose(here, there));
    made.title = model.where(n);
    return made;
  }

  private more(n: number, what: string, numbers: string): void {
    if (!n) { $("comparemore").textContent = `No ${what} here.`; return; }
    const most = n > ROWS ? `The ${count(ROWS)} of ${plural(n, what)} whose ${numbers} differ most. ` : "";
    const zero = what === "link" ? "A link that a graph does not show counts as 0 there." : "A node that a graph does not show counts as 0 there; of outputs the share is the probability.";
    $("comparemore").textContent = most + zero;
  }
}
