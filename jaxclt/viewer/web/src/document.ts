// The JSON that circuit-tracer, Neuronpedia, Anthropic's viewer and jaxclt write, read
// into one form: nodes with unique ids and links as columns of node numbers.

export type Json = Record<string, unknown>;

export interface RawNode extends Json {
  node_id: string;
  layer: string | number;
  ctx_idx: number;
  feature_type: string;
}

/** Links as columns; what few links carry beside their weight lies in `extra`. */
export interface Columns {
  source: number[];
  target: number[];
  weight: number[];
  extra: [number, Json][];
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
}

export interface GraphDocument {
  metadata: Json & { prompt: string; prompt_tokens: string[]; slug: string; scan: string };
  view: View;
  nodes: RawNode[];
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
  allLinks: number;
  serve: Serve | null;
  other: Json | null; // a second graph to compare with
}

export interface Serve {
  path: string; // of this graph
  graphs: { path: string; slug: string; prompt: string }[];
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
  };
}

/** Read any of the formats; throws an Error that says what is wrong. */
export function readDocument(raw: unknown): GraphDocument {
  const doc = asObject(raw);
  if (!Array.isArray(doc.nodes)) throw new Error("this JSON is no attribution graph: it has no list “nodes”");
  if (!doc.links) throw new Error("this JSON is no attribution graph: it has no “links”");
  const notes: string[] = [];
  const { nodes, numbers } = readNodes(doc.nodes, notes);
  const links = Array.isArray(doc.links) ? readLinks(doc.links, nodes, numbers, notes) : (doc.links as Columns);
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
    view: readView(qParams),
    nodes,
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
    const node: RawNode = {
      ...raw,
      node_id: written,
      ctx_idx: Number.isInteger(pos) && pos >= 0 ? pos : 0,
      layer: typeof raw.layer === "number" ? raw.layer : asText(raw.layer),
      feature_type: asText(raw.feature_type),
    };
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
  const columns: Columns = { source: [], target: [], weight: [], extra: [] };
  const height = nodes.map((n) => (n.feature_type === "embedding" ? -1 : n.feature_type === "logit" ? 1e9 : Number(n.layer)));
  let dropped = 0, guessed = 0;
  for (const item of list) {
    const { source, target, weight, ...more } = asObject(item);
    const from = numbers.get(asText(source)), to = numbers.get(asText(target));
    const value = Number(weight);
    if (!from || !to || !Number.isFinite(value)) { dropped += 1; continue; }
    let a = from[0] ?? 0;
    const b = to.length === 1 ? to[0] ?? 0 : to.find((i) => nodes[i]?.feature_type !== "mlp reconstruction error") ?? 0;
    if (from.length > 1) {
      const fit = from.filter((i) => (height[i] ?? 0) < (height[b] ?? 0));
      if (fit.length !== 1) guessed += 1;
      a = fit[0] ?? a;
    }
    if (Object.keys(more).length) columns.extra.push([columns.source.length, more]);
    columns.source.push(a);
    columns.target.push(b);
    columns.weight.push(value);
  }
  if (dropped) notes.push(`${dropped} links name no node of the file or have no weight, and are left out`);
  if (guessed) notes.push(`${guessed} links start at an id that a feature and an error share: the feature was taken`);
  return columns;
}
