// Ties the views to the state.

import { App, type Part, TABS, type ViewName } from "./app";
import { Compare } from "./compare";
import { asObject, asText, type Payload } from "./document";
import { $, count, el, percent, plural, visible } from "./dom";
import { Divider } from "./divider";
import { Features } from "./features";
import { asSvg } from "./figure";
import { exportAs, fetchOther, listOthers, openFiles, tell } from "./files";
import type { GraphNode } from "./model";
import { showSide } from "./panel";
import { Patches } from "./patches";
import { Picture, say } from "./picture";
import { Saver } from "./save";
import { fromHash, toDocument, toHash } from "./state";
import { showStory } from "./story_panel";
import { Subgraph } from "./subgraph";
import { mergeLinks } from "./supernodes";
import { showTable } from "./table";

const PROMPT = 130; // letters of it in the header

const started = performance.now();
const payload = JSON.parse($("data").textContent ?? "null") as Payload;
const app = new App(payload);
const saver = app.serve && new Saver(app); // ahead of what the address adds to the file
fromHash(app, location.hash);
const features = new Features(app);
const picture = new Picture(app, $("graph"), { model: () => app.model, mark: () => null, says: true, choose: (n) => app.select(n) });
const subgraph = new Subgraph(app);
const patches = new Patches(app);
const compare = new Compare(app);
const main = document.querySelector("main") as HTMLElement, left = document.querySelector(".left") as HTMLElement;
const dividers = [new Divider(app, "side", main), new Divider(app, "lower", left)];
const slider = $<HTMLInputElement>("slider"), errors = $<HTMLInputElement>("errors"), search = $<HTMLInputElement>("search");

/** A chat as roles and what they said; of a long one the end. */
function chat(messages: unknown[]): (HTMLElement | string)[] {
  const parts: (HTMLElement | string)[] = [];
  let left = PROMPT;
  for (const { role, content } of messages.map(asObject).reverse()) {
    if (left <= 0) { parts.unshift("… "); break; }
    const letters = Array.from(visible(asText(content))), cut = letters.length > left ? "…" : "";
    parts.unshift(el("span", "role", visible(asText(role))), ` ${cut}${letters.slice(-left).join("")} `);
    left -= letters.length;
  }
  return parts;
}

function header(): void {
  const { model } = app, { metadata, jaxclt } = model.doc, first = model.logits[0];
  const whole = visible(metadata.prompt), letters = Array.from(whole);
  const prompt = letters.length > PROMPT ? `…${letters.slice(-PROMPT).join("")}` : whole; // its end is what is explained
  document.title = `Attribution graph · ${whole.slice(0, 80)}`;
  $("h1").replaceChildren(...(Array.isArray(jaxclt.messages) ? chat(jaxclt.messages) : [prompt || "Attribution graph"]));
  if (first && !first.target) $("h1").append(el("span", "next", ` → ${visible(first.token).trim()}`), el("span", "prob", ` ${percent(first.prob)}`));
  else if (first && model.logits.length === 1) $("h1").append(el("span", "next", ` · ${visible(first.token).trim()}`));
  $("h1").title = metadata.prompt.slice(0, 1000);
  const listed = Array.isArray(metadata.transcoder_list) ? metadata.transcoder_list[0] : "";
  $("meta").textContent = [jaxclt.model || metadata.scan, jaxclt.dictionary || listed, jaxclt.version ? `jaxclt ${String(jaxclt.version)}` : ""]
    .filter(Boolean).map(String).join(" · ");
  showStory(app);
}

function counts(): void {
  const { model } = app;
  $("count").textContent = `${count(app.nFeatures(app.shows))} of ${plural(app.nFeatures((n) => n.linked), "feature")}`;
  $("count").title = app.allLinks > model.source.length ? `with the strongest ${count(model.source.length)} of ${count(app.allLinks)} links` : "";
  const found = app.query === "" ? [] : model.nodes.filter((n) => n.linked && app.matches(n)), seen = found.filter((n) => app.shows(n)).length;
  $("found").hidden = app.query === "";
  $("found").textContent = `${count(seen)}${found.length > seen ? ` of ${count(found.length)}` : ""} ${found.length === 1 ? "match" : "matches"}`;
  $("found").title = found.length > seen ? "The others are hidden by the slider, or folded into a rail or a sink" : "";
}

function controls(): void {
  slider.min = "0";
  slider.max = String(app.highest);
  slider.value = String(app.threshold);
  slider.setAttribute("aria-valuetext", percent(app.threshold));
  errors.checked = app.errors;
  $("measure").textContent = app.model.byChange ? "Change" : "Influence";
  ($("measure").parentElement as HTMLElement).title = `Show the nodes that matter most, until they hold this share of all ${app.model.byChange ? "change from the counterfactual prompt" : "influence"}`;
  for (const what of ["rail", "sink", "bars"] as const) {
    const has = what === "rail" ? app.model.nodes.some((n) => n.kind === "error") : what === "sink" ? app.model.story.sink.positions.size > 0 : app.model.story.tokens.length > 0;
    for (const line of document.querySelectorAll<HTMLElement>(`.legend .${what}`)) line.hidden = !has;
  }
  for (const reading of ["value", "response"] as const) $(`by-${reading}`).setAttribute("aria-pressed", String(app.model.reading === reading));
  $("readings").hidden = !app.model.hasResponse;
  for (const line of document.querySelectorAll<HTMLElement>(".legend .attended")) line.hidden = app.model.reading === "value";
  if (search.value.trim().toLowerCase() !== app.query) search.value = app.query;
}

function showView(): void {
  for (const view of ["graph", "table", "compare"] as const) {
    $(`view-${view}`).setAttribute("aria-pressed", String(app.view === view));
    $(view === "graph" ? "graphview" : view).hidden = app.view !== view;
  }
  $("lower").hidden = $("divide-lower").hidden = app.view === "compare";
  if (app.view === "graph") picture.resize();
  if (app.view === "compare") compare.show();
}

let address = 0;
function writeAddress(): void {
  clearTimeout(address);
  address = window.setTimeout(() => {
    try {
      const hash = toHash(app);
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch { /* a notebook's frame has no address to write to */ }
  }, 150);
}

app.listen((changed: ReadonlySet<Part>) => {
  const any = (...parts: Part[]) => parts.some((p) => changed.has(p));
  if (any("model")) { header(); controls(); features.embedded(); }
  if (any("model", "compare")) compare.reset();
  if (any("pins", "model", "labels") || (any("side") && app.pinned.length)) subgraph.show();
  if (any("patches", "side", "pins", "model")) patches.show();
  if (any("layout", "model")) for (const divider of dividers) divider.apply();
  if (any("view", "model", "compare")) showView();
  if (any("columns")) { if (app.view === "compare") compare.again(); else picture.again(); }
  else if (any("graph", "pins", "labels", "filter", "cell")) { if (app.view === "compare") compare.redraw(); else picture.draw(); }
  if (any("filter", "graph", "pins")) counts();
  if (any("side", "labels") || (any("patches") && app.tab === "evidence")) showSide(app, features);
  if (any("filter")) controls();
  if (app.view === "table" && any("graph", "filter", "view", "labels")) showTable(app);
  if (any("graph") && app.view === "graph") {
    if (app.selected) picture.reveal(app.selected);
    say(app, app.selected);
  }
  writeAddress();
});

// ---- controls ----------------------------------------------------------------------------
for (const view of ["graph", "table", "compare"] as ViewName[]) $(`view-${view}`).addEventListener("click", () => app.showView(view));
for (const reading of ["value", "response"] as const) $(`by-${reading}`).addEventListener("click", () => app.showReading(reading));
for (const [i, tab] of TABS.entries()) {
  $(`tab-${tab}`).addEventListener("click", () => app.showTab(tab));
  $(`tab-${tab}`).addEventListener("keydown", (e) => {
    const step = e.key === "ArrowRight" ? 1 : e.key === "ArrowLeft" ? -1 : 0, next = TABS[(i + step + TABS.length) % TABS.length] ?? tab;
    if (step) { app.showTab(next); $(`tab-${next}`).focus(); }
  });
}
slider.addEventListener("input", () => app.filter({ threshold: Number(slider.value) }));
errors.addEventListener("change", () => app.filter({ errors: errors.checked }));
let nextMatch = 0;
search.addEventListener("input", () => { nextMatch = 0; app.filter({ query: search.value.trim().toLowerCase() }); });
search.addEventListener("keydown", (e) => {
  if (e.key !== "Enter") return;
  const found = app.model.ranked.filter((n) => app.shows(n) && app.matches(n)), n = found[nextMatch++ % Math.max(found.length, 1)];
  if (n) app.select(n);
});
$("zoomin").addEventListener("click", () => picture.zoom(1.4));
$("zoomout").addEventListener("click", () => picture.zoom(1 / 1.4));
$("zoomfit").addEventListener("click", () => picture.fit());

const picker = $<HTMLInputElement>("file");
let comparing = false;
const pick = (other: boolean) => { comparing = other; picker.value = ""; picker.click(); };
$("open").addEventListener("click", () => pick(false));
for (const opener of document.querySelectorAll(".openother")) opener.addEventListener("click", () => pick(true));
picker.addEventListener("change", () => { void openFiles(app, features, picker.files ?? [], comparing); });
document.addEventListener("dragover", (e) => e.preventDefault());
document.addEventListener("drop", (e) => {
  e.preventDefault();
  void openFiles(app, features, e.dataTransfer?.files ?? [], app.view === "compare");
});
$<HTMLSelectElement>("export").addEventListener("change", (e) => {
  const select = e.target as HTMLSelectElement;
  void exportAs(app, picture, subgraph, select.value);
  select.value = "";
});
if (saver) {
  const list = $<HTMLSelectElement>("others");
  let listed = false;
  $("save").hidden = false;
  $("save").addEventListener("click", () => { void saver.save(); });
  $("home").hidden = false;
  list.hidden = false;
  app.listen(() => {
    if (app.view !== "compare" || listed) return;
    listed = true;
    void listOthers(app, list);
  });
  list.addEventListener("change", () => { if (list.value) void fetchOther(app, list.value); });
}
$("notice").addEventListener("click", () => tell(""));

document.addEventListener("keydown", (e) => {
  const typing = e.target instanceof HTMLInputElement && ["search", "text", "number"].includes(e.target.type);
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Escape" && e.target === search && search.value) { search.value = ""; app.filter({ query: "" }); return; }
  if (e.key === "Escape" && app.path.length) app.showPath([]);
  else if (e.key === "Escape") app.select(null);
  if (typing) return;
  if (e.key === "/") { e.preventDefault(); search.focus(); }
  if (e.key === "?") app.showTab("help");
  if (e.key === "g") app.groupMarked();
  if (e.key === "0" && app.view === "graph") picture.fit();
});
new ResizeObserver(() => { if (app.view === "graph" && !picture.fits()) picture.resize(); }).observe($("graph"));
new ResizeObserver(() => { if (app.view === "compare") compare.show(); }).observe($("compare"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { picture.restyle(); compare.restyle(); });
window.addEventListener("hashchange", () => {
  fromHash(app, location.hash);
  app.changed("graph", "side", "pins", "labels", "filter", "view", "layout");
});

header();
compare.reset();
app.changed("model", "side", "pins", "filter", "view");
if (app.notes.length) tell(app.notes.join("; "));

/** For tests and benchmarks, and for the console. */
(window as unknown as Record<string, unknown>).__jaxclt = {
  readyMs: performance.now() - started,
  app,
  state: app,
  features,
  get nodes(): GraphNode[] { return app.model.nodes; },
  select: (id: string) => app.select(app.model.byId.get(id) ?? null),
  where: (id: string) => { const n = app.model.byId.get(id); return n ? picture.where(n) : null; },
  document: () => toDocument(app),
  rails: () => picture.rails(),
  svg: () => asSvg(picture.drawing(), app.model.doc.metadata.prompt),
  compared: () => compare.said,
  cards: () => app.cards(),
  cardLinks: () => mergeLinks(app.model, app.cards()),
};
