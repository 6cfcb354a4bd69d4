// The JSON that circuit-tracer, Neuronpedia, Anthropic's viewer and jaxclt write, read
// into one form: nodes with unique ids and links as columns of node numbers.

import { type Columns, NUMBERS, type NumberName, type PackedColumns, unpack } from "./columns";
import { isNumber } from "./dom";

export type Json = Record<string, unknown>;

export interface RawNode extends Json {
  node_id: string;
  layer: string | number;
  ctx_idx: number;
  feature_type: string;
}

export interface Supernode {
  label: string;
  ids: string[];
}

export interface View {
  clicked: string;
  pinned: string[];
  supernodes: Supernode[];
  clerps: [string, string][];
  threshold: number | null;
  cards: [string, number, number][]; // where the reader put them
  places: number[]; // sg_pos of other viewers: x y of each card, thousandths of a panel
}

export interface GraphDocument {
  metadata: Json & { prompt: string; prompt_tokens: string[]; slug: string; scan: string };
  view: View;
  nodes: RawNode[];
  written: string[]; // their ids in the file
  links: Columns;
  jaxclt: Json;
  rest: Json; // other top-level keys, kept for export
  notes: string[]; // what the reader should know about the reading
}

/** What `page()` embeds. */
export interface Payload {
  graph: Json;
  report: Json | null;
  validation: Json | null;
  attention: Json | null;
  patches: Json[] | null;
  allLinks: number;
  serve: Serve | null;
  other: Json | null; // a second graph to compare with
}

export interface Serve {
  path: string; // of this graph
  version: string; // of its file
  patch: boolean; // whether the server can run the model
  compare?: boolean; // open beside the other graph
}

export const asObject = (x: unknown): Json =>
  typeof x === "object" && x !== null && !Array.isArray(x) ? (x as Json) : {};
export const asText = (x: unknown): string => (typeof x === "string" ? x : x == null ? "" : String(x));
const asList = (x: unknown): unknown[] => {
  if (Array.isArray(x)) return x;
  if (typeof x !== "string" || x === "") return [];
  try {
    const parsed: unknown = JSON.parse(x);
    return Array.isArray(parsed) ? parsed : [];
  } catch {
    return x.split(",").filter(Boolean); // as the URL writes pinnedIds
  }
};

/** Groups from ``[[label, id, ...], ...]``, also when saved as a string. */
export function readSupernodes(x: unknown): Supernode[] {
  return asList(x).flatMap((item) => {
    if (!Array.isArray(item) || item.length < 2) return [];
    const [label, ...ids] = item.map(asText);
    return [{ label: label ?? "", ids }];
  });
}

export function readView(raw: unknown): View {
  const q = asObject(raw);
  const threshold = q.pruningThreshold == null || q.pruningThreshold === "" ? NaN : Number(q.pruningThreshold);
  return {
    clicked: asText(q.clickedId),
    pinned: asList(q.pinnedIds).map(asText),
    supernodes: readSupernodes(q.supernodes),
    clerps: asList(q.clerps).flatMap((pair) =>
      Array.isArray(pair) && pair.length === 2 ? [[asText(pair[0]), asText(pair[1])] as [string, string]] : []),
    threshold: Number.isFinite(threshold) ? threshold : null,
    cards: asList(q.cards).flatMap((c) =>
      Array.isArray(c) && c.length === 3 && c.slice(1).every((x) => Number.isFinite(Number(x))) && c[1] !== null && c[2] !== null
        ? [[asText(c[0]), Number(c[1]), Number(c[2])] as [string, number, number]] : []),
    places: asText(q.sg_pos).split(/[\s,]+/).filter(Boolean).map(Number).filter(Number.isFinite),
  };
}

/** A view whose ids are those of the file, in the ids of the nodes as read. */
function inNewIds(view: View, name: (id: string) => string): View {
  return {
    ...view, clicked: name(view.clicked), pinned: view.pinned.map(name),
    supernodes: view.supernodes.map((s) => ({ label: s.label, ids: s.ids.map(name) })),
  };
}

/** Read any of the formats; throws an Error that says what is wrong. */
export function readDocument(raw: unknown): GraphDocument {
  const doc = asObject(raw);
  if (!Array.isArray(doc.nodes)) throw new Error("this JSON is no attribution graph: it has no list “nodes”");
  if (!doc.links) throw new Error("this JSON is no attribution graph: it has no “links”");
  const notes: string[] = [];
  const written = doc.nodes.map((n) => asText(asObject(n).node_id ?? asObject(n).nodeId));
  const { nodes, numbers } = readNodes(doc.nodes, notes);
  const links = Array.isArray(doc.links) ? readLinks(doc.links, nodes, numbers, notes) : unpack(doc.links as PackedColumns);
  const { metadata, qParams, nodes: _n, links: _l, jaxclt, ...rest } = doc;
  const meta = asObject(metadata);
  const positions = nodes.reduce((most, n) => Math.max(most, n.ctx_idx + 1), 0);
  const tokens = asList(meta.prompt_tokens).map(asText);
  while (tokens.length < positions) tokens.push("");
  return {
    metadata: {
      ...meta,
      prompt: typeof meta.prompt === "string" ? meta.prompt : tokens.join(""),
      prompt_tokens: tokens,
      slug: asText(meta.slug) || "graph",
      scan: asText(meta.scan) || "model",
    },
    view: inNewIds(readView(qParams), (id) => {
      const same = numbers.get(id);
      return same?.length === 1 ? nodes[same[0] ?? 0]?.node_id ?? id : id;
    }),
    nodes,
    written,
    links,
    jaxclt: asObject(jaxclt),
    rest,
    notes,
  };
}

/** Nodes, and which numbers an id stands for: circuit-tracer before 0.5.1 gave errors
 * ids that features of layer 0 also have, so the type decides, never the id. */
function readNodes(list: unknown[], notes: string[]): { nodes: RawNode[]; numbers: Map<string, number[]> } {
  const nodes: RawNode[] = [];
  const numbers = new Map<string, number[]>();
  const used = new Set<string>();
  let renamed = 0;
  for (const item of list) {
    const raw = asObject(item);
    const written = asText(raw.node_id ?? raw.nodeId);
    const pos = Number(raw.ctx_idx);
    const node = raw as RawNode; // parsed for this page alone: changed in place
    node.node_id = written;
    node.ctx_idx = Number.isInteger(pos) && pos >= 0 ? pos : 0;
    node.layer = typeof raw.layer === "number" ? raw.layer : asText(raw.layer);
    node.feature_type = asText(raw.feature_type);
    if (node.feature_type === "mlp reconstruction error" && /^0_\d+_\d+$/.test(written) && Number(node.layer) >= 0) {
      node.node_id = `${node.layer}_-1_${node.ctx_idx}`;
      renamed += 1;
    }
    for (let i = 2; used.has(node.node_id); i++) node.node_id = `${written}~${i}`;
    used.add(node.node_id);
    const same = numbers.get(written);
    if (same) same.push(nodes.length);
    else numbers.set(written, [nodes.length]);
    nodes.push(node);
  }
  if (renamed) notes.push(`${renamed} error nodes had ids of circuit-tracer before 0.5.1 and got the newer ones`);
  return { nodes, numbers };
}

function readLinks(
  list: unknown[], nodes: RawNode[], numbers: Map<string, number[]>, notes: string[],
): Columns {
  const sources: number[] = [], targets: number[] = [], weights: number[] = [], extra: [number, Json][] = [];
  const parts: Partial<Record<NumberName, Float64Array>> = {};
  const height = nodes.map((n) => (n.feature_type === "embedding" ? -1 : n.feature_type === "logit" ? 1e9 : Number(n.layer)));
  let dropped = 0, guessed = 0;
  const order = new FileOrder(list, numbers);
  for (const [at, item] of list.entries()) {
    const { source, target, weight, ...more } = asObject(item);
    const from = numbers.get(asText(source)), to = numbers.get(asText(target));
    const value = Number(weight);
    if (!from || !to || !Number.isFinite(value)) { dropped += 1; continue; }
    let a = from[0] ?? 0;
    const b = to.length === 1 ? to[0] ?? 0 : to.find((i) => nodes[i]?.feature_type !== "mlp reconstruction error") ?? 0;
    if (from.length > 1) {
      const below = from.filter((i) => (height[i] ?? 0) < (height[b] ?? 0));
      const fit = below.length > 1 ? order.between(below, at, targets[targets.length - 1] === b ? sources[sources.length - 1] : undefined) : below;
      if (fit.length !== 1) guessed += 1;
      a = fit[0] ?? below[0] ?? a;
    }
    for (const name of NUMBERS) {
      if (!isNumber(more[name])) continue;
      (parts[name] ??= new Float64Array(list.length))[sources.length] = more[name];
      delete more[name];
    }
    if (Object.keys(more).length) extra.push([sources.length, more]);
    sources.push(a);
    targets.push(b);
    weights.push(value);
  }
  if (dropped) notes.push(`${dropped} links name no node of the file or have no weight, and are left out`);
  if (guessed) notes.push(`${guessed} links start at an id that a feature and an error share: the feature was taken`);
  return { source: sources, target: targets, numbers: { ...parts, weight: weights }, extra };
}

/** circuit-tracer writes the links of a target one after the other, their sources in the
 * order of the nodes: where two nodes have one id, their neighbours tell which is meant. */
class FileOrder {
  private known: boolean | null = null;

  constructor(private readonly list: unknown[], private readonly numbers: Map<string, number[]>) {}

  /** The only node that a link's source can be, or -1. */
  private sure(at: number): number {
    const from = this.numbers.get(asText(asObject(this.list[at]).source));
    return from?.length === 1 ? from[0] ?? -1 : -1;
  }
  private target(at: number): string { return asText(asObject(this.list[at]).target); }

  private ascending(): boolean {
    if (this.known === null) {
      this.known = true;
      for (let i = 1, last = this.sure(0); i < this.list.length && this.known; i++) {
        const here = this.sure(i), same = this.target(i) === this.target(i - 1);
        if (same && here >= 0 && here <= last) this.known = false;
        last = here < 0 && same ? last : here;
      }
    }
    return this.known;
  }

  /** Those of the candidates that fit after `before` and ahead of the link's followers. */
  between(candidates: number[], at: number, before: number | undefined): number[] {
    if (!this.ascending()) return candidates;
    let next = at + 1, until = -1;
    while (next < this.list.length && this.target(next) === this.target(at) && (until = this.sure(next)) < 0) next += 1;
    const same = next < this.list.length && this.target(next) === this.target(at);
    return candidates.filter((i) => (before === undefined || i > before) && (!same || i < until));
  }
}
