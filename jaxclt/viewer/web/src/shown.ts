// What the picture shows on its own, and what as part of its column.

import { isFixed } from "./layout";
import type { GraphNode, Model } from "./model";

const FIRST_FEATURES = 80; // of the first picture; the slider reaches the others

interface Chosen { threshold: number; errors: boolean; unfolded: ReadonlySet<number> }

/** Where the slider begins: as many features as can be read, those of a sink not counted. */
export function firstThreshold(model: Model): number | null {
  const { sink } = model.story, ranked = model.ranked.filter((n) => n.kind === "feature" && n.linked && !isFixed(n) && !sink.positions.has(n.pos));
  return (ranked.length > FIRST_FEATURES && ranked[FIRST_FEATURES - 1]?.influence) || null;
}

/** Whether the slider reaches a node, and it is not folded away. */
export const stands = (by: Chosen, n: GraphNode, model: Model): boolean =>
  n.linked && (isFixed(n) || (n.influence ?? 0) <= by.threshold + 1e-9) && !folds(by, n, model);

/** Whether a node is drawn as part of its column: errors as a rail, all of a sink as a stub. */
export function folds(by: Chosen, n: GraphNode, model: Model): boolean {
  if (!n.linked || n.kind === "embedding" || n.kind === "logit" || by.unfolded.has(n.pos)) return false;
  return (n.kind === "error" && !by.errors) || model.story.sink.positions.has(n.pos);
}
