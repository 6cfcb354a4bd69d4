// What a node says of itself at trace time: where its label is from, what it writes and
// reads here; of a token what it contributes, of a group what ablating it did.

import type { App } from "./app";
import { asObject, asText } from "./document";
import { clip, el, fact, isNumber, percent, quoted, short, signed, spaced } from "./dom";
import type { GraphNode, Model } from "./model";
import { storyOf } from "./story";

const SOURCES: Record<string, string> = { own: "your label", dashboard: "label of its dashboard", dictionary: "label of the dictionary", automatic: "automatic label" };

/** Where the shown label is from; edited here it is the reader's. */
export function labelSource(model: Model, n: GraphNode): string {
  if (n.kind !== "feature" || model.named(n) === "") return "";
  return (model.labels.has(n.key) ? SOURCES.own : SOURCES[n.source]) ?? "";
}

/** A link to what others show of a feature, where its dictionary is a published one. The
 * page itself asks nobody. */
export function dashboardLink(model: Model, n: GraphNode): HTMLElement | null {
  const pattern = asText(model.doc.jaxclt.dashboards);
  if (n.kind !== "feature" || !/^https:\/\/[a-z0-9.-]+\//.test(pattern) || !/^\d+$/.test(n.number)) return null;
  const link = el("a", "plain", "Dashboard ↗");
  link.href = pattern.replaceAll("{layer}", String(n.layer)).replaceAll("{feature}", n.number);
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.title = `What ${link.hostname} shows of this feature`;
  return link;
}

const listed = (x: unknown): unknown[][] => (Array.isArray(x) ? x.filter(Array.isArray) : []);

/** Tokens as chips, each with its number. */
function chips(title: string, why: string, rows: [string, string][]): HTMLElement[] {
  if (!rows.length) return [];
  const name = el("b", "", title);
  name.title = why;
  return [el("p", "logits", name, ...rows.map(([token, size]) => el("span", "chip", token, " ", el("small", "", size))))];
}

export function says(model: Model, n: GraphNode): HTMLElement | null {
  const raw = asObject(model.doc.nodes[n.index]), writes = asObject(raw.writes);
  const scored = (x: unknown) => listed(x).flatMap(([token, z]): [string, string][] => (isNumber(z) ? [[spaced(clip(asText(token), 40)), short(Number(z.toFixed(1)))]] : []));
  const why = "By its decoder, the final norm and the unembedding, with the sign of its activation: standard deviations above the dictionary's other features";
  const read = listed(raw.reads).flatMap(([position, token, share]): [string, string][] =>
    (isNumber(share) ? [[`${spaced(clip(asText(token), 40))} ${isNumber(position) ? `@${position}` : ""}`, percent(share)]] : []));
  const parts = [
    ...chips("Raises", why, scored(writes.raises)), ...chips("Lowers", why, scored(writes.lowers)),
    ...chips("Reads", "The tokens of the prompt that it rests on here, by the links of the graph", read),
  ];
  if (!parts.length) return null;
  if (isNumber(writes.share)) parts.push(el("p", "note", `The tokens it raises and lowers most hold ${percent(writes.share)} of what it writes.`));
  return el("div", "feature says", ...parts);
}

/** What a token contributes, measured and by the graph. */
export function tokenFacts(model: Model, n: GraphNode): HTMLElement[] {
  const said = n.kind === "embedding" ? model.story.tokens.find((t) => t.position === n.pos) : undefined, facts: HTMLElement[] = [];
  if (said && said.effect !== null) facts.push(fact("Without it", signed(said.effect), "What the lead of the answer changes by when this token's embedding is the mean one: measured"));
  if (said && said.share !== null) facts.push(fact("Graph's share", percent(said.share), "Of the influence that the graph traces to tokens"));
  return facts;
}

/** What the graph predicts of a group, and what ablating it did. */
export function groupFacts(app: App, ids: string[]): HTMLElement | null {
  const said = storyOf(app.model.story, ids, (id) => app.model.byId.has(id)), facts = el("dl", "facts");
  if (said && said.predicted !== null) facts.append(fact("Ablated, predicted", signed(said.predicted), "What the lead of the answer should change by without it, by the local replacement model"));
  if (said && said.measured !== null) facts.append(fact("Ablated, measured", signed(said.measured), "What the lead of the answer did change by in the model"));
  if (said && said.share !== null) facts.append(fact("Influence", percent(said.share), "Of what features hold"));
  return facts.children.length ? facts : null;
}

/** In words, of a sink's node. */
export const sinkNote = (model: Model, n: GraphNode): string =>
  (model.story.sink.positions.has(n.pos) && n.kind !== "logit" ? `At ${quoted(clip(model.tokens[n.pos] ?? "", 40))}, an attention sink: what is here acts on everything after.` : "");
