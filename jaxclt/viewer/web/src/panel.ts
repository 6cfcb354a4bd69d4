// The side: what is selected, with its inputs and outputs.

import { type App, type PatchOf, TABS } from "./app";
import { headName } from "./attention";
import { attendedBy, attentionPanel, open } from "./attention_panel";
import type { Supernode } from "./document";
import { $, button, clip, count, editText, el, fact, percent, plural, quoted, short, signed, spaced, visible } from "./dom";
import { evidence } from "./evidence";
import type { Features } from "./features";
import { type GraphNode, isBelow, verb } from "./model";
import { type Path, pathsToInputs, pathsToTargets } from "./paths";
import { dashboardLink, groupFacts, labelSource, says, sinkNote, tokenFacts } from "./says";
import { mergeLinks } from "./supernodes";

const LIST_ROWS = 60, PATHS = 3;

let shown = ""; // what the side is about, to stay where the reader is while that is the same

export function showSide(app: App, features: Features): void {
  for (const tab of TABS) {
    $(`tab-${tab}`).setAttribute("aria-selected", String(app.tab === tab));
    $(`tab-${tab}`).tabIndex = app.tab === tab ? 0 : -1;
  }
  const body = $("sidebody");
  body.setAttribute("aria-labelledby", `tab-${app.tab}`);
  const about = [app.tab, ...(app.tab === "node" ? [app.selected?.id, app.group?.label] : [app.head])].join(" "), at = body.scrollTop;
  if (app.tab === "attention") body.replaceChildren(...attentionPanel(app));
  else if (app.tab === "evidence") body.replaceChildren(...evidence(app));
  else if (app.tab === "help") body.replaceChildren(...help());
  else if (app.group) body.replaceChildren(...groupPanel(app, app.group));
  else if (app.selected) body.replaceChildren(...nodePanel(app, features, app.selected));
  else body.replaceChildren(...overview(app));
  body.scrollTop = about === shown ? at : 0;
  shown = about;
}

function overview(app: App): HTMLElement[] {
  const { model } = app, list = el("ul", "links out");
  list.setAttribute("aria-label", "Outputs");
  for (const l of model.logits) {
    const bar = el("b");
    bar.style.width = `${100 * l.prob}%`;
    const row = button("", "", () => app.select(l));
    row.append(el("span", "name", spaced(l.token)), el("span", "bar", bar), el("span", "right", l.target && model.logits.length === 1 ? "" : percent(l.prob)));
    list.append(el("li", "", row));
  }
  const title = model.logits.some((l) => l.target) ? "What the graph explains" : "What the model says next";
  const notes = app.notes.map((text) => el("p", "note", text));
  return [
    el("div", "head", el("div", "", el("h2", "", title), el("p", "", "Choose an output, or any node, to see what feeds it."))),
    list, ...notes,
    el("h3", "", "How to read the graph"),
    el("p", "note", "Each column is a token of the prompt, each row a layer. Circles are features the model switched on there; larger ones matter more for the output. Lines are direct effects, those among what is shown that carry most of the output. “·” stands for a space."),
    el("p", "note", "The thin line beside each token is what the features leave unexplained there (errors), with its share of all that the output rests on. Press it, or Errors above, to see each. The slider shows more features, or fewer."),
    el("p", "note", `A share, here as in the command's tables, says how much one link makes up of all that its target reads, counted without sign, shown or not; along a path shares multiply. ${model.reading === "value"
      ? "The weight is the effect itself: with constant terms and what was pruned, a feature's weights add up to its pre-activation, an output's to its logit."
      : "The response is what a small change of the source does, attention and norms live and other features held; responses need not add up. Dotted links act mostly through what heads attend to."} ↑ acts at the same token, ↗ on a later one.`),
    el("p", "note", "+ strengthens a feature, − weakens it, on whichever side of zero its activation is; of an output, + raises the logit. So the signs along a path multiply."),
  ];
}

function nodePanel(app: App, features: Features, n: GraphNode): HTMLElement[] {
  const { model } = app, token = model.tokens[n.pos] ?? "", named = visible(model.named(n));
  const kind = {
    feature: `Feature ${n.number}`, error: "Error", embedding: `Token ${quoted(token)}`,
    logit: `${model.isOutput(n) ? "Output" : "Target"} ${quoted(n.token)}`,
  }[n.kind];
  const title = el("h2", "", clip((n.kind === "feature" && named) || kind, 300));
  title.tabIndex = -1;
  const place = n.kind === "embedding" ? `position ${n.pos}`
    : n.kind === "logit" ? `${n.target && n.target.layer !== null ? `layer ${n.target.layer}, position` : "after position"} ${n.pos}`
    : `layer ${n.layer}, token ${quoted(clip(token, 60))} (position ${n.pos})`;
  const where = [n.kind === "feature" && named ? `${kind}, ${place}` : place, labelSource(model, n)].filter(Boolean).join(" · ");
  const actions = el("div", "actions");
  const pin = button(app.isPinned(n) ? "Unpin" : "Pin", "plain", () => { app.togglePin(n); ($("sidebody").querySelector(".actions button") as HTMLElement).focus(); });
  pin.title = "Pinned nodes form the subgraph (key p)";
  pin.setAttribute("aria-pressed", String(app.isPinned(n)));
  actions.append(pin);
  if (n.kind === "feature") {
    actions.append(button("Label", "plain", () => editText(title, model.named(n), "Label of this feature", (text) => app.setLabel(n, text))));
  }
  if (n.kind === "feature") actions.append(patchButton(app, { name: model.label(n), ids: [n.id] }));
  const shown = dashboardLink(model, n);
  if (shown) actions.append(shown);
  actions.append(button("Clear", "plain", () => { app.select(null); $("graph").focus(); }));
  const facts = el("dl", "facts", ...tokenFacts(model, n));
  if (n.activation !== null) facts.append(fact("Activation", short(n.activation)));
  if (n.kind === "logit" && !n.target) facts.append(fact("Probability", percent(n.prob)));
  if (n.target && n.prob < 1) facts.append(fact("Weight", percent(n.prob)));
  if (n.target) facts.append(fact("Value", short(n.target.readout)));
  if (n.rank !== null) facts.append(fact(model.byChange ? "Change rank" : "Influence rank", `${count(n.rank)} of ${count(model.nRanked)}`));
  if (n.derivative !== null) {
    facts.append(fact("Derivative", signed(n.derivative), "What a small change of what it writes does in the model itself, everything else live"));
    if (n.hidden !== null) facts.append(fact("Hidden", signed(n.hidden), "The part of the derivative that this graph does not show"));
  }
  if (n.absInput && n.read > 0 && model.reading === "value") facts.append(fact("Inputs shown", `${percent(Math.min(1, n.read / n.absInput))} of all it reads`));
  const parts: HTMLElement[] = [el("div", "head", el("div", "", title, el("p", "", where)), actions)];
  if (facts.children.length) parts.push(facts);
  if (isBelow(n)) parts.push(el("p", "note", "Below zero: what strengthens it (+) makes it more negative, so the weights of its inputs have the other sign."));
  const own = says(model, n), sink = sinkNote(model, n);
  if (own) parts.push(own);
  if (sink) parts.push(el("p", "note", sink));
  if (n.kind === "error") parts.push(el("p", "note", "What the features of this layer get wrong here, taken as given: nothing feeds it."));
  const feature = n.kind === "feature" ? features.panel(n) : null;
  if (feature) parts.push(feature);
  else if (n.kind === "feature") {
    void features.request(n).then((found) => { if (found && app.selected === n) app.changed("side"); });
  }
  parts.push(pathsBox(app, n));
  if (n.kind === "feature" || n.kind === "logit") parts.push(...linkList(app, "Inputs", model.insOf(n), true));
  if (n.kind !== "logit") parts.push(...linkList(app, "Outputs", model.outsOf(n), false));
  parts.push(...attendedBy(app, n));
  return parts;
}

function linkList(app: App, title: string, links: Int32Array, incoming: boolean): HTMLElement[] {
  const { model } = app, hint = `share of ${incoming ? "all it reads" : "all the target reads"} · ${model.reading === "value" ? "weight" : "response"}`;
  const head = el("h3", "", `${title} (${count(links.length)})`, el("small", "", links.length ? hint : ""));
  if (!links.length) return [head, el("p", "note", incoming ? "Nothing shown feeds this node." : "This node feeds nothing shown.")];
  const list = el("ul", "links"), most = (model.share[links[0] as number] as number) || 1;
  list.setAttribute("aria-label", title);
  const fill = (n: number) => list.replaceChildren(...Array.from(links.subarray(0, n), (e) => linkRow(app, e, incoming, most)));
  fill(LIST_ROWS);
  if (links.length <= LIST_ROWS) return [head, list];
  const more = button(`Show all ${count(links.length)}`, "plain", () => { fill(links.length); more.remove(); });
  return [head, list, el("p", "note", more)];
}

function linkRow(app: App, e: number, incoming: boolean, most: number): HTMLElement {
  const { model } = app, from = model.from(e), to = model.to(e), other = incoming ? from : to;
  const row = signedRow(model.push(e), to, model.share[e] as number, most, model.label(other), model.brief(other),
    from.pos === to.pos ? "↑" : "↗", signed(model.weight[e] as number));
  row.classList.toggle("qk", model.isQK(e));
  const turned = isBelow(to) && !incoming ? " · below zero there, so the weight has the other sign" : "";
  row.title = `${clip(model.label(other), 300)} · ${model.where(other)}${turned}`;
  row.addEventListener("click", () => { app.select(other); ($("sidebody").querySelector("h2") as HTMLElement).focus(); });
  return el("li", "", row, ...linkParts(app, e));
}

/** What a link is made of, a line for each reading: its response by what a change goes
 * through; its value straight up the residual stream, or moved by heads. */
function linkParts(app: App, e: number): HTMLElement[] {
  const { model } = app, parts = model.reading === "response" ? model.parts(e) : null, travel = model.travel(e), lines: HTMLElement[] = [];
  const least = 1e-3 * Math.abs(model.weight[e] as number); // of rounding nothing is said
  const said = (name: string, size: number | null) => (Math.abs(size ?? 0) > least ? [el("span", "", `${name} ${signed(size ?? 0)}`)] : []);
  const line = (items: HTMLElement[]) => { if (items.length) lines.push(el("p", "parts", ...items.flatMap((item, i) => (i ? [" · ", item] : [item])))); };
  if (parts) line(Object.entries(parts).flatMap(([name, size]) => said(name, size)));
  if (travel && (!parts || travel.attention)) {
    line([...said("residual", travel.direct), ...said("attention", travel.attention), ...travel.heads.map(({ at, load }) => {
      const text = `${headName(at)} ${signed(load)}`;
      return app.attention ? button(text, "inline", () => open(app, at)) : el("span", "", text);
    })]);
  }
  return lines;
}

/** Plus or minus; read aloud, what that does to a node. */
function sign(push: number, to: GraphNode | undefined): HTMLElement {
  return el("span", "sign", push < 0 ? "−" : "+", el("span", "sr", ` ${verb(to, push)}`));
}

function signedRow(
  push: number, to: GraphNode | undefined, share: number, most: number, name: string, brief: string, arrow: string, raw: string,
): HTMLButtonElement {
  const bar = el("b"), row = el("button", push < 0 ? "neg" : "pos");
  row.type = "button";
  bar.style.width = `${Math.max(3, (100 * share) / most)}%`;
  row.append(
    sign(push, to),
    el("span", "arrow", arrow),
    el("span", "name", clip(name, 120), "  ", el("i", "", clip(brief, 60))),
    el("span", "bar", bar), el("span", "right", percent(share)), el("span", "raw", raw),
  );
  return row;
}

function pathsBox(app: App, n: GraphNode): HTMLElement {
  const box = el("details", "paths", el("summary", "", "Strongest paths"));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    const add = (title: string, found: Path[]) => {
      if (!found.length) return;
      const list = el("ul", "links");
      list.setAttribute("aria-label", title);
      for (const path of found) list.append(el("li", "", pathRow(app, path)));
      box.append(el("h4", "", title), list);
    };
    if (n.kind !== "embedding" && n.kind !== "error") add("From tokens and errors", pathsToInputs(app.model, n, PATHS, app.drawn));
    if (n.kind !== "logit") add("To the targets", pathsToTargets(app.model, n, PATHS, app.drawn));
    if (box.children.length === 1) box.append(el("p", "note", "No path among the shown nodes."));
  });
  return box;
}

function pathRow(app: App, path: Path): HTMLElement {
  const { model } = app, first = path.links[0] as number;
  const names = [model.from(first), ...path.links.map((e) => model.to(e))];
  const push = path.links.reduce((s, e) => s * (model.push(e) < 0 ? -1 : 1), 1);
  const row = el("button", `path ${push < 0 ? "neg" : "pos"}`);
  row.type = "button";
  row.append(
    sign(push, names[names.length - 1]),
    el("span", "", names.map((m) => clip(m.kind === "feature" ? `L${m.layer} ${model.label(m)}` : m.kind === "error" ? `L${m.layer} error` : model.tag(m), 36)).join(" → ")),
    el("span", "right", percent(path.share)),
  );
  row.title = "Product of the links' shares, as `jaxclt explain` and the trace print it. Press to show it in the graph and to pin its nodes with Pin path.";
  row.setAttribute("aria-pressed", "false");
  row.addEventListener("click", () => {
    const on = row.getAttribute("aria-pressed") !== "true";
    for (const other of document.querySelectorAll("button.path")) other.setAttribute("aria-pressed", "false");
    row.setAttribute("aria-pressed", String(on));
    app.showPath(on ? path.links : []);
    row.parentElement?.querySelector(".plain")?.remove();
    if (on) row.after(button("Pin path", "plain", () => app.pinAll(names)));
  });
  return row;
}

function groupPanel(app: App, group: Supernode): HTMLElement[] {
  const { model } = app, cards = app.cards(), own = cards.findIndex((c) => c.group && c.members[0]?.id === group.ids[0]);
  const title = el("h2", "", clip(visible(group.label) || "Supernode", 300));
  title.tabIndex = -1;
  const actions = el("div", "actions",
    button("Rename", "plain", () => editText(title, group.label, "Name of this supernode", (text) => app.rename(group, text))),
    button("Ungroup", "plain", () => app.ungroup(group)),
    ...(app.features(group.ids).length ? [patchButton(app, { name: group.label, ids: group.ids })] : []),
    button("Clear", "plain", () => app.selectGroup(null)));
  const members = el("ul", "links");
  members.setAttribute("aria-label", "Members");
  for (const id of group.ids) {
    const n = model.byId.get(id) as GraphNode, row = button("", "member", () => app.select(n));
    row.append(el("span", "name", clip(model.label(n), 120), "  ", el("i", "", model.brief(n))), el("span", "right", n.activation === null ? "" : short(n.activation)));
    members.append(el("li", "", row));
  }
  const facts = groupFacts(app, group.ids);
  const parts: HTMLElement[] = [
    el("div", "head", el("div", "", title, el("p", "", `supernode of ${plural(group.ids.length, "node")}`)), actions),
    ...(facts ? [facts] : []),
    el("h3", "", "Members", el("small", "", "activation")), members,
  ];
  const links = mergeLinks(model, cards);
  for (const [name, incoming] of [["Inputs", true], ["Outputs", false]] as const) {
    const mine = links.filter((l) => (incoming ? l.target : l.source) === own);
    parts.push(el("h3", "", `${name} in the subgraph (${count(mine.length)})`, el("small", "", incoming ? "share of all it reads" : "share of all the target reads")));
    const list = el("ul", "links");
    list.setAttribute("aria-label", `${name} in the subgraph`);
    const most = Math.max(...mine.map((l) => Math.abs(l.share)), 1e-9);
    for (const l of mine) {
      const other = cards[incoming ? l.source : l.target];
      if (!other) continue;
      const row = signedRow(l.share, cards[l.target]?.members[0], Math.abs(l.share), most, other.label, other.group ? plural(other.members.length, "node") : model.brief(other.members[0] as GraphNode), "", "");
      row.addEventListener("click", () => (other.group ? app.selectGroup(app.groups.find((g) => g.ids[0] === other.members[0]?.id) ?? null) : app.select(other.members[0] ?? null)));
      list.append(el("li", "", row));
    }
    parts.push(mine.length ? list : el("p", "note", "None."));
  }
  return parts;
}

function patchButton(app: App, of: PatchOf): HTMLElement {
  const made = button("Patch", "plain", () => { app.openPatch(of); $("patched").focus(); });
  made.title = "What the model answers when these features are changed";
  return made;
}

function help(): HTMLElement[] {
  const keys: [string, string][] = [
    ["← →", "next node of the layer"], ["↑ ↓", "layer above or below"], ["[ ]", "next node by influence"],
    ["Enter", "select"], ["Esc", "clear the selection"], ["p", "pin or unpin"], ["e", "errors of a token, or a sink, one by one"], ["g", "group the marked cards"],
    ["/", "search"], ["+ − 0", "zoom, whole graph"], ["?", "this list"],
  ];
  const list = el("dl", "keys");
  for (const [key, what] of keys) list.append(el("dt", "", ...key.split(" ").flatMap((k) => [el("kbd", "", k), " "])), el("dd", "", what));
  return [
    el("div", "head", el("div", "", el("h2", "", "Keys and pointer"))), list,
    el("p", "note", "Wheel or drag moves the graph, Ctrl + wheel or pinch zooms. Click selects, Shift + click pins. In the subgraph, Shift + click (or Space) marks cards, which Group then joins; cards can be dragged."),
    el("p", "note", "Attention lists the heads that matter; in the pattern of one, arrow keys move and Enter chooses a cell. Value and Response, above the graph of a trace with --response, switch between what nodes are made of and what small changes of them do."),
    el("p", "note", "Patch, on a feature or a supernode, changes its features in the model and shows what the model answers then: run by a server that was started with a model, otherwise by the command it shows. Lines between panels can be dragged, or moved with arrow keys; double-click resets them."),
    el("p", "note", "The address of this page holds what is selected, pinned, grouped, labelled and where cards lie: copy it to share a view. Save keeps it in the graph's JSON."),
  ];
}
