// Where nodes lie: a column per token, as wide as what it shows; a band per layer.

import { clip, percent, spaced } from "./dom";
import type { GraphNode, Model } from "./model";
import { endShare } from "./standing";

export const GUTTER = 56; // layer names
const RIGHT = 16, MIN_BAND = 2, STUB = 24, RAIL = 9, STEP = 110, LOGIT_STEP = 19, NARROW = 12, ROW = 14, FEW = 150, SMALL = 2.4;
const LINE = 24, LONGEST = 68, BARS = 34, LOW = 360; // of the foot; pictures less high get less of it

export interface Rail { x: number; share: number; errors: GraphNode[] }

export interface Layout {
  x: Float64Array; // by node, in the picture's own coordinates
  y: Float64Array;
  most: number; // the radius of the most influential node
  greatest: number; // its part of the influence
  columns: { x: number; w: number; stub: boolean; rail: Rail | null }[];
  turned: boolean; // tokens are written upright
  top: number;
  bands: { y: number; h: number }[]; // by row, the lowest first
  width: number;
  height: number; // to the tokens
  foot: number; // tokens, and what each contributes
  bars: number; // of it
}

/** What is drawn: on its own, or as part of its column's rail or of a sink's stub. */
export interface Drawn { shows: (n: GraphNode) => boolean; folded: (n: GraphNode) => boolean }

/** An output with its probability; of other targets there is none. */
export const logitText = (n: GraphNode, low: boolean): string =>
  (n.target && !n.target.token ? clip(spaced(n.token), low ? 15 : 20) : `${clip(spaced(n.token), low ? 9 : 13)} ${percent(n.prob)}`);
export const isLow = (height: number): boolean => height < LOW;

export const isFixed = (n: GraphNode): boolean =>
  n.influence === null || n.kind === "embedding" || n.kind === "logit";

/** How large a node is drawn at zoom 1: its area by its part of the influence. */
export const radius = (l: Layout, n: GraphNode): number =>
  isFixed(n) ? Math.min(4, l.most) : SMALL + (l.most - SMALL) * Math.sqrt(Math.min(1, n.own / l.greatest));

/** Widths of columns: what each needs, and the room that is left by the features in it.
 * Where room lacks they move together; with many features down to half, and what then
 * still lacks is scrolled. */
function widths(needs: number[], features: number[], room: number): number[] {
  const all = features.reduce((a, b) => a + b, 0), sum = needs.reduce((a, b) => a + b, 0), spare = Math.max(0, room - sum);
  if (sum > room) {
    const least = NARROW * needs.length, shrink = (Math.max(room, all > FEW ? sum / 2 : 0, least) - least) / Math.max(sum - least, 1e-9);
    return needs.map((need) => NARROW + (need - NARROW) * Math.min(1, shrink));
  }
  const even = 0.15 * Math.max(1, all / needs.length);
  return needs.map((need, t) => need + (spare * ((features[t] ?? 0) + even)) / (all + even * needs.length));
}

const rail = (w: number): number => Math.min(RAIL, 0.3 * w);

interface Cells {
  cells: GraphNode[][]; // nodes of a column and band that are no errors, what is shown first
  errors: GraphNode[][]; // by column
  features: number[]; // shown in each column
  stub: boolean[];
  greatest: number;
}

function gather(model: Model, T: number, drawn: Drawn): Cells {
  const cells = new Map<number, GraphNode[]>(), features = new Array<number>(T).fill(0), stub = new Array<boolean>(T).fill(false);
  const errors: GraphNode[][] = Array.from({ length: T }, () => []);
  let greatest = 0;
  for (const n of model.nodes) {
    if (n.kind === "error") { if (n.linked) errors[n.pos]?.push(n); continue; }
    const key = n.band * 1e6 + n.pos, cell = cells.get(key);
    if (cell) cell.push(n);
    else cells.set(key, [n]);
    if (n.kind !== "feature") continue;
    if (drawn.shows(n)) {
      features[n.pos] = (features[n.pos] ?? 0) + 1;
      greatest = Math.max(greatest, n.own);
    } else if (drawn.folded(n)) stub[n.pos] = true;
  }
  for (const cell of cells.values()) {
    cell.sort((a, b) => Number(drawn.shows(b)) - Number(drawn.shows(a)) || b.prob - a.prob || (a.influence ?? 0) - (b.influence ?? 0));
  }
  return { cells: [...cells.values()], errors, features, stub, greatest };
}

/** Heights of bands: layers that show more in one column get more, so that names find room. */
function layBands(fullest: number[], top: number, room: number): Layout["bands"] {
  const last = fullest.length - 1;
  const weights = fullest.map((n, b) => (b === 0 || b === last ? 1.3 : n === 0 ? 0.35 : 1 + 0.7 * Math.min(n - 1, 10)));
  const unit = Math.max(MIN_BAND, room / weights.reduce((a, b) => a + b, 0)), bands: Layout["bands"] = [];
  let y = top;
  for (let b = last; b >= 0; b--) {
    const h = (weights[b] as number) * unit;
    bands[b] = { y, h };
    y += h;
  }
  return bands;
}

export function layOut(
  model: Model, room: { width: number; height: number }, textWidth: (text: string) => number, drawn: Drawn,
): Layout {
  const { nodes, tokens, nLayers } = model, T = Math.max(tokens.length, 1), low = isLow(room.height);
  const { cells, errors, features, stub, greatest } = gather(model, T, drawn);
  const shown = (cell: GraphNode[]) => cell.reduce((sum, n) => sum + Number(drawn.shows(n)), 0), counts = cells.map(shown);
  const fullest = new Array<number>(nLayers + 2).fill(0);
  cells.forEach((cell, i) => { const b = cell[0]?.band ?? 0; fullest[b] = Math.max(fullest[b] ?? 0, counts[i] as number); });
  const inner = room.width - GUTTER - RIGHT, written = tokens.map((t) => textWidth(clip(spaced(t), 24)));
  const bars = model.story.tokens.length ? (low ? BARS - 10 : BARS) : 0, sum = (list: number[]) => list.reduce((a, b) => a + b, 0);
  const top = 12 + Math.SQRT1_2 * model.logits.reduce((m, n) => Math.max(m, textWidth(logitText(n, low))), 0);
  // Tokens are turned where they do not fit, which the rows of a band depend on a little: once with level ones.
  const rowsOf = (bands: Layout["bands"], cell: GraphNode[], n: number) =>
    (cell[0]?.kind === "feature" ? Math.max(1, Math.min(n, Math.floor((bands[cell[0].band]?.h ?? 0) / ROW))) : 1);
  const lay = (turned: boolean) => {
    const foot = bars + (turned ? Math.min(low ? LONGEST - 18 : LONGEST, Math.max(...written, 0) + 8) : LINE);
    const bands = layBands(fullest, top, room.height - top - foot - 4);
    const needs = new Array<number>(T).fill(0);
    cells.forEach((cell, i) => {
      const head = cell[0] as GraphNode, n = counts[i] as number, each = head.kind === "logit" ? LOGIT_STEP + 26 / Math.max(n, 1) : Math.max(4, 8 / rowsOf(bands, cell, n));
      needs[head.pos] = Math.max(needs[head.pos] ?? 0, Math.min(n * each, 520) + (errors[head.pos]?.length && !turned ? RAIL : 0) + 4);
    });
    return { foot, bands, needs: needs.map((w, t) => Math.max(w, stub[t] ? STUB : 0, turned ? NARROW : Math.min(written[t] ?? 0, 150) + 12)) };
  };
  const level = lay(false), turned = sum(level.needs) > inner, { foot, bands, needs } = turned ? lay(true) : level;
  const wide = widths(needs, features, inner), height = sum(bands.map((b) => b.h));
  const layout: Layout = {
    x: new Float64Array(nodes.length), y: new Float64Array(nodes.length), most: Math.max(3, Math.min(6, (0.8 * height) / bands.length)), greatest: greatest || 1,
    columns: [], turned, top, bands, width: GUTTER + sum(wide) + RIGHT, height: top + height + 4, foot, bars,
  };
  const middle = (n: GraphNode) => { const { y, h } = bands[n.band] as { y: number; h: number }; return y + h / 2; };
  let edge = GUTTER;
  wide.forEach((w, t) => {
    const mine = errors[t] ?? [], x = stub[t] ? edge + w / 2 : edge + w - rail(w) / 2 - 1;
    layout.columns.push({ x: edge, w, stub: stub[t] ?? false, rail: mine.length ? { x, share: endShare(nodes, mine), errors: mine } : null });
    for (const n of mine) { layout.x[n.index] = x; layout.y[n.index] = middle(n); }
    edge += w;
  });
  cells.forEach((cell, c) => {
    const head = cell[0] as GraphNode, column = layout.columns[head.pos] ?? { x: GUTTER, w: 46, stub: false, rail: null };
    const beside = !column.rail || column.stub || head.kind === "embedding" ? 0 : head.kind === "logit" ? 26 : rail(column.w), own = column.w - beside, n = Math.max(1, counts[c] as number);
    const step = Math.min(head.kind === "logit" ? LOGIT_STEP + 6 : STEP, (own - 4) / n), rows = rowsOf(bands, cell, n), h = bands[head.band]?.h ?? 0;
    cell.forEach((m, i) => {
      const at = column.x + own / 2 + (i - (n - 1) / 2) * step, row = ((i % rows) + 0.5) / rows - 0.5;
      layout.x[m.index] = column.stub && i >= n ? column.x + column.w / 2 : Math.min(column.x + own - 3, at);
      layout.y[m.index] = middle(m) + row * h + (rows === 1 && step < 8 ? (i % 2 ? 1 : -1) * Math.min(h / 5, 4) : 0);
    });
  });
  return layout;
}
