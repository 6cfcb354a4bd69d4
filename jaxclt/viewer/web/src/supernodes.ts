// Groups of nodes and the links between them.

import type { GraphNode, Model } from "./model";

export interface Card {
  id: string; // of the node, or of the group
  label: string;
  members: GraphNode[];
  group: boolean;
}

export interface CardLink { source: number; target: number; share: number }

/** Links between cards (docs/maths.md, 13.3): of every member's inputs (positive where they
 * strengthen it, divided by all that it reads without sign) what comes from the other card; members count by
 * the fraction of their input that comes from outside their own card. */
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
        const share = (model.share[e] as number) * (model.push(e) < 0 ? -1 : 1);
        sum.set(source, (sum.get(source) ?? 0) + fraction * share);
      }
    }
    if (outside > 1e-9) for (const [source, s] of sum) if (s !== 0) merged.push({ source, target, share: s / outside });
  });
  return merged.sort((a, b) => Math.abs(b.share) - Math.abs(a.share));
}

// ---- where cards lie, in the words of circuit-tracer's viewer -------------------------------

export const CARD = [176, 46] as const; // width, height
const PANEL = [1400, 700] as const; // what its thousandths are of when they become pixels here

type Places = Map<string, [number, number]>;

/** Its order: by the sorted letters of the members' feature numbers, ties as in the file,
 * supernodes last (d3.sort on a string sorts its letters). */
function inFileOrder(model: Model, cards: Card[]): Card[] {
  const key = (card: Card) => [...card.members.map((n) => String(model.doc.nodes[n.index]?.feature)).join(" ")].sort().join();
  const first = (card: Card) => (card.group ? Infinity : card.members[0]?.index ?? 0);
  return cards.map((card) => ({ card, key: key(card), first: first(card) }))
    .sort((a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : a.first - b.first || 0)).map(({ card }) => card);
}

/** sg_pos: x y of every card's corner, in thousandths of the panel that holds them all. */
export function toPlaces(model: Model, cards: Card[], at: Places): string {
  const corners = inFileOrder(model, cards).map((card) => {
    const [x, y] = at.get(card.id) ?? [0, 0];
    return [x - CARD[0] / 2, y - CARD[1] / 2] as const;
  });
  const least = [0, 1].map((i) => Math.min(...corners.map((c) => c[i] as number)));
  const size = [0, 1].map((i) => Math.max(...corners.map((c) => c[i] as number)) - (least[i] as number) + (CARD[i] as number));
  return corners.flatMap((c) => c.map((v, i) => Math.round((1000 * (v - (least[i] as number))) / (size[i] as number)))).join(" ");
}

/** The same read; nothing where the numbers are not as many as the cards need. */
export function fromPlaces(model: Model, cards: Card[], places: number[]): Places {
  const found: Places = new Map();
  if (places.length !== 2 * cards.length) return found;
  inFileOrder(model, cards).forEach((card, i) => found.set(card.id, [
    ((places[2 * i] as number) * PANEL[0]) / 1000 + CARD[0] / 2, ((places[2 * i + 1] as number) * PANEL[1]) / 1000 + CARD[1] / 2,
  ]));
  return found;
}
