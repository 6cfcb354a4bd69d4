// Where the cards of the subgraph lie: from tokens to outputs, upwards or to the right.

import dagre from "@dagrejs/dagre";
import { CARD, type Card, type CardLink } from "./supernodes";

const [WIDTH, HEIGHT] = CARD, MARGIN = 10, ROOT = " root";

export type Point = [number, number];

export interface Arranged {
  at: Map<string, Point>; // middles of cards
  sideways: boolean;
  routes: Map<CardLink, Point[]>; // of links, round the cards between
}

/** Links without circles: the strongest first, but for those that would close one. */
export function acyclic(links: CardLink[]): CardLink[] {
  const next = new Map<number, number[]>();
  const reaches = (from: number, to: number): boolean => from === to || (next.get(from) ?? []).some((n) => reaches(n, to));
  return links.filter(({ source, target }) => {
    if (reaches(target, source)) return false;
    next.set(source, [...(next.get(source) ?? []), target]);
    return true;
  });
}

/** What holds all cards, and the bends of links. */
export function extent(at: Iterable<Point>, routes: Iterable<Point[]>): { x: number; y: number; w: number; h: number } {
  const all = [...at], bends = [...routes].flatMap((points) => points.slice(1, -1));
  const span = (i: 0 | 1) => {
    const half = CARD[i] / 2 + MARGIN, ends = [...all.flatMap((p) => [p[i] - half, p[i] + half]), ...bends.flatMap((p) => [p[i] - MARGIN, p[i] + MARGIN])];
    return [Math.min(...ends), Math.max(...ends)] as const;
  };
  const [x, right] = span(0), [y, low] = span(1);
  return { x, y, w: right - x, h: low - y };
}

/** How large a room shows what has this extent, at most as it is. */
export const scaleTo = (size: { w: number; h: number }, room: { w: number; h: number }): number =>
  Math.min(1, room.w / size.w, room.h / size.h);

/** In the direction that lets the cards be larger. */
export function arrange(cards: Card[], links: CardLink[], room: { w: number; h: number }): Arranged {
  const both = [false, true].map((sideways) => lay(cards, links, sideways));
  const [up, right] = both.map((found) => scaleTo(extent(found.at.values(), found.routes.values()), room)) as [number, number];
  return both[right > up ? 1 : 0] as Arranged;
}

function lay(cards: Card[], links: CardLink[], sideways: boolean): Arranged {
  const g = new dagre.graphlib.Graph();
  g.setGraph({ rankdir: sideways ? "LR" : "BT", nodesep: 12, ranksep: sideways ? 64 : 34, edgesep: 16 });
  g.setDefaultEdgeLabel(() => ({}));
  for (const card of cards) g.setNode(card.id, { width: WIDTH, height: HEIGHT });
  const ends = (l: CardLink) => [(cards[l.source] as Card).id, (cards[l.target] as Card).id] as const;
  for (const l of links) g.setEdge(...ends(l), { weight: Math.max(1, Math.round(20 * Math.abs(l.share))) });
  // Tokens begin and outputs end the figure, also where no link that is drawn says so.
  const kind = (card: Card) => card.members[0]?.kind, outputs = cards.filter((card) => kind(card) === "logit");
  g.setNode(ROOT, { width: 0, height: 0 });
  cards.forEach((card, i) => {
    if (kind(card) === "embedding") g.setEdge(ROOT, card.id, { weight: 30 });
    else if (!links.some((l) => l.target === i)) g.setEdge(ROOT, card.id, { weight: 0, minlen: 2 });
    if (kind(card) === "logit" || links.some((l) => l.source === i)) return;
    for (const output of outputs) g.setEdge(card.id, output.id, { weight: 0 });
  });
  dagre.layout(g);
  const point = ({ x = 0, y = 0 }: { x?: number; y?: number }): Point => [x, y];
  return {
    sideways, at: new Map(cards.map((card) => [card.id, point(g.node(card.id))])),
    routes: new Map(links.map((l) => [l, (g.edge(...ends(l)) as { points: { x: number; y: number }[] }).points.map(point)])),
  };
}

/** A link's line along its route: bends are rounded. */
export function routed(points: Point[]): { d: string; spots: Point[] } {
  const between = (a: Point, b: Point, t: number): Point => [a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t];
  const first = points[0] as Point, last = points[points.length - 1] as Point;
  let d = `M${first.join(" ")}`;
  points.slice(1, -1).forEach((p, i) => {
    d += `Q${p.join(" ")} ${between(p, points[i + 2] as Point, 0.5).join(" ")}`;
  });
  const spots = points.slice(1).flatMap((p, i) => [0.2, 0.5, 0.8].map((t) => between(points[i] as Point, p, t)));
  return { d: `${d}L${last.join(" ")}`, spots };
}

/** Of cards that the reader moved: a curve from border to border, and points on it for its words. */
export function curveOf(from: Point, to: Point, sideways: boolean): { d: string; spots: Point[] } {
  const axis = sideways ? 0 : 1, half = CARD[axis] / 2, forth = to[axis] >= from[axis] ? 1 : -1;
  const a: Point = [...from], b: Point = [...to];
  a[axis] += forth * half;
  b[axis] -= forth * (half + 3); // the arrowhead's tip
  const bend = Math.max(16, Math.abs(a[axis] - b[axis]) * 0.4), c: Point = [...a], e: Point = [...b];
  c[axis] += forth * bend;
  e[axis] -= forth * bend;
  const point = (t: number, i: 0 | 1) => (1 - t) ** 3 * a[i] + 3 * (1 - t) ** 2 * t * c[i] + 3 * (1 - t) * t ** 2 * e[i] + t ** 3 * b[i];
  return { d: `M${a.join(" ")}C${c.join(" ")} ${e.join(" ")} ${b.join(" ")}`, spots: [0.5, 0.35, 0.65, 0.2, 0.8].map((t) => [point(t, 0), point(t, 1)]) };
}
