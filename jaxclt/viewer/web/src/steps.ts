// Where arrow keys lead.

import type { GraphNode } from "./model";
import type { Scene } from "./paint";

/** The next node: left and right in a layer, up and down between layers, [ and ] by
 * influence; from none the one to begin with. */
export function neighbour(s: Scene, at: GraphNode | null, key: string): GraphNode | undefined {
  const seen = s.model.nodes.filter(s.shows), from = at && s.shows(at) ? at : null, x = (n: GraphNode) => s.layout.x[n.index] as number;
  if (!from) return seen.length ? s.selected ?? s.model.logits[0] ?? seen[0] : undefined;
  if (key === "[" || key === "]") {
    const order = s.model.ranked.filter(s.shows);
    return order[order.indexOf(from) + (key === "]" ? 1 : -1)];
  }
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const row = seen.filter((n) => n.band === from.band).sort((a, b) => x(a) - x(b));
    return row[row.indexOf(from) + (key === "ArrowRight" ? 1 : -1)];
  }
  const up = key === "ArrowUp", beyond = seen.filter((n) => (up ? n.band > from.band : n.band < from.band));
  const band = beyond.reduce((b, n) => (up ? Math.min(b, n.band) : Math.max(b, n.band)), up ? Infinity : -Infinity);
  return beyond.filter((n) => n.band === band).reduce<GraphNode | undefined>(
    (a, n) => (!a || Math.abs(x(n) - x(from)) < Math.abs(x(a) - x(from)) ? n : a), undefined);
}
