// What the reader has chosen, and the one way to change it; the views listen.

import { Attention } from "./attention";
import { type GraphDocument, type Json, type Payload, type Serve, type Supernode, readDocument } from "./document";
import { isFixed } from "./layout";
import { type GraphNode, type Head, Model, type Reading } from "./model";
import { firstThreshold, folds, stands } from "./shown";
import { type Card, fromPlaces } from "./supernodes";

export type Part = "graph" | "columns" | "cell" | "model" | "side" | "pins" | "labels" | "filter" | "view" | "compare" | "patches" | "layout";
export type ViewName = "graph" | "table" | "compare";
export const TABS = ["node", "attention", "evidence", "help"] as const;
export type Tab = (typeof TABS)[number];

/** Shares of the page, in percent, that the reader gave to panels. */
export interface Panels { side: number | null; lower: number | null }

/** What a patch changes. */
export interface PatchOf { name: string; ids: string[] }

export class App {
  model: Model;
  other: Model | null;
  report: Json;
  validation: Json | null;
  attention: Attention | null;
  patches: Json[]; // what patches of the model did, newest first
  readonly serve: Serve | null;
  allLinks: number;
  notes: string[];

  selected: GraphNode | null = null;
  group: Supernode | null = null; // the chosen supernode
  head: Head | null = null; // the chosen head
  cell: [query: number, key: number] | null = null; // and where it attends
  pinned: string[] = []; // members of groups too
  groups: Supernode[] = [];
  readonly marked = new Set<string>(); // cards chosen to be grouped
  readonly positions = new Map<string, [number, number]>(); // of dragged cards
  placed = new Map<string, [number, number]>(); // of all cards, where they are shown
  patchOf: PatchOf | null = null; // the patch panel is open for it
  panels: Panels = { side: null, lower: null };
  path: number[] = [];
  threshold = 1;
  first = 1; // of the first picture
  highest = 1; // where the slider ends
  errors = false; // each error on its own, not in its column's rail
  readonly unfolded = new Set<number>(); // columns whose rail or stub the reader opened
  query = "";
  view: ViewName = "graph";
  tab: Tab = "node";

  private readonly listeners: ((changed: ReadonlySet<Part>) => void)[] = [];

  constructor(payload: Payload) {
    const doc = readDocument(payload.graph);
    this.serve = payload.serve;
    this.other = payload.other ? new Model(readDocument(payload.other)) : null;
    this.report = payload.report ?? {};
    this.validation = payload.validation;
    this.attention = payload.attention && new Attention(payload.attention);
    this.patches = payload.patches ?? [];
    this.allLinks = payload.allLinks;
    this.notes = doc.notes;
    this.model = new Model(doc);
    this.reset(doc);
    if (payload.serve?.compare && this.other) this.view = "compare";
  }

  listen(listener: (changed: ReadonlySet<Part>) => void): void { this.listeners.push(listener); }
  changed(...parts: Part[]): void {
    const set = new Set(parts);
    for (const listener of this.listeners) listener(set);
  }

  /** Show another graph. */
  load(doc: GraphDocument): void {
    this.model = new Model(doc);
    this.report = (doc.jaxclt.scores ?? {}) as Json;
    this.validation = null;
    this.attention = null;
    this.patches = [];
    this.allLinks = this.model.source.length;
    this.notes = doc.notes;
    this.reset(doc);
    this.changed("model", "graph", "side", "pins", "labels", "filter", "view");
  }

  private reset(doc: GraphDocument): void {
    const { view } = doc;
    this.take("value", view.threshold);
    this.selected = this.model.byId.get(view.clicked) ?? null;
    this.group = null;
    this.head = null;
    this.patchOf = null;
    this.path = [];
    this.marked.clear();
    this.unfolded.clear();
    for (const [key, label] of view.clerps) this.readLabel(key, label);
    this.setPins(view.pinned, view.supernodes);
    this.place(view.cards, view.places);
  }

  /** Take links and influence of a reading, and show the nodes that hold a share of it. */
  take(reading: Reading, threshold: number | null): void {
    for (const model of [this.model, this.other]) if (model && model.reading !== reading) model.read(reading);
    const most = this.model.nodes.reduce((m, n) => (isFixed(n) || !n.linked ? m : Math.max(m, n.influence ?? 0)), 0);
    this.highest = Math.ceil(most * 200) / 200 || 1;
    this.first = firstThreshold(this.model) ?? this.highest;
    this.threshold = Math.min(threshold ?? this.first, this.highest);
  }

  showReading(reading: Reading): void {
    this.path = [];
    this.take(reading, this.threshold === this.first ? null : this.threshold);
    this.changed("graph", "side", "pins", "filter", "columns");
  }

  /** Compare with another graph, by the same reading where it has it. */
  compareWith(doc: GraphDocument): void {
    this.other = new Model(doc);
    this.other.read(this.model.reading);
    this.changed("compare", "view");
  }

  /** Put cards where a file or an address says they were. */
  place(cards: [string, number, number][], places: number[] = []): void {
    this.positions.clear();
    for (const [id, x, y] of cards) this.positions.set(id, [x, y]);
    if (!cards.length) for (const [id, at] of fromPlaces(this.model, this.cards(), places)) this.positions.set(id, at);
  }

  /** circuit-tracer keys labels by the feature number, Neuronpedia by layer_feature_pos. */
  readLabel(key: string, label: string): void {
    const [layer, number] = key.split("_");
    for (const n of this.model.nodes) {
      if (n.kind !== "feature") continue;
      const raw = this.model.doc.nodes[n.index];
      if (n.key === key || n.key === `${layer}_${number}` || String(raw?.feature) === key) {
        this.model.labels.set(n.key, label);
        return;
      }
    }
  }

  setPins(pinned: string[], groups: Supernode[]): void {
    const known = (id: string) => this.model.byId.has(id), taken = new Set<string>();
    this.groups = groups.flatMap(({ label, ids }) => {
      const own = ids.filter((id) => known(id) && !taken.has(id)); // a node is in one group
      own.forEach((id) => taken.add(id));
      return own.length ? [{ label, ids: own }] : [];
    });
    this.pinned = [...new Set([...pinned.filter(known), ...this.groups.flatMap((g) => g.ids)])];
  }

  stands(n: GraphNode, model: Model): boolean { return stands(this, n, model); }
  folds(n: GraphNode, model: Model): boolean { return folds(this, n, model); }
  shows = (n: GraphNode): boolean => n === this.selected || this.stands(n, this.model) || this.isPinned(n);
  folded = (n: GraphNode): boolean => this.folds(n, this.model) && !this.shows(n);
  drawn = (n: GraphNode): boolean => this.shows(n) || this.folds(n, this.model);
  matches = (n: GraphNode): boolean => this.model.found(n, this.query);
  isPinned = (n: GraphNode): boolean => this.pinned.length > 0 && this.pinned.includes(n.id);
  nFeatures(of: (n: GraphNode) => boolean): number { return this.model.nodes.reduce((sum, n) => sum + Number(n.kind === "feature" && of(n)), 0); }

  select(n: GraphNode | null): void {
    this.selected = n;
    this.group = null;
    this.path = [];
    if (n) this.tab = "node";
    if (this.patchOf && n?.kind === "feature") this.patchOf = { name: this.model.label(n), ids: [n.id] };
    this.changed("graph", "side");
  }

  /** Select a node for the picture and leave the side as it is. */
  light(n: GraphNode): void {
    this.selected = n;
    this.group = null;
    this.path = [];
    this.changed("graph");
  }

  /** Show a head, and where it attends if that is said; without a head all heads. */
  openHead(head: Head | null, cell: [number, number] | null = null): void {
    this.head = head;
    this.cell = cell ?? (head && this.attention?.ofHead(head)[0]?.cell) ?? null;
    this.showTab("attention");
  }

  selectGroup(group: Supernode | null): void {
    this.selected = null;
    this.group = group;
    this.path = [];
    if (group) this.tab = "node";
    if (this.patchOf && group) this.patchOf = { name: group.label, ids: this.features(group.ids) };
    this.changed("graph", "side");
  }

  /** Those of some nodes that a patch can change. */
  features(ids: string[]): string[] { return ids.filter((id) => this.model.byId.get(id)?.kind === "feature"); }

  /** Open the patch panel, or close it. */
  openPatch(of: PatchOf | null): void {
    this.patchOf = of && { name: of.name, ids: this.features(of.ids) };
    if (!this.patchOf?.ids.length) this.patchOf = null;
    this.changed("patches");
  }

  /** Nodes that take part in the score that the side shows. */
  attending(): Set<string> {
    const shown = this.tab === "attention" && this.head && this.cell && this.attention?.find(this.head, this.cell);
    return new Set(shown ? [...shown.sides.query, ...shown.sides.key].map((piece) => piece.node.id) : []);
  }

  showPath(links: number[]): void { this.path = links; this.changed("graph"); }
  showTab(tab: Tab): void { this.tab = tab; this.changed("side", "cell"); }
  showView(view: ViewName): void { this.view = view; this.changed("view"); }

  setLabel(n: GraphNode, label: string): void {
    this.model.labels.set(n.key, label);
    this.changed("graph", "side", "pins", "labels");
  }

  togglePin(n: GraphNode): void {
    if (this.isPinned(n)) {
      this.pinned = this.pinned.filter((id) => id !== n.id);
      for (const g of this.groups) g.ids = g.ids.filter((id) => id !== n.id);
      this.dropEmpty();
    } else this.pinned.push(n.id);
    this.changed("graph", "side", "pins");
  }

  pinAll(nodes: GraphNode[]): void {
    this.pinned = [...new Set([...this.pinned, ...nodes.map((n) => n.id)])];
    this.changed("graph", "side", "pins");
  }

  clearPins(): void {
    this.pinned = [];
    this.groups = [];
    this.group = null;
    this.patchOf = null;
    this.marked.clear();
    this.positions.clear();
    this.changed("graph", "side", "pins");
  }

  /** What the subgraph shows: groups, then pinned nodes that are in none. */
  cards(): Card[] {
    const grouped = new Set(this.groups.flatMap((g) => g.ids)), node = (id: string) => this.model.byId.get(id) as GraphNode;
    return [
      ...this.groups.map((g) => ({ id: `+${g.ids[0] ?? ""}`, label: g.label, members: g.ids.map(node), group: true })),
      ...this.pinned.filter((id) => !grouped.has(id)).map((id) => ({ id, label: this.model.label(node(id)), members: [node(id)], group: false })),
    ];
  }

  groupMarked(): void {
    const chosen = this.cards().filter((card) => this.marked.has(card.id));
    if (chosen.length < 2) return;
    const ids = chosen.flatMap((card) => card.members.map((n) => n.id)), inGroup = new Set(ids);
    const label = chosen.find((card) => card.group)?.label ?? chosen[0]?.label ?? "group";
    this.groups = this.groups.filter((g) => !g.ids.some((id) => inGroup.has(id)));
    const made = { label, ids };
    this.groups.push(made);
    this.marked.clear();
    this.selectGroup(made);
    this.changed("pins");
  }

  ungroup(group: Supernode): void {
    this.groups = this.groups.filter((g) => g !== group);
    this.marked.clear();
    if (this.group === group) this.group = null;
    this.changed("graph", "side", "pins");
  }

  rename(group: Supernode, label: string): void {
    group.label = label;
    if (this.patchOf && this.group === group) this.patchOf = { ...this.patchOf, name: label };
    this.changed("side", "pins");
  }

  private dropEmpty(): void {
    this.groups = this.groups.filter((g) => g.ids.length);
    if (this.group && !this.groups.includes(this.group)) this.group = null;
  }

  /** Draw the errors of a column, or its sink, one by one; or together again. */
  unfold(pos: number): void {
    if (!this.unfolded.delete(pos)) this.unfolded.add(pos);
    this.changed("filter", "columns");
  }

  filter(change: { threshold?: number; errors?: boolean; query?: string }): void {
    Object.assign(this, change);
    this.changed("filter", ...(change.query === undefined ? ["columns" as const] : []));
  }
}
