// Files in and out: open, save, export; nothing leaves the page but by the reader.

import type { App } from "./app";
import { asObject, asText, readDocument, readSupernodes, readView } from "./document";
import { $, el, inPath, plural, visible } from "./dom";
import { type Features, isFeatureFile } from "./features";
import { asSvg, rasterised, stacked } from "./figure";
import type { Picture } from "./picture";
import { toDocument } from "./state";
import type { Subgraph } from "./subgraph";

/** A line the reader sees and hears. */
export function tell(text: string, bad = false): void {
  const box = $("notice");
  box.textContent = text;
  box.classList.toggle("bad", bad);
  box.hidden = text === "";
}

export async function openFiles(app: App, features: Features, files: Iterable<File>, compare: boolean): Promise<void> {
  let taken = 0;
  for (const file of files) {
    try {
      const raw: unknown = JSON.parse(await file.text());
      if (isFeatureFile(raw)) { features.add(file.name, asObject(raw)); taken += 1; }
      else open(app, features, raw, compare);
    } catch (error) {
      const why = error instanceof SyntaxError ? "it is no JSON" : error instanceof Error ? error.message : String(error);
      tell(`${file.name} was not opened: ${why}`, true);
      return;
    }
  }
  tell(taken ? `${plural(taken, "feature")} loaded` : app.notes.join("; "));
  if (taken) app.changed("side");
}

function open(app: App, features: Features, raw: unknown, compare: boolean): void {
  const doc = asObject(raw);
  if (Array.isArray(raw)) { // supernodes, as `jaxclt patch --supernodes` takes them
    const groups = readSupernodes(raw);
    if (!groups.length) throw new Error("it holds no supernodes [[label, node id, ...], ...]");
    app.setPins(app.pinned, groups);
    app.changed("graph", "side", "pins");
  } else if (compare) {
    app.view = "compare";
    app.compareWith(readDocument(raw));
  } else if (doc.qParams && !doc.nodes) { // a view alone
    const view = readView(doc.qParams);
    app.setPins(view.pinned, view.supernodes);
    app.place(view.cards, view.places);
    app.select(app.model.byId.get(view.clicked) ?? null);
    app.changed("graph", "pins");
  } else {
    app.load(readDocument(raw));
    features.embedded();
  }
}

function download(name: string, data: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(data);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** What the menu says: json, or graph, subgraph or both as svg or png. */
export async function exportAs(app: App, picture: Picture, subgraph: Subgraph, kind: string): Promise<void> {
  const { slug, prompt } = app.model.doc.metadata, name = slug.replace(/[^a-zA-Z0-9_.-]+/g, "-") || "graph";
  if (kind === "json") {
    download(`${name}.json`, new Blob([JSON.stringify(toDocument(app))], { type: "application/json" }));
    if (app.allLinks > app.model.source.length) tell("The file holds the links of this page; graph.npz has them all.");
    return;
  }
  const [what, type] = kind.split("."), cards = what === "graph" ? null : subgraph.drawing();
  if (what !== "graph" && !cards) { tell("The subgraph is empty: pin nodes (p), or press Suggest", true); return; }
  if (what !== "subgraph" && app.view !== "graph") app.showView("graph"); // a picture needs its room
  const drawings = [...(what === "subgraph" ? [] : [picture.drawing()]), ...(cards ? [cards] : [])];
  const whole = stacked(drawings), text = asSvg(whole, prompt), file = what === "graph" ? name : `${name}-${what}`;
  if (type === "svg") download(`${file}.svg`, new Blob([text], { type: "image/svg+xml" }));
  else try { download(`${file}.png`, await rasterised(text, whole)); } catch { tell("The picture is too large for a PNG: take the SVG", true); }
}

/** Fill the list of the server's other graphs, once it is wanted. */
export async function listOthers(app: App, list: HTMLSelectElement): Promise<void> {
  const answer = await fetch("/api/graphs").catch(() => null);
  if (!answer?.ok) { tell("The server does not answer", true); return; }
  for (const item of (await answer.json()) as unknown[]) {
    const { path, prompt, slug, error } = asObject(item);
    if (error !== undefined || path === app.serve?.path) continue;
    list.append(Object.assign(el("option", "", visible(asText(prompt) || asText(slug)).slice(0, 80)), { value: asText(path) }));
  }
}

export async function fetchOther(app: App, path: string): Promise<void> {
  try {
    const answer = await fetch(`/api/graph/${inPath(path)}`);
    if (!answer.ok) throw new Error(String(answer.status));
    app.compareWith(readDocument(await answer.json()));
  } catch (error) {
    tell(`${path} was not opened: ${error instanceof Error ? error.message : String(error)}`, true);
  }
}
