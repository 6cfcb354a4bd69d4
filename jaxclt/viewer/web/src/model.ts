// The graph in numbers: nodes as objects, links as columns, inputs and outputs by node.

import { Adjacency } from "./adjacency";
import type { NumberName } from "./columns";
import { type GraphDocument, type Json, asObject, asText } from "./document";
import { isNumber, percent, quoted, visible } from "./dom";
import { flowDown, mostOf } from "./flow";
import { weighBy, weighInfluence } from "./standing";
import { type Story, readStory } from "./story";

const FEW_LINKS = 10_000; // more are rarely drawn

export type Kind = "feature" | "error" | "embedding" | "logit";

/** What links say: what a node is made of, or what a small change of its inputs does. */
export type Reading = "value" | "response";

export interface Target { layer: number | null; token: boolean; readout: number }

export interface GraphNode {
  index: number;
  id: string;
  kind: Kind;
  pos: number;
  layer: number; // -1 of embeddings
  band: number; // row of the picture, 0 at the bottom
  number: string; // of the feature in its layer
  key: string; // what a label belongs to: a feature at all its positions
  given: string; // label in the file
  source: string; // of that label: own, dashboard, automatic
  influence: number | null; // cumulative, by the present reading or by the change
  own: number; // this node's part of it
  change: number | null; // from the counterfactual prompt
  influences: Record<Reading, number | null>;
  shares: Record<Reading, number | null>; // its own, where the file says it
  derivative: number | null; // of the model itself
  hidden: number | null; // what of it the graph does not show
  activation: number | null;
  absInput: number | null;
  totals: Record<Reading, number | null>; // what its shares are of, if the file says it
  prob: number;
  token: string; // of an output
  target: Target | null;
  rank: number | null;
  read: number; // sum of the shown inputs without sign
  total: number; // and of all, where that is known: what its shares are of
  linked: boolean; // the present reading draws it
}

export type Head = [layer: number, head: number];
/** How a link's value travelled. */
export interface Travel { direct: number | null; attention: number | null; heads: { at: Head; load: number }[] }
/** What a link's response is made of: its value, and what a change does to patterns and norms. */
export interface ResponseParts { value: number; query: number; key: number; norm: number; gate: number }

const KINDS: Record<string, Kind> = {
  "embedding": "embedding", "logit": "logit", "mlp reconstruction error": "error",
};

export class Model {
  readonly doc: GraphDocument;
  readonly tokens: string[];
  readonly nodes: GraphNode[];
  readonly byId: Map<string, GraphNode>;
  readonly source: Int32Array;
  readonly target: Int32Array;
  readonly extra: Map<number, Json>;
  readonly logits: GraphNode[];
  readonly nLayers: number;
  readonly story: Story;
  readonly byChange: boolean; // from a counterfactual prompt: that ranks, not the influence
  readonly labels = new Map<string, string>(); // by key, edited here
  // By the present reading, see `read`:
  reading!: Reading;
  weight!: Float64Array;
  share!: Float32Array; // of all that the target reads
  flow!: Float32Array; // share times what arrives at the target
  ranked!: GraphNode[]; // most influential first
  ins!: Adjacency;
  private outs!: Adjacency;
  private strongest: number[] | null = null;

  constructor(doc: GraphDocument) {
    this.doc = doc;
    this.tokens = doc.metadata.prompt_tokens;
    this.nodes = doc.nodes.map((raw, index) => readNode(raw, index, this.tokens));
    // By the paper's convention shares are of all that a node reads.
    if (doc.jaxclt.convention === "paper") for (const n of this.nodes) n.totals.value ??= n.absInput;
    this.story = readStory(doc.jaxclt, this.tokens.length);
    this.byChange = Boolean(doc.jaxclt.changes) && this.nodes.some((n) => n.change !== null);
    this.byId = new Map(this.nodes.map((n) => [n.id, n]));
    const plain = this.nodes.filter((n) => n.kind === "feature" || n.kind === "error");
    const highest = plain.reduce((m, n) => Math.max(m, n.layer + 1), 1);
    this.nLayers = this.nodes.reduce((m, n) => (n.kind === "logit" ? Math.max(m, n.layer - 1) : m), highest);
    for (const n of this.nodes) n.band = n.kind === "embedding" ? 0 : n.kind === "logit" ? this.nLayers + 1 : n.layer + 1;

    this.source = new Int32Array(doc.links.source);
    this.target = new Int32Array(doc.links.target);
    this.extra = new Map(doc.links.extra);
    this.logits = this.nodes.filter((n) => n.kind === "logit").sort((a, b) => b.prob - a.prob);
    this.read("value");
  }

  get hasResponse(): boolean { return this.doc.links.numbers.response !== undefined; }

  /** Take the numbers, links and nodes of a reading; where there is one only, of that. */
  read(wanted: Reading): void {
    const only: Reading = this.doc.jaxclt.reading === "response" ? "response" : "value";
    const reading = this.hasResponse ? wanted : only, E = this.source.length, { numbers } = this.doc.links;
    this.reading = reading;
    this.weight = Float64Array.from((reading === "response" && numbers.response) || numbers.weight);
    const other = new Set<number>(); // links of the other reading alone
    for (const [e, raw] of this.extra) if (raw.reading !== undefined && raw.reading !== reading) other.add(e);
    for (const e of other) this.weight[e] = 0;
    this.share = new Float32Array(E);
    const { source, target, weight, share } = this, read = new Float64Array(this.nodes.length);
    for (let e = 0; e < E; e++) read[target[e] as number] = (read[target[e] as number] as number) + Math.abs(weight[e] as number);
    for (const n of this.nodes) n.total = Math.max(read[n.index] as number, n.totals[reading] ?? 0);
    for (let e = 0; e < E; e++) share[e] = Math.abs(weight[e] as number) / (this.to(e).total || 1);
    this.ins = new Adjacency(target, this.nodes.length, share, other);
    this.outs = new Adjacency(source, this.nodes.length, share, other);
    for (const n of this.nodes) {
      n.read = read[n.index] as number;
      n.linked = !this.hasResponse || n.kind === "embedding" || n.kind === "logit"
        || this.ins.unsorted(n.index).length + this.outs.unsorted(n.index).length > 0;
    }
    const { flow, arrives } = flowDown(this);
    this.flow = flow;
    if (this.byChange) weighBy(this.nodes, (n) => Math.abs(n.change ?? 0));
    else if (this.nodes.some((n) => n.influences[reading] !== null)) weighInfluence(this.nodes, reading);
    else weighBy(this.nodes, (n) => arrives[n.index] as number); // a file of Anthropic's viewer
    this.strongest = null;
    this.ranked = this.nodes.slice().sort((a, b) => (a.influence ?? -1) - (b.influence ?? -1) || b.prob - a.prob);
    let rank = 0;
    for (const n of this.ranked) n.rank = n.influence === null || !n.linked ? null : ++rank;
  }

  get nRanked(): number { return this.nodes.reduce((most, n) => Math.max(most, n.rank ?? 0), 0); }

  from(link: number): GraphNode { return this.nodes[this.source[link] as number] as GraphNode; }
  to(link: number): GraphNode { return this.nodes[this.target[link] as number] as GraphNode; }
  /** Links into a node, largest share first. */
  insOf(n: GraphNode): Int32Array { return this.ins.sorted(n.index); }
  outsOf(n: GraphNode): Int32Array { return this.outs.sorted(n.index); }

  /** The links between marked nodes that carry most of the outputs' weight, strongest first. */
  strongestAmong(marked: Uint8Array, most: number): number[] {
    const { flow, weight, source, target } = this;
    // Of no weight are those of the other reading.
    const among = (e: number) => weight[e] !== 0 && marked[source[e] as number] === 1 && marked[target[e] as number] === 1;
    this.strongest ??= mostOf(flow, FEW_LINKS);
    const found: number[] = [];
    for (const e of this.strongest) if (found.length < most && among(e)) found.push(e);
    if (found.length === most || this.strongest.length === flow.length) return found;
    const all: number[] = [];
    for (let e = 0; e < flow.length; e++) if (among(e)) all.push(e);
    return all.sort((a, b) => (flow[b] as number) - (flow[a] as number)).slice(0, most);
  }

  /** A link's weight, turned round where its target is below zero: positive strengthens a
   * feature or raises an output, and along a path the signs multiply. */
  push(link: number): number {
    const weight = this.weight[link] as number;
    return isBelow(this.to(link)) ? -weight : weight;
  }

  travel(link: number): Travel | null {
    const raw = this.extra.get(link);
    if (!raw) return null;
    const listed = Array.isArray(raw.heads) ? raw.heads : [], heads: Travel["heads"] = [];
    for (const [layer, head, load] of listed.filter(Array.isArray)) if (isNumber(layer) && isNumber(head) && isNumber(load)) heads.push({ at: [layer, head], load });
    const direct = isNumber(raw.direct) ? raw.direct : null, attention = isNumber(raw.attention) ? raw.attention : null;
    return direct === null && attention === null && !heads.length ? null : { direct, attention, heads };
  }

  parts(link: number): ResponseParts | null {
    if (!this.hasResponse) return null;
    const part = (name: NumberName) => this.doc.links.numbers[name]?.[link] ?? 0;
    return { value: part("weight"), query: part("qk_query"), key: part("qk_key"), norm: part("norm"), gate: part("gate") };
  }

  /** Whether a link of the response acts mostly through what heads attend to. */
  isQK(link: number): boolean {
    const p = this.reading === "response" && this.parts(link);
    if (!p) return false;
    const attended = Math.abs(p.query + p.key);
    return attended > 0 && attended >= Math.abs(p.value) + Math.abs(p.norm) + Math.abs(p.gate);
  }

  named(n: GraphNode): string { return this.labels.get(n.key) ?? n.given; }

  label(n: GraphNode): string {
    const token = this.tokens[n.pos] ?? "";
    if (n.kind === "error") return "error";
    if (n.kind === "embedding") return `token ${quoted(token)}`;
    if (n.kind === "logit") return `${this.isOutput(n) ? "output" : "target"} ${quoted(n.token)}`;
    return visible(this.named(n)) || `feature ${n.number}`;
  }

  isOutput(n: GraphNode): boolean { return !n.target || n.target.token; }

  where(n: GraphNode): string {
    if (n.kind === "embedding") return `position ${n.pos}`;
    if (n.kind === "logit" && n.target) return n.prob < 1 ? `${percent(n.prob)} of the weight` : "";
    if (n.kind === "logit") return percent(n.prob);
    return `layer ${n.layer} · ${quoted(this.tokens[n.pos] ?? "")}`;
  }

  brief(n: GraphNode): string {
    return n.kind === "feature" || n.kind === "error" ? `L${n.layer} ${quoted(this.tokens[n.pos] ?? "")}` : this.where(n);
  }

  /** In a few letters, for the picture. */
  tag(n: GraphNode): string {
    if (n.kind === "logit") return visible(n.token).trim();
    if (n.kind === "embedding") return visible(this.tokens[n.pos] ?? "").trim();
    if (n.kind === "error") return "error";
    return visible(this.named(n)) || `${n.layer}/${n.number}`;
  }

  searchText(n: GraphNode): string {
    const places = n.kind === "feature" ? `${n.layer}/${n.number} ${n.layer}:${n.pos}:${n.number}` : "";
    return `${this.label(n)} ${n.id} ${places} L${n.layer} ${this.tokens[n.pos] ?? ""}`.toLowerCase();
  }

  /** By label, token, id, 24/1005, 24:8:1005, or a whole layer: "layer 24". */
  found(n: GraphNode, query: string): boolean {
    const layer = /^(?:layer |l)(\d+)$/.exec(query)?.[1];
    if (layer !== undefined) return (n.kind === "feature" || n.kind === "error") && String(n.layer) === layer;
    return query !== "" && this.searchText(n).includes(query);
  }
}

/** Whether a feature's activation is below zero; what lowers it then strengthens it. */
export const isBelow = (n: GraphNode): boolean => n.kind === "feature" && n.activation !== null && n.activation < 0;

/** What a positive or a negative push does to a node. */
export const verb = (n: GraphNode | undefined, push: number): string =>
  n?.kind === "logit" ? (push < 0 ? "lowers" : "raises") : push < 0 ? "weakens" : "strengthens";

function readNode(raw: Json, index: number, tokens: string[]): GraphNode {
  const type = asText(raw.feature_type), kind = KINDS[type] ?? "feature";
  const clerp = asText(raw.clerp), number = (x: unknown) => (isNumber(x) ? x : null);
  const layer = kind === "embedding" ? -1 : Number(raw.layer);
  const pos = Math.min(Number(raw.ctx_idx), Math.max(tokens.length - 1, 0));
  const own = featureNumber(raw, layer);
  const target = raw.target == null ? null : asObject(raw.target);
  return {
    index, id: asText(raw.node_id), kind, pos,
    layer: Number.isFinite(layer) ? layer : 0,
    band: 0,
    number: own,
    key: kind === "feature" ? `${layer}_${own}` : asText(raw.node_id),
    given: kind === "feature" ? clerp : "",
    source: asText(raw.label_source),
    influence: null, own: 0, change: number(raw.change),
    influences: kind === "logit" ? { value: null, response: null } : { value: number(raw.influence), response: number(raw.influence_response) },
    shares: { value: number(raw.influence_share), response: number(raw.influence_share_response) },
    derivative: number(raw.derivative), hidden: number(raw.hidden),
    activation: number(raw.activation),
    absInput: number(raw.abs_input),
    totals: { value: number(raw.share_total), response: number(raw.share_total_response) },
    prob: number(raw.token_prob) ?? 0,
    token: kind === "logit" ? outputToken(clerp) : "",
    target: target && { layer: number(target.layer), token: target.token === true, readout: number(target.readout) ?? 0 },
    rank: null, read: 0, total: 0, linked: true,
  };
}

/** ``Output "<token>" (p=0.1)``; the token itself may hold quotes in foreign files. */
function outputToken(clerp: string): string {
  return /^Output "([\s\S]*)" \(p=[^(]*\)\s*$/.exec(clerp)?.[1] ?? clerp.split('"')[1] ?? clerp;
}

/** The feature's number in its layer: from the id, or out of the cantor pair. */
function featureNumber(raw: Json, layer: number): string {
  const id = asText(raw.node_id), first = id.indexOf("_"), last = id.lastIndexOf("_"), own = id.slice(first + 1, last);
  if (first > 0 && last > first && Number(id.slice(0, first)) === layer && /^\d+$/.test(own)) return own;
  const z = Number(raw.feature);
  if (Number.isInteger(z) && z >= 0) {
    const w = Math.floor((Math.sqrt(8 * z + 1) - 1) / 2), second = z - (w * (w + 1)) / 2;
    return w - second === layer ? String(second) : String(z);
  }
  return id;
}

/** cantor(layer, index), how Anthropic-format files number a feature. */
export function cantor(n: GraphNode): number {
  const f = Number(n.number);
  return ((n.layer + f) * (n.layer + f + 1)) / 2 + f;
}
