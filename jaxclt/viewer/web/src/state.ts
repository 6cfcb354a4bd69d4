// A view in the address and in the file, in the words other viewers use too.

import type { App, Tab, ViewName } from "./app";
import { type Json, asText, readView } from "./document";

/** The address's hash: only what differs from a fresh page. */
export function toHash(app: App): string {
  const q = new URLSearchParams(), grouped = new Set(app.groups.flatMap((g) => g.ids));
  if (app.selected) q.set("clickedId", app.selected.id);
  const single = app.pinned.filter((id) => !grouped.has(id));
  if (single.length) q.set("pinnedIds", single.join(","));
  if (app.groups.length) q.set("supernodes", JSON.stringify(app.groups.map((g) => [g.label, ...g.ids])));
  if (app.model.labels.size) q.set("clerps", JSON.stringify([...app.model.labels]));
  if (app.threshold < app.highest) q.set("pruningThreshold", String(app.threshold));
  if (!app.errors) q.set("errors", "0");
  if (app.view !== "graph") q.set("view", app.view);
  if (app.tab !== "node") q.set("tab", app.tab);
  return q.toString();
}

export function fromHash(app: App, hash: string): void {
  const q = new URLSearchParams(hash.replace(/^#/, ""));
  if (![...q.keys()].length) return;
  const view = readView(Object.fromEntries(q));
  for (const [key, label] of view.clerps) app.readLabel(key, label);
  app.setPins(view.pinned, view.supernodes);
  app.selected = app.model.byId.get(view.clicked) ?? null;
  app.threshold = Math.min(view.threshold ?? app.highest, app.highest);
  app.errors = q.get("errors") !== "0";
  if (["table", "compare"].includes(q.get("view") ?? "")) app.view = q.get("view") as ViewName;
  if (["evidence", "help"].includes(q.get("tab") ?? "")) app.tab = q.get("tab") as Tab;
}

/** What the server writes into the graph's file. */
export function toSave(app: App): Json {
  const labels: Record<string, string> = {};
  for (const n of app.model.nodes) {
    const label = n.kind === "feature" ? app.model.labels.get(n.key) : undefined;
    if (label !== undefined) labels[n.id] = label;
  }
  return {
    labels,
    qParams: {
      pinnedIds: app.pinned,
      supernodes: app.groups.map((g) => [g.label, ...g.ids]),
      linkType: "both",
      clickedId: app.selected?.id ?? "",
      sg_pos: "",
    },
  };
}

/** The graph with the reader's labels and groups, as circuit-tracer and Neuronpedia
 * read it. */
export function toDocument(app: App): Json {
  const { model } = app, { doc } = model, name = (text: string) => text.replace(/[^a-zA-Z0-9_.-]+/g, "-") || "graph";
  const extra = new Map(doc.links.extra);
  return {
    metadata: { ...doc.metadata, slug: name(doc.metadata.slug), scan: name(doc.metadata.scan) },
    qParams: toSave(app).qParams,
    nodes: model.nodes.map((n) => {
      const raw = doc.nodes[n.index] as Json, clerp = asText(raw.clerp);
      const output = /^Output "[\s\S]*" \(p=/.test(clerp) ? clerp : `Output "${n.token.replaceAll('"', "”")}" (p=${n.prob.toFixed(3)})`;
      return {
        ...raw, layer: String(raw.layer), feature: raw.feature ?? null, jsNodeId: asText(raw.jsNodeId) || n.id,
        clerp: n.kind === "logit" ? output : n.kind === "feature" ? model.named(n) : clerp,
      };
    }),
    links: doc.links.weight.map((weight, e) => ({ source: model.from(e).id, target: model.to(e).id, weight, ...extra.get(e) })),
    jaxclt: doc.jaxclt,
    ...doc.rest,
  };
}
