// A view in the address and in the file, in the words other viewers use too.

import { type App, TABS, type Tab, type ViewName } from "./app";
import { numbersOf } from "./columns";
import { type Json, asText, readView } from "./document";
import { toPlaces } from "./supernodes";

/** The address's hash: only what differs from a fresh page. */
export function toHash(app: App): string {
  const q = new URLSearchParams(), grouped = new Set(app.groups.flatMap((g) => g.ids));
  if (app.selected) q.set("clickedId", app.selected.id);
  const single = app.pinned.filter((id) => !grouped.has(id));
  if (single.length) q.set("pinnedIds", single.join(","));
  if (app.groups.length) q.set("supernodes", JSON.stringify(app.groups.map((g) => [g.label, ...g.ids])));
  if (app.model.labels.size) q.set("clerps", JSON.stringify([...app.model.labels]));
  if (app.threshold !== app.first) q.set("pruningThreshold", String(app.threshold));
  if (app.errors) q.set("errors", "1");
  if (app.unfolded.size) q.set("unfolded", [...app.unfolded].join("."));
  if (app.positions.size) q.set("cards", JSON.stringify(cardsOf(app)));
  if (app.view !== "graph") q.set("view", app.view);
  if (app.tab !== "node") q.set("tab", app.tab);
  if (app.model.hasResponse && app.model.reading !== "value") q.set("reading", app.model.reading);
  if (app.head) q.set("attention", [...app.head, ...(app.cell ?? [])].join("."));
  for (const name of ["side", "lower"] as const) {
    const share = app.panels[name];
    if (share !== null) q.set(name, share.toFixed(1));
  }
  return q.toString();
}

export function cardsOf(app: App): [string, number, number][] {
  return app.cards().flatMap(({ id }) => {
    const at = app.positions.get(id);
    return at ? [[id, Math.round(at[0]), Math.round(at[1])] as [string, number, number]] : [];
  });
}


export function fromHash(app: App, hash: string): void {
  const q = new URLSearchParams(hash.replace(/^#/, ""));
  if (![...q.keys()].length) return;
  const view = readView(Object.fromEntries(q));
  for (const [key, label] of view.clerps) app.readLabel(key, label);
  app.setPins(view.pinned, view.supernodes);
  app.selected = app.model.byId.get(view.clicked) ?? null;
  app.take(q.get("reading") === "response" ? "response" : "value", view.threshold);
  app.place(view.cards);
  for (const name of ["side", "lower"] as const) {
    const share = Number(q.get(name) ?? NaN);
    app.panels[name] = Number.isFinite(share) ? share : null;
  }
  app.errors = q.get("errors") === "1";
  app.unfolded.clear();
  for (const pos of (q.get("unfolded") ?? "").split(".")) if (/^\d+$/.test(pos)) app.unfolded.add(Number(pos));
  if (["table", "compare"].includes(q.get("view") ?? "")) app.view = q.get("view") as ViewName;
  if (TABS.some((tab) => tab === q.get("tab"))) app.tab = q.get("tab") as Tab;
  const [layer, head, query, key] = (q.get("attention") ?? "").split(".").map((part) => (/^\d+$/.test(part) ? Number(part) : undefined));
  app.head = layer === undefined || head === undefined ? null : [layer, head];
  app.cell = query === undefined || key === undefined ? null : [query, key];
}

/** What the server writes into the graph's file, with the ids that the file has. */
export function toSave(app: App): Json {
  const written = (id: string) => app.model.doc.written[app.model.byId.get(id)?.index ?? -1] ?? id;
  return state(app, written);
}

function state(app: App, name: (id: string) => string): { labels: Json; qParams: Json } {
  const labels: Record<string, string> = {};
  for (const n of app.model.nodes) {
    const label = n.kind === "feature" ? app.model.labels.get(n.key) : undefined;
    if (label !== undefined) labels[name(n.id)] = label;
  }
  return {
    labels,
    qParams: {
      pinnedIds: app.pinned.map(name),
      supernodes: app.groups.map((g) => [g.label, ...g.ids.map(name)]),
      linkType: "both",
      clickedId: app.selected ? name(app.selected.id) : "",
      // Other viewers lay out for themselves while nothing was dragged.
      sg_pos: app.positions.size ? toPlaces(app.model, app.cards(), app.placed) : "",
      ...(app.positions.size ? { cards: cardsOf(app) } : {}),
    },
  };
}

/** The graph with the reader's labels and groups, as circuit-tracer and Neuronpedia
 * read it. */
export function toDocument(app: App): Json {
  const { model } = app, { doc } = model, slug = (text: string) => text.replace(/[^a-zA-Z0-9_.-]+/g, "-") || "graph";
  const extra = new Map(doc.links.extra);
  return {
    metadata: { ...doc.metadata, slug: slug(doc.metadata.slug), scan: slug(doc.metadata.scan) },
    qParams: state(app, (id) => id).qParams,
    nodes: model.nodes.map((n) => {
      const raw = doc.nodes[n.index] as Json, clerp = asText(raw.clerp);
      const output = /^Output "[\s\S]*" \(p=/.test(clerp) ? clerp : `Output "${n.token.replaceAll('"', "”")}" (p=${n.prob.toFixed(3)})`;
      return {
        ...raw, layer: String(raw.layer), feature: raw.feature ?? null, jsNodeId: asText(raw.jsNodeId) || n.id,
        clerp: n.kind === "logit" ? output : n.kind === "feature" ? model.named(n) : clerp,
      };
    }),
    links: Array.from(model.source, (_, e) => ({ source: model.from(e).id, target: model.to(e).id, ...numbersOf(doc.links, e), ...extra.get(e) })),
    jaxclt: doc.jaxclt,
    ...doc.rest,
  };
}
