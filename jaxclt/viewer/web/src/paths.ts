// The strongest paths through a node: products of shares, found by dynamic programming
// over the layers.

import type { GraphNode, Model } from "./model";

export interface Path {
  share: number; // product of the links' shares
  links: number[]; // in the order of the model, earliest first
}

interface Tail { share: number; link: number; rest: Tail | null }

/** The k strongest ways on which tokens and errors feed a node. */
export function pathsToInputs(model: Model, to: GraphNode, k: number, shows: (n: GraphNode) => boolean): Path[] {
  return best(model, to, k, shows, true);
}

/** The k strongest ways from a node to what the graph explains. */
export function pathsToTargets(model: Model, from: GraphNode, k: number, shows: (n: GraphNode) => boolean): Path[] {
  return best(model, from, k, shows, false);
}

function best(model: Model, start: GraphNode, k: number, shows: (n: GraphNode) => boolean, backward: boolean): Path[] {
  const tails = new Map<number, Tail[]>(); // the k best ways from a node to an end
  const stack: GraphNode[] = [start], pending = new Set<number>();
  const linksOf = (n: GraphNode) => (backward ? model.insOf(n) : model.outsOf(n));
  const endOf = (link: number) => (backward ? model.from(link) : model.to(link));
  const isEnd = (n: GraphNode) => (backward ? n.kind === "embedding" || n.kind === "error" : n.kind === "logit");
  while (stack.length) {
    const n = stack[stack.length - 1] as GraphNode;
    if (tails.has(n.index)) { stack.pop(); continue; }
    if (isEnd(n) && n !== start) { tails.set(n.index, [{ share: 1, link: -1, rest: null }]); stack.pop(); continue; }
    const next = Array.from(linksOf(n)).filter((e) => shows(endOf(e)) && (model.share[e] as number) > 0);
    if (!pending.has(n.index)) {
      pending.add(n.index);
      const open = next.map(endOf).filter((m) => !tails.has(m.index) && !pending.has(m.index));
      if (open.length) { stack.push(...open); continue; }
    }
    const found: Tail[] = [];
    for (const e of next) {
      for (const rest of tails.get(endOf(e).index) ?? []) {
        const share = rest.share * (model.share[e] as number);
        if (found.length < k || share > (found[found.length - 1] as Tail).share) {
          found.push({ share, link: e, rest });
          found.sort((a, b) => b.share - a.share);
          found.length = Math.min(found.length, k);
        }
      }
    }
    tails.set(n.index, found);
    stack.pop();
  }
  return (tails.get(start.index) ?? []).filter((t) => t.link >= 0).map((tail) => {
    const links: number[] = [];
    for (let t: Tail | null = tail; t && t.link >= 0; t = t.rest) links.push(t.link);
    return { share: tail.share, links: backward ? links.reverse() : links };
  });
}
