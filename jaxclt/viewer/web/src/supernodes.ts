// Groups of nodes and the links between them.

import type { GraphNode, Model } from "./model";

export interface Card {
  id: string; // of the node, or of the group
  label: string;
  members: GraphNode[];
  group: boolean;
}

export interface CardLink { source: number; target: number; share: number }

/** Links between cards: of every member's inputs (signed, divided by their sum without
 * sign) what comes from the other card; members count by the fraction of their input
 * that comes from outside their own card. */
export function mergeLinks(model: Model, cards: Card[]): CardLink[] {
  const cardOf = new Int32Array(model.nodes.length).fill(-1);
  cards.forEach((card, i) => { for (const n of card.members) cardOf[n.index] = i; });
  const merged: CardLink[] = [];
  cards.forEach((card, target) => {
    const sum = new Map<number, number>();
    let outside = 0;
    for (const n of card.members) {
      const links = model.insOf(n);
      let own = 0;
      for (const e of links) if (cardOf[model.source[e] as number] === target) own += model.share[e] as number;
      const fraction = n.read > 0 ? Math.max(0, 1 - own) : 0;
      outside += fraction;
      for (const e of links) {
        const source = cardOf[model.source[e] as number] as number;
        if (source < 0 || source === target) continue;
        const share = (model.share[e] as number) * ((model.weight[e] as number) < 0 ? -1 : 1);
        sum.set(source, (sum.get(source) ?? 0) + fraction * share);
      }
    }
    if (outside > 1e-9) for (const [source, s] of sum) if (s !== 0) merged.push({ source, target, share: s / outside });
  });
  return merged.sort((a, b) => Math.abs(b.share) - Math.abs(a.share));
}
