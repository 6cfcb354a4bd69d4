// What each node holds of the influence, or of the change from another prompt.

import type { GraphNode, Reading } from "./model";

/** Set each node's part and the sum of the parts of it and all above it. Every file says
 * the sums, ours the parts too; elsewhere the part of a node after one that the file left
 * out is at most that of the node before. */
export function weighInfluence(nodes: GraphNode[], reading: Reading): void {
  for (const n of nodes) n.influence = n.influences[reading];
  let before = 0, least = 1;
  for (const n of nodes.filter((m) => m.influence !== null).sort((a, b) => (a.influence as number) - (b.influence as number))) {
    least = Math.max(0, Math.min(least, (n.influence as number) - before));
    n.own = n.shares[reading] ?? least;
    before = n.influence as number;
  }
}

/** The same by a size of each node's own, where no sums are said. */
export function weighBy(nodes: GraphNode[], sizeOf: (n: GraphNode) => number): void {
  const size = (n: GraphNode) => (n.kind === "logit" ? 0 : sizeOf(n)), total = nodes.reduce((s, n) => s + size(n), 0) || 1;
  let sum = 0;
  for (const n of nodes.slice().sort((a, b) => size(b) - size(a))) {
    n.own = size(n) / total;
    n.influence = n.kind === "logit" ? null : Math.min(1, sum += n.own);
  }
}

/** Of what the outputs rest on, tokens and errors, the part of some nodes. */
export function endShare(nodes: GraphNode[], of: GraphNode[]): number {
  const sum = (list: GraphNode[]) => list.reduce((s, n) => s + (n.kind === "error" || n.kind === "embedding" ? n.own : 0), 0);
  return sum(of) / (sum(nodes) || 1);
}
