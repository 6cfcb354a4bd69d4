// Names beside nodes: as many as fit without lying over each other or over nodes.

import { clip } from "./dom";
import { GUTTER, isLow, logitText } from "./layout";
import type { GraphNode } from "./model";
import { type Scene, place } from "./paint";
import type { Pen } from "./pen";

const MOST = 90, TRIED = 160, LETTERS = [26, 17, 11], HEIGHT = 11, CELL = 48;

interface Box { x0: number; y0: number; x1: number; y1: number }

/** Boxes, found again by where they are. */
class Taken {
  private readonly cells = new Map<number, Box[]>();

  private at(box: Box): number[] {
    const found: number[] = [], cell = (v: number) => Math.floor(v / CELL);
    for (let i = cell(box.x0); i <= cell(box.x1); i++) for (let j = cell(box.y0); j <= cell(box.y1); j++) found.push(i * 4096 + j);
    return found;
  }
  add(box: Box): void {
    for (const key of this.at(box)) {
      const list = this.cells.get(key);
      if (list) list.push(box);
      else this.cells.set(key, [box]);
    }
  }
  free(box: Box): boolean {
    return this.at(box).every((key) => !this.cells.get(key)?.some((b) => b.x0 < box.x1 && box.x0 < b.x1 && b.y0 < box.y1 && box.y0 < b.y1));
  }
}

/** The outputs, turned, above their nodes. */
function outputs(pen: Pen, s: Scene, near: Map<number, number>, onPath: Set<number>): void {
  const drawn: number[] = [];
  pen.font = s.theme.font; pen.textBaseline = "middle"; pen.textAlign = "right";
  for (const n of s.model.logits) {
    const { x, y, r } = place(s, n);
    if (drawn.some((other) => Math.abs(other - x) < 15) && n !== s.selected) continue; // zoomed out
    drawn.push(x);
    pen.save();
    pen.translate(x - 4, y - r - 6);
    pen.rotate(Math.PI / 4);
    pen.fillStyle = (s.selected && n !== s.selected && !near.has(n.index)) || (onPath.size && !onPath.has(n.index)) ? s.theme.muted : s.theme.ink;
    pen.fillText(logitText(n, isLow(s.height)), 0, 0);
    pen.restore();
  }
}

/** Whose names are wanted, the most wanted first. */
function wanted(s: Scene, near: Map<number, number>, onPath: Set<number>): GraphNode[] {
  const { model, selected } = s, of = (index: number) => model.nodes[index] as GraphNode;
  const list = onPath.size ? [...onPath].map(of)
    : selected ? [selected, ...[...near].sort((a, b) => b[1] - a[1]).slice(0, 30).map(([i]) => of(i))]
    : model.ranked.filter((n) => model.named(n) !== "");
  return list.filter((n) => n.kind === "feature" && s.shows(n)).slice(0, TRIED);
}

export function names(pen: Pen, s: Scene, near: Map<number, number>, onPath: Set<number>): void {
  const { model, theme, selected, layout: l, camera: c } = s;
  outputs(pen, s, near, onPath);
  if (s.moving) return;
  const list = wanted(s, near, onPath);
  if (!list.length) return;
  const lit = onPath.size ? onPath : selected ? new Set([selected.index, ...near.keys()]) : null, taken = new Taken();
  for (const n of model.nodes) {
    if (!s.shows(n) || (lit && !lit.has(n.index) && !s.pinned(n))) continue;
    const { x, y, r } = place(s, n), ring = r + (s.pinned(n) ? 3 : 0);
    taken.add({ x0: x - ring, y0: y - ring, x1: x + ring, y1: y + ring });
  }
  const high = l.top * c.v + c.y, output = l.bands[model.nLayers + 1] ?? { y: 0, h: 0 };
  for (const { rail } of l.columns) if (rail) taken.add({ x0: rail.x * c.k + c.x - 12, x1: rail.x * c.k + c.x + 12, y0: high, y1: (output.y + output.h) * c.v + c.y });
  for (const { x, w, stub } of l.columns) if (stub) taken.add({ x0: x * c.k + c.x, x1: (x + w) * c.k + c.x, y0: high, y1: s.height });
  pen.font = theme.font.replace("12px", "11px"); pen.textAlign = "left"; pen.textBaseline = "middle";
  const floor = (l.bands[0]?.y ?? 0) * c.v + c.y;
  const inside = (b: Box) => b.x0 >= GUTTER && b.x1 < s.width - 4 && b.y0 > high && b.y1 < Math.min(s.height - l.foot, floor);
  let written = 0;
  for (const n of list) {
    if (written >= MOST) break;
    const found = spot(pen, s, n, (box) => inside(box) && taken.free(box));
    if (!found) continue;
    const { box, text } = found;
    taken.add(box);
    pen.globalAlpha = 0.8; pen.fillStyle = theme.panel;
    pen.fillRect(box.x0 - 1, box.y0, box.x1 - box.x0 + 2, HEIGHT);
    pen.globalAlpha = 1; pen.fillStyle = n === selected || !selected ? theme.ink : theme.muted;
    pen.fillText(text, box.x0, (box.y0 + box.y1) / 2);
    written += 1;
  }
}

/** Where a name fits: whole on either side, above or below, or else cut. */
function spot(pen: Pen, s: Scene, n: GraphNode, free: (box: Box) => boolean): { box: Box; text: string } | null {
  const { x, y, r: bare } = place(s, n), r = n === s.selected ? bare + 4 : bare, whole = s.model.tag(n);
  for (const letters of LETTERS) {
    const text = clip(whole, letters), w = pen.measureText(text).width;
    const beside = [[x + r + 3, y], [x - r - 3 - w, y], [x - w / 2, y - r - 8], [x - w / 2, y + r + 8]] as const;
    const box = beside.map(([x0, mid]) => ({ x0, x1: x0 + w, y0: mid - HEIGHT / 2, y1: mid + HEIGHT / 2 })).find(free);
    if (box) return { box, text };
    if (text === whole) return null;
  }
  return null;
}
