// The picture: bands, columns, links, nodes and their names, on a canvas or as SVG.

import { clip, spaced } from "./dom";
import { FOOT, GUTTER, type Layout, logitText, radius } from "./layout";
import type { GraphNode, Model } from "./model";
import type { Pen } from "./pen";

const BACKGROUND_LINKS = 2000, MOVING_LINKS = 400, LINKS_OF_A_NODE = 800, NAMES = 24;

export interface Theme {
  panel: string; band: string; line: string; ink: string; muted: string; node: string; square: string;
  error: string; link: string; pos: string; neg: string; qk: string; accent: string; gained: string; font: string;
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
  selected: GraphNode | null;
  pinned: (n: GraphNode) => boolean;
  matches: (n: GraphNode) => boolean;
  mark: (n: GraphNode) => string | null; // a colour that stands for more than the kind
  path: number[]; // links to point out
  moving: boolean;
}

export function readTheme(): Theme {
  const css = getComputedStyle(document.documentElement), get = (name: string) => css.getPropertyValue(`--${name}`).trim();
  return {
    panel: get("panel"), band: get("band"), line: get("line"), ink: get("ink"), muted: get("muted"), node: get("node"),
    square: get("square"), error: get("error"), link: get("link"), pos: get("pos"), neg: get("neg"), qk: get("qk"), accent: get("accent"),
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

const bothShown = (s: Scene, link: number): boolean => s.shows(s.model.from(link)) && s.shows(s.model.to(link));

/** The still part of the picture; returns how many nodes it shows. */
export function paint(pen: Pen, s: Scene): number {
  const { model, layout, camera, theme } = s, bottom = s.height - FOOT;
  const yOf = (y: number) => y * camera.v + camera.y, xOf = (x: number) => x * camera.k + camera.x;
  const bandY = (b: number) => yOf(layout.top + (model.nLayers + 1 - b) * layout.band);
  pen.save();
  pen.beginPath();
  pen.rect(0, 0, s.width, bottom);
  pen.clip();
  pen.fillStyle = theme.band;
  for (let b = 0; b < model.nLayers + 2; b += 2) pen.fillRect(0, bandY(b), s.width, layout.band * camera.v);
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  for (const { x } of layout.columns) {
    const at = Math.round(xOf(x)) + 0.5;
    if (at < GUTTER - 1 || at > s.width) continue;
    pen.beginPath(); pen.moveTo(at, yOf(layout.top)); pen.lineTo(at, bottom); pen.stroke();
  }
  const near = s.selected ? ownLinks(pen, s, s.selected) : backgroundLinks(pen, s);
  const onPath = pathLinks(pen, s);
  const shown = glyphs(pen, s, near, onPath);
  names(pen, s, near, onPath);
  pen.restore();
  frame(pen, s, bandY);
  return shown;
}

function backgroundLinks(pen: Pen, s: Scene): Map<number, number> {
  const { model } = s, total = model.source.length, most = s.moving ? MOVING_LINKS : BACKGROUND_LINKS;
  const wanted = (all: boolean) => {
    const found: number[] = [];
    for (const e of model.byFlow(all)) {
      if (model.weight[e] !== 0 && bothShown(s, e)) found.push(e); // 0: of the other reading
      if (found.length >= most) break;
    }
    return found;
  };
  let drawn = wanted(false);
  if (drawn.length < most && model.byFlow(false).length < total) drawn = wanted(true);
  const strongest = model.flow[drawn[0] ?? 0] || 1;
  // Two thousand lines are read as texture, two hundred as lines.
  const soft = Math.min(1, Math.sqrt(500 / Math.min(total, BACKGROUND_LINKS))) * (s.path.length ? 0.3 : 1);
  for (const e of drawn) {
    const strength = Math.sqrt((model.flow[e] as number) / strongest);
    pen.strokeStyle = model.isQK(e) ? s.theme.qk : `rgb(${s.theme.link})`;
    pen.globalAlpha = soft * (0.05 + 0.5 * strength);
    pen.lineWidth = 0.5 + 1.5 * strength;
    curve(pen, s, e);
  }
  pen.globalAlpha = 1;
  return new Map();
}

/** Links of the selected node; the neighbours with the largest share of a link. */
function ownLinks(pen: Pen, s: Scene, chosen: GraphNode): Map<number, number> {
  const { model } = s, near = new Map<number, number>();
  const mine = [...model.insOf(chosen), ...model.outsOf(chosen)].filter((e) => bothShown(s, e));
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

interface Box { x0: number; y0: number; x1: number; y1: number }

/** Names beside the nodes that matter now, as far as they fit without overlap. */
function names(pen: Pen, s: Scene, near: Map<number, number>, onPath: Set<number>): void {
  const { model, theme, selected } = s;
  pen.font = theme.font;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const drawn: number[] = [];
  for (const n of model.logits) {
    const { x, y, r } = place(s, n);
    if (drawn.some((other) => Math.abs(other - x) < 15) && n !== selected) continue; // zoomed out
    drawn.push(x);
    pen.save();
    pen.translate(x - 4, y - r - 6);
    pen.rotate(Math.PI / 4);
    pen.fillStyle = (selected && n !== selected && !near.has(n.index)) || (onPath.size && !onPath.has(n.index)) ? theme.muted : theme.ink;
    pen.fillText(logitText(n), 0, 0);
    pen.restore();
  }
  if (s.moving) return;
  const wanted = onPath.size ? [...onPath].map((i) => model.nodes[i] as GraphNode)
    : selected ? [selected, ...[...near].sort((a, b) => b[1] - a[1]).slice(0, 12).map(([i]) => model.nodes[i] as GraphNode)]
    : model.anyNamed ? model.ranked.filter((n) => model.named(n) !== "") : [];
  const lit = onPath.size ? onPath : selected ? new Set([selected.index, ...near.keys()]) : null;
  const taken: Box[] = model.nodes.filter((n) => s.shows(n) && (!lit || lit.has(n.index) || s.pinned(n))).map((n) => {
    const { x, y, r } = place(s, n), ring = r + (s.pinned(n) ? 3 : 0);
    return { x0: x - ring, y0: y - ring, x1: x + ring, y1: y + ring };
  });
  const free = (box: Box) => box.x0 >= GUTTER && box.x1 < s.width - 4 && box.y0 > 0 && box.y1 < s.height - FOOT
    && !taken.some((b) => b.x0 < box.x1 && box.x0 < b.x1 && b.y0 < box.y1 && box.y0 < b.y1);
  pen.font = theme.font.replace("12px", "11px");
  pen.textAlign = "left";
  let written = 0;
  for (const n of wanted) {
    if (n.kind !== "feature" || !s.shows(n) || written >= NAMES) continue;
    const text = clip(model.tag(n), 24), { x, y, r } = place(s, n), w = pen.measureText(text).width;
    const beside = [[x + r + 4, y], [x - r - 4 - w, y], [x - w / 2, y - r - 9], [x - w / 2, y + r + 9]] as const;
    const box = beside.map(([x0, mid]) => ({ x0, x1: x0 + w, y0: mid - 6, y1: mid + 6 })).find(free);
    if (!box) continue;
    taken.push(box);
    pen.globalAlpha = 0.85; pen.fillStyle = theme.panel;
    pen.fillRect(box.x0 - 1, box.y0, w + 2, 12);
    pen.globalAlpha = 1; pen.fillStyle = n === selected ? theme.ink : theme.muted;
    pen.fillText(text, box.x0, (box.y0 + box.y1) / 2);
    written += 1;
  }
}

/** Layer names on the left and tokens below, over whatever is scrolled under them. */
function frame(pen: Pen, s: Scene, bandY: (b: number) => number): void {
  const { model, layout, camera, theme } = s, bottom = s.height - FOOT, height = layout.band * camera.v;
  pen.fillStyle = theme.panel;
  pen.fillRect(0, 0, GUTTER - 6, bottom);
  pen.fillRect(0, bottom, s.width, FOOT);
  pen.strokeStyle = theme.line; pen.lineWidth = 1;
  pen.beginPath(); pen.moveTo(0, bottom + 0.5); pen.lineTo(s.width, bottom + 0.5); pen.stroke();
  pen.save();
  pen.beginPath(); pen.rect(0, 0, GUTTER - 6, bottom); pen.clip();
  pen.font = theme.font.replace("12px", "11px"); pen.textAlign = "right"; pen.textBaseline = "middle"; pen.fillStyle = theme.muted;
  const last = model.nLayers + 1, every = Math.max(1, Math.ceil(13 / height));
  for (let b = 0; b <= last; b++) {
    if (b !== 0 && b !== last && (b - 1) % every) continue;
    if (b === 1 && height < 12) continue; // its name would touch the tokens'
    if (b === last - 1 && height < 12) continue;
    pen.fillText(b === 0 ? "tokens" : b === last ? "output" : `L${b - 1}`, GUTTER - 12, bandY(b) + height / 2);
  }
  pen.restore();
  pen.save();
  pen.beginPath(); pen.rect(GUTTER - 6, bottom, s.width, FOOT); pen.clip();
  pen.textAlign = "center"; pen.textBaseline = "middle";
  layout.columns.forEach(({ x, w }, t) => {
    const left = x * camera.k + camera.x, wide = w * camera.k;
    if (left + wide < GUTTER || left > s.width || wide < 10) return;
    const on = s.selected?.pos === t;
    pen.font = (on ? "bold " : "") + theme.font;
    pen.fillStyle = on ? theme.ink : theme.muted;
    const text = fit(pen, spaced(model.tokens[t] ?? ""), wide - 6), middle = left + wide / 2, half = pen.measureText(text).width / 2;
    if (middle - half < GUTTER - 6 || middle + half > s.width) return; // half a word would be read as another
    pen.fillText(text, middle, bottom + FOOT / 2 + 1);
  });
  pen.restore();
}

function fit(pen: Pen, text: string, width: number): string {
  let letters = Array.from(text.slice(0, 200));
  if (pen.measureText(text.slice(0, 200)).width <= width && text.length <= 200) return text;
  while (letters.length > 1 && pen.measureText(letters.join("") + "…").width > width) {
    letters = letters.slice(0, Math.max(1, Math.floor(letters.length * 0.8)));
  }
  return letters.length > 2 ? letters.join("") + "…" : "";
}

/** What follows the pointer: links of the node under it, rings. */
export function paintOver(
  pen: Pen, s: Scene, hover: GraphNode | null, cursor: GraphNode | null, alike: GraphNode[],
): void {
  pen.save();
  pen.beginPath(); pen.rect(GUTTER - 6, 0, s.width, s.height - FOOT); pen.clip();
  if (hover && hover !== s.selected) {
    pen.lineWidth = 1;
    pen.strokeStyle = `rgba(${s.theme.link},.5)`;
    for (const list of [s.model.insOf(hover), s.model.outsOf(hover)]) {
      for (const e of list.subarray(0, 12)) if (bothShown(s, e)) curve(pen, s, e);
    }
  }
  const ring = (n: GraphNode, width: number, colour: string, dash: number[]) => {
    const { x, y, r } = place(s, n);
    pen.strokeStyle = colour; pen.lineWidth = width; pen.setLineDash(dash);
    glyph(pen, n.kind, x, y, r + 3.5); pen.stroke();
  };
  for (const n of alike) ring(n, 1.5, s.theme.accent, [2, 2]);
  if (hover) ring(hover, 1.5, s.theme.accent, []);
  if (cursor) ring(cursor, 2, s.theme.accent, []);
  if (s.selected) ring(s.selected, 2.5, s.theme.ink, []);
  pen.setLineDash([]);
  pen.restore();
}
