// The picture: bands, columns, links, nodes and their names, on a canvas or as SVG.

import { frame } from "./frame";
import { GUTTER, type Layout, radius } from "./layout";
import type { GraphNode, Model } from "./model";
import { names } from "./names";
import type { Pen } from "./pen";
import { rails } from "./rails";

const BACKGROUND_LINKS = 130, LINKS_OF_A_NODE = 800, MOVING_LINKS = 400;

export interface Theme {
  panel: string; band: string; line: string; ink: string; muted: string; node: string; square: string;
  error: string; pos: string; neg: string; qk: string; accent: string; gained: string; font: string;
}

/** A point of the layout is at (k * x0 + x, v * y0 + y): zoomed out, layers stay apart. */
export interface Camera { k: number; v: number; x: number; y: number }

export interface Scene {
  model: Model;
  layout: Layout;
  camera: Camera;
  width: number; // of the window on the picture
  height: number;
  theme: Theme;
  shows: (n: GraphNode) => boolean;
  folded: (n: GraphNode) => boolean; // into its column's rail or stub
  selected: GraphNode | null;
  pinned: (n: GraphNode) => boolean;
  matches: (n: GraphNode) => boolean;
  mark: (n: GraphNode) => string | null; // a colour that stands for more than the kind
  path: number[]; // links to point out
  moving: boolean;
}

/** In the colours of the page, or in those that are printed. */
export function readTheme(light = false): Theme {
  if (light) document.documentElement.classList.add("light");
  try { return themeNow(); } finally { document.documentElement.classList.remove("light"); }
}

function themeNow(): Theme {
  const css = getComputedStyle(document.documentElement), get = (name: string) => css.getPropertyValue(`--${name}`).trim();
  return {
    panel: get("panel"), band: get("band"), line: get("line"), ink: get("ink"), muted: get("muted"), node: get("node"),
    square: get("square"), error: get("error"), pos: get("pos"), neg: get("neg"), qk: get("qk"), accent: get("accent"),
    gained: get("gained"), font: `12px ${getComputedStyle(document.body).fontFamily}`,
  };
}

/** Where a node is in the window. */
export function place(s: Scene, n: GraphNode): { x: number; y: number; r: number } {
  const { layout: l, camera: c } = s;
  return {
    x: (l.x[n.index] as number) * c.k + c.x,
    y: (l.y[n.index] as number) * c.v + c.y,
    r: radius(l, n) * Math.min(Math.max(c.k, 0.6) ** 0.5, 2),
  };
}

export function glyph(pen: Pen, kind: GraphNode["kind"], x: number, y: number, r: number): void {
  pen.beginPath();
  if (kind === "feature") pen.arc(x, y, r, 0, 2 * Math.PI);
  else if (kind === "error") {
    const d = r + 0.8;
    pen.moveTo(x, y - d); pen.lineTo(x + d, y); pen.lineTo(x, y + d); pen.lineTo(x - d, y); pen.closePath();
  } else pen.rect(x - r, y - r, 2 * r, 2 * r);
}

function curve(pen: Pen, s: Scene, link: number): void {
  const a = place(s, s.model.from(link)), b = place(s, s.model.to(link)), bend = (a.y - b.y) * 0.45;
  pen.beginPath();
  pen.moveTo(a.x, a.y);
  pen.bezierCurveTo(a.x, a.y - bend, b.x, b.y + bend, b.x, b.y);
  pen.stroke();
}

/** Solid strengthens and dashes weaken, for the colour-blind too; links through what
 * heads attend to are dotted, with dashes between where they weaken. */
function setStroke(pen: Pen, s: Scene, link: number): void {
  const positive = s.model.push(link) >= 0, attended = s.model.isQK(link);
  pen.strokeStyle = attended ? s.theme.qk : positive ? s.theme.pos : s.theme.neg;
  pen.setLineDash(attended ? (positive ? [2, 2] : [6, 2, 2, 2]) : positive ? [] : [5, 3]);
}

function signedLink(pen: Pen, s: Scene, link: number, most: number, faint: number): void {
  const share = s.model.share[link] as number, relative = share / most;
  setStroke(pen, s, link);
  pen.lineWidth = 0.6 + relative + 3 * share;
  pen.globalAlpha = faint + (0.95 - faint) * relative;
  curve(pen, s, link);
}

const isDrawn = (s: Scene, n: GraphNode): boolean => s.shows(n) || s.folded(n);
const bothDrawn = (s: Scene, link: number): boolean => isDrawn(s, s.model.from(link)) && isDrawn(s, s.model.to(link));

/** The still part of the picture; returns how many nodes it shows. */
export function paint(pen: Pen, s: Scene): number {
  const { layout, camera, theme } = s, bottom = s.height - layout.foot;
  const yOf = (y: number) => y * camera.v + camera.y, xOf = (x: number) => x * camera.k + camera.x;
  pen.save();
  pen.beginPath();
  pen.rect(0, 0, s.width, bottom);
  pen.clip();
  pen.fillStyle = theme.band;
  layout.bands.forEach(({ y, h }, b) => { if (b % 2 === 0) pen.fillRect(0, yOf(y), s.width, h * camera.v); });
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  if (!layout.turned) for (const { x } of layout.columns) {
    const at = Math.round(xOf(x)) + 0.5;
    if (at < GUTTER - 1 || at > s.width) continue;
    pen.beginPath(); pen.moveTo(at, yOf(layout.top)); pen.lineTo(at, bottom); pen.stroke();
  }
  rails(pen, s, bottom);
  const near = s.selected ? ownLinks(pen, s, s.selected) : backgroundLinks(pen, s);
  const onPath = pathLinks(pen, s);
  const shown = glyphs(pen, s, near, onPath);
  names(pen, s, near, onPath);
  pen.restore();
  frame(pen, s);
  return shown;
}

/** The links among what is shown on its own that carry most, in the colours of their signs. */
function backgroundLinks(pen: Pen, s: Scene): Map<number, number> {
  const { model } = s, seen = Uint8Array.from(model.nodes, (n) => Number(s.shows(n)));
  const drawn = model.strongestAmong(seen, BACKGROUND_LINKS), strongest = model.flow[drawn[0] ?? 0] || 1;
  for (const e of Array.from(drawn).reverse()) {
    const strength = Math.sqrt((model.flow[e] as number) / strongest);
    setStroke(pen, s, e);
    pen.globalAlpha = (s.path.length ? 0.3 : 1) * (0.12 + 0.6 * strength);
    pen.lineWidth = 0.6 + 1.9 * strength;
    curve(pen, s, e);
  }
  pen.setLineDash([]);
  pen.globalAlpha = 1;
  return new Map();
}

/** Links of the selected node; the neighbours with the largest share of a link. */
function ownLinks(pen: Pen, s: Scene, chosen: GraphNode): Map<number, number> {
  const { model } = s, near = new Map<number, number>();
  const mine = [...model.insOf(chosen), ...model.outsOf(chosen)].filter((e) => bothDrawn(s, e));
  mine.sort((a, b) => (model.share[b] as number) - (model.share[a] as number));
  const drawn = mine.slice(0, s.moving ? MOVING_LINKS : LINKS_OF_A_NODE).reverse();
  const faint = Math.max(0.08, Math.min(0.35, 15 / mine.length)); // many lines are read as texture
  const most = mine.length ? Math.max(model.share[mine[0] as number] as number, 1e-9) : 1;
  for (const e of drawn) if (!s.path.length) signedLink(pen, s, e, most, faint);
  for (const e of mine) {
    const other = (model.source[e] === chosen.index ? model.target[e] : model.source[e]) as number;
    near.set(other, Math.max(near.get(other) ?? 0, model.share[e] as number));
  }
  pen.setLineDash([]);
  pen.globalAlpha = 1;
  return near;
}

function pathLinks(pen: Pen, s: Scene): Set<number> {
  const on = new Set<number>();
  for (const e of s.path) {
    setStroke(pen, s, e);
    pen.lineWidth = 2.5;
    curve(pen, s, e);
    on.add(s.model.source[e] as number).add(s.model.target[e] as number);
  }
  pen.setLineDash([]);
  return on;
}

function glyphs(pen: Pen, s: Scene, near: Map<number, number>, onPath: Set<number>): number {
  const { model, theme, selected } = s;
  let shown = 0;
  for (const n of model.nodes) {
    if (!s.shows(n)) continue;
    shown += 1;
    const { x, y, r } = place(s, n);
    if (x < -20 || y < -20 || x > s.width + 20 || y > s.height + 20) continue;
    const lit = onPath.size ? onPath.has(n.index) || n === selected : !selected || n === selected || near.has(n.index);
    pen.globalAlpha = lit || s.pinned(n) ? 1 : 0.2;
    glyph(pen, n.kind, x, y, r);
    const mark = s.mark(n);
    if (n.kind === "error") {
      pen.fillStyle = theme.panel; pen.fill();
      pen.lineWidth = 1.4; pen.strokeStyle = mark ?? theme.error; pen.stroke();
    } else {
      pen.fillStyle = mark ?? (n.kind === "feature" ? theme.node : theme.square); pen.fill();
      if (r > 2.5) { pen.lineWidth = 1; pen.strokeStyle = theme.panel; pen.stroke(); }
    }
    if (s.pinned(n)) {
      pen.globalAlpha = 1; pen.strokeStyle = theme.accent; pen.lineWidth = 2;
      glyph(pen, n.kind, x, y, r + 2); pen.stroke();
    }
    if (s.matches(n)) {
      pen.globalAlpha = 1; pen.strokeStyle = theme.accent; pen.lineWidth = 1.5; pen.setLineDash([3, 2]);
      glyph(pen, n.kind, x, y, r + 4); pen.stroke(); pen.setLineDash([]);
    }
  }
  pen.globalAlpha = 1;
  return shown;
}

/** What follows the pointer: links of the node under it, rings. */
export function paintOver(
  pen: Pen, s: Scene, hover: GraphNode | null, cursor: GraphNode | null, alike: GraphNode[],
): void {
  pen.save();
  pen.beginPath(); pen.rect(GUTTER - 6, 0, s.width, s.height - s.layout.foot); pen.clip();
  if (hover && hover !== s.selected) {
    pen.lineWidth = 1.2;
    for (const list of [s.model.insOf(hover), s.model.outsOf(hover)]) {
      for (const e of list.subarray(0, 12)) {
        if (!bothDrawn(s, e)) continue;
        setStroke(pen, s, e);
        curve(pen, s, e);
      }
    }
  }
  const ring = (n: GraphNode, width: number, colour: string, dash: number[]) => {
    const { x, y, r } = place(s, n);
    pen.strokeStyle = colour; pen.lineWidth = width; pen.setLineDash(dash);
    glyph(pen, n.kind, x, y, r + 3.5); pen.stroke();
  };
  for (const n of alike) ring(n, 1.5, s.theme.accent, [2, 2]);
  if (hover) ring(hover, 1.5, s.theme.accent, []);
  if (cursor) for (const [width, colour] of [[6, s.theme.panel], [3, s.theme.accent]] as const) { // unlike pinned ones
    const { x, y, r } = place(s, cursor);
    pen.strokeStyle = colour; pen.lineWidth = width; pen.setLineDash([]);
    glyph(pen, cursor.kind, x, y, r + 7); pen.stroke();
  }
  if (s.selected) ring(s.selected, 2.5, s.theme.ink, []);
  pen.setLineDash([]);
  pen.restore();
}
