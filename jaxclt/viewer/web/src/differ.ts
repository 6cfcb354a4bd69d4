// What two graphs share, and by how much nodes and links differ.

import { asText } from "./document";
import type { GraphNode, Model } from "./model";

export interface Match { here: GraphNode; there: GraphNode }
export interface Comparison { shared: Match[]; lost: GraphNode[]; gained: GraphNode[]; sameDictionary: boolean }

/** Nodes that stand for the same in both: features by layer, number and position (in
 * prompts of different length counted from the start, then from the end); features of
 * different dictionaries never. */
export function compareModels(here: Model, there: Model): Comparison {
  const dictionary = (m: Model) => asText(m.doc.jaxclt.dictionary ?? JSON.stringify(m.doc.metadata.transcoder_list ?? "")) + m.doc.metadata.scan;
  const sameDictionary = dictionary(here) === dictionary(there);
  const moved = positions(here.tokens, there.tokens), keyed = new Map<string, GraphNode>();
  const key = (n: GraphNode, pos: number) =>
    n.kind === "embedding" ? `E ${pos}` : n.kind === "logit" ? `out ${n.token}` : n.kind === "error" ? `error ${n.layer} ${pos}` : `${n.key} ${pos}`;
  for (const n of there.nodes) keyed.set(key(n, n.pos), n);
  const shared: Match[] = [], lost: GraphNode[] = [], met = new Set<GraphNode>();
  for (const n of here.nodes) {
    const pos = moved[n.pos] ?? -1, other = keyed.get(key(n, pos));
    const same = other && (n.kind !== "embedding" || here.tokens[n.pos] === there.tokens[pos]) && (n.kind !== "feature" || sameDictionary);
    if (same) { shared.push({ here: n, there: other }); met.add(other); } else lost.push(n);
  }
  return { shared, lost, gained: there.nodes.filter((n) => !met.has(n)), sameDictionary };
}

/** Where a position of one prompt is in the other, -1 where nowhere. */
function positions(a: string[], b: string[]): number[] {
  if (a.length === b.length) return a.map((_, i) => i);
  let start = 0, end = 0;
  const short = Math.min(a.length, b.length);
  while (start < short && a[start] === b[start]) start += 1;
  while (end < short - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  return a.map((_, i) => (i < start ? i : i >= a.length - end ? i - a.length + b.length : -1));
}

/** A node, or a link, of both graphs or of one; what is in one only counts as 0 in the other. */
export interface Differs<Of> { here: Of | null; there: Of | null; left: number | null; right: number | null; by: number }

/** A node's share of the influence; of an output its probability, of other targets nothing. */
export const sizeOf = (n: GraphNode): number => (n.kind !== "logit" ? n.own : n.target ? 0 : n.prob);

const byDifference = <Of>(list: Differs<Of>[]): Differs<Of>[] => list.sort((a, b) => Math.abs(b.by) - Math.abs(a.by));

/** Nodes by how much their shares differ, right less left. */
export function nodeDifferences({ shared, lost, gained }: Comparison): Differs<GraphNode>[] {
  const pair = (here: GraphNode | null, there: GraphNode | null): Differs<GraphNode> => {
    const left = here && sizeOf(here), right = there && sizeOf(there);
    return { here, there, left, right, by: (right ?? 0) - (left ?? 0) };
  };
  return byDifference([...shared.map((m) => pair(m.here, m.there)), ...lost.map((n) => pair(n, null)), ...gained.map((n) => pair(null, n))]);
}

/** Links, by number, whose weights differ by the present reading. */
export function linkDifferences(here: Model, there: Model, { shared }: Comparison): Differs<number>[] {
  const twin = new Int32Array(there.nodes.length).fill(-1), n = here.nodes.length, mine = new Map<number, number>();
  for (const m of shared) twin[m.there.index] = m.here.index;
  for (let e = 0; e < here.source.length; e++) if (here.weight[e] !== 0) mine.set((here.source[e] as number) * n + (here.target[e] as number), e);
  const found: Differs<number>[] = [];
  for (let e = 0; e < there.source.length; e++) {
    const right = there.weight[e] as number;
    if (right === 0) continue; // of the other reading
    const from = twin[there.source[e] as number] as number, to = twin[there.target[e] as number] as number, key = from * n + to;
    const same = from < 0 || to < 0 ? undefined : mine.get(key);
    if (same !== undefined) mine.delete(key);
    const left = same === undefined ? null : here.weight[same] as number;
    found.push({ here: same ?? null, there: e, left, right, by: right - (left ?? 0) });
  }
  for (const e of mine.values()) found.push({ here: e, there: null, left: here.weight[e] as number, right: null, by: -(here.weight[e] as number) });
  return byDifference(found.filter((d) => d.by !== 0));
}
