// Where nodes lie: a column per token, as wide as its fullest cell; a band per layer.

import { percent, spaced, clip } from "./dom";
import type { GraphNode, Model } from "./model";

export const GUTTER = 56; // layer names
export const FOOT = 30; // tokens
const RIGHT = 16, MIN_BAND = 6;

export interface Layout {
  x: Float64Array; // by node, in the picture's own coordinates
  y: Float64Array;
  most: number; // the radius of the most influential node
  columns: { x: number; w: number }[];
  top: number;
  band: number; // height
  width: number;
  height: number; // to the tokens
}

export const logitText = (n: GraphNode): string => `${clip(spaced(n.token), 14)} ${percent(n.prob)}`;

export const isFixed = (n: GraphNode): boolean =>
  n.influence === null || n.kind === "embedding" || n.kind === "logit";

/** How large a node is drawn at zoom 1. */
export const radius = (l: Layout, n: GraphNode): number =>
  isFixed(n) ? Math.min(4, l.most) : l.most * (0.5 + 0.5 * (1 - (n.influence ?? 1)) ** 0.7);

export function layOut(
  model: Model, room: { width: number; height: number }, textWidth: (text: string) => number,
): Layout {
  const { nodes, tokens, nLayers } = model;
  const cells = new Map<number, GraphNode[]>();
  for (const n of nodes) {
    const key = n.band * 1e6 + n.pos, cell = cells.get(key);
    if (cell) cell.push(n);
    else cells.set(key, [n]);
  }
  const need = new Array<number>(Math.max(tokens.length, 1)).fill(46);
  for (const [first, ...others] of cells.values()) {
    if (!first) continue;
    const wanted = Math.min((others.length + 1) * (first.kind === "logit" ? 20 : 7), 520) + 16;
    need[first.pos] = Math.max(need[first.pos] ?? 0, wanted);
  }
  const sum = need.reduce((a, b) => a + b, 0);
  const inner = Math.max(room.width - GUTTER - RIGHT, sum), bands = nLayers + 2;
  const top = 18 + Math.SQRT1_2 * model.logits.reduce((m, n) => Math.max(m, textWidth(logitText(n))), 0);
  const band = Math.max(MIN_BAND, (room.height - top - FOOT - 4) / bands);
  const columns: Layout["columns"] = [];
  let edge = GUTTER;
  for (const wanted of need) {
    const w = (wanted * inner) / sum;
    columns.push({ x: edge, w });
    edge += w;
  }
  const layout: Layout = {
    x: new Float64Array(nodes.length), y: new Float64Array(nodes.length), most: Math.min(5.2, band * 0.42),
    columns, top, band, width: GUTTER + inner + RIGHT, height: top + band * bands + 4,
  };
  for (const cell of cells.values()) {
    const head = cell[0] as GraphNode, { x, w } = columns[head.pos] ?? { x: GUTTER, w: 46 };
    cell.sort((a, b) => Number(a.kind === "error") - Number(b.kind === "error") || b.prob - a.prob
      || (a.influence ?? 0) - (b.influence ?? 0));
    const step = Math.min(head.kind === "logit" ? 26 : 15, (w - 14) / cell.length);
    cell.forEach((n, i) => {
      layout.x[n.index] = x + w / 2 + (i - (cell.length - 1) / 2) * step;
      layout.y[n.index] = top + (nLayers + 1 - n.band + 0.5) * band
        + (step < 8 ? (i % 2 ? 1 : -1) * Math.min(band / 5, 4) : 0);
    });
  }
  return layout;
}
