// The links between cards as lines with their words, on the page and printed.

import { type Point, curveOf, routed } from "./arrange";
import { percent } from "./dom";
import { CARD, type Card, type CardLink } from "./supernodes";

export interface Line {
  d: string; // of an SVG path, its arrowhead at the end
  share: number;
  words: { at: Point; half: number; text: string } | null; // where there was room, by their middle
  faint: boolean; // another card is chosen
}

interface Drawn {
  cards: Card[];
  links: CardLink[]; // strongest first
  at: ReadonlyMap<string, Point>;
  routes: ReadonlyMap<CardLink, Point[]>;
  sideways: boolean;
  moved: (id: string) => boolean; // by the reader, so that the route is no more
  chosen: (card: Card) => boolean;
}

const LINE = 7; // half a line of words

export function linesOf({ cards, links, at, routes, sideways, moved, chosen }: Drawn): Line[] {
  const taken = [...at.values()].map(([x, y]) => [x, y, CARD[0] / 2, CARD[1] / 2] as const); // middles and half sizes
  const any = cards.some(chosen), spot = (card: Card): Point => at.get(card.id) ?? [0, 0];
  return links.map((l) => {
    const a = cards[l.source] as Card, b = cards[l.target] as Card, faint = any && !chosen(a) && !chosen(b);
    const route = moved(a.id) || moved(b.id) ? undefined : routes.get(l);
    const { d, spots } = route ? routed(route) : curveOf(spot(a), spot(b), sideways);
    const text = (l.share < 0 ? "−" : "") + percent(Math.abs(l.share)), half = 3.2 * text.length;
    const free = faint ? undefined : spots.find((p) => taken.every(([x, y, w, h]) => Math.abs(x - p[0]) > w + half || Math.abs(y - p[1]) > h + LINE));
    if (free) taken.push([free[0], free[1], half, LINE]);
    return { d, share: l.share, words: free ? { at: free, half, text } : null, faint };
  });
}

export const strokeOf = (share: number, faint: boolean): { "stroke-width": string; opacity: string } => ({
  "stroke-width": (1 + 7 * Math.abs(share)).toFixed(2), opacity: faint ? "0.3" : Math.min(1, 0.45 + Math.abs(share)).toFixed(2),
});
