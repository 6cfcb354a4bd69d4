// The canvas: camera, pointer, keys. All it shows as text is in the panels too.

import type { App } from "./app";
import { $, plural } from "./dom";
import type { Drawing } from "./figure";
import { columnAt } from "./frame";
import { GUTTER, type Layout, layOut } from "./layout";
import type { GraphNode, Model } from "./model";
import { type Camera, type Scene, type Theme, paint, paintOver, place, readTheme } from "./paint";
import { SvgPen } from "./pen";
import { neighbour } from "./steps";
import { foldText, nodeText, showTip, tokenText } from "./tips";

const REACH = 16, MOST_ZOOM = 24, STEP = 1.3;

export class Picture {
  private readonly box: HTMLElement;
  private readonly back: HTMLCanvasElement;
  private readonly front: HTMLCanvasElement;
  private readonly camera: Camera = { k: 1, v: 1, x: 0, y: 0 };
  private layout: Layout | null = null;
  private model: Model | null = null; // that the layout is of
  private theme: Theme;
  private width = 0;
  private height = 0;
  private hover: GraphNode | null = null;
  private cursor: GraphNode | null = null;
  private pending = 0;
  private settle = 0;
  private moving = false;
  private stale = false; // what is shown changed since it was laid out
  private readonly pointers = new Map<number, { x: number; y: number }>();
  private dragged = false;
  private alikeOf: { node: GraphNode | null; list: GraphNode[] } = { node: null, list: [] };

  constructor(private readonly app: App, host: HTMLElement, private readonly own: {
    model: () => Model; mark: (n: GraphNode) => string | null; says: boolean; choose: (n: GraphNode | null) => void;
    chosen?: () => GraphNode | null; // in a second graph
  }) {
    this.box = host;
    this.back = host.querySelector(".back") as HTMLCanvasElement;
    this.front = host.querySelector(".front") as HTMLCanvasElement;
    this.theme = readTheme();
    this.listen();
  }

  // ---- state to pixels ----------------------------------------------------------------
  scene(): Scene {
    const { app } = this, model = this.own.model(), here = model === app.model, chosen = this.own.chosen?.() ?? null, attending = app.attending();
    return {
      model, layout: this.layout as Layout, camera: this.camera, width: this.width, height: this.height, theme: this.theme,
      shows: here ? app.shows : (n) => n === chosen || app.stands(n, model),
      folded: here ? app.folded : (n) => n !== chosen && app.folds(n, model), selected: here ? app.selected : chosen, pinned: here ? app.isPinned : () => false,
      matches: (n) => here && (app.matches(n) || attending.has(n.id)), mark: this.own.mark,
      path: here ? app.path : [], moving: this.moving,
    };
  }

  /** Lay out for the present size; keeps what is in the middle there. */
  resize(): void {
    const width = this.box.clientWidth, height = this.box.clientHeight, model = this.own.model();
    if (!width || !height) return;
    const fresh = this.model !== model || !this.layout;
    if (this.fits()) { this.draw(); return; }
    this.stale = false;
    const middle = this.layout && { x: (this.width / 2 - this.camera.x) / this.camera.k / this.layout.width };
    this.width = width;
    this.height = height;
    this.model = model;
    const dpr = window.devicePixelRatio || 1;
    for (const canvas of [this.back, this.front]) {
      canvas.width = Math.round(width * dpr);
      canvas.height = Math.round(height * dpr);
    }
    const ruler = this.pen(this.back);
    ruler.font = this.theme.font;
    this.layout = layOut(model, { width, height }, (text) => ruler.measureText(text).width, {
      shows: (n) => this.app.stands(n, model), folded: (n) => this.app.folds(n, model),
    });
    if (fresh || !middle) {
      this.cursor = null;
      this.hover = null;
      this.camera.k = 1;
      this.camera.x = width - this.layout.width; // reading starts at the output
      this.camera.y = 0;
    } else this.camera.x = width / 2 - middle.x * this.layout.width * this.camera.k;
    this.clamp();
    this.draw();
  }

  /** Whether the layout is of this graph and this size. */
  fits(): boolean {
    return !this.stale && this.layout !== null && this.model === this.own.model() && this.width === this.box.clientWidth && this.height === this.box.clientHeight;
  }

  /** Lay out again for what is shown now. */
  again(): void { this.stale = true; this.draw(); }

  restyle(): void { this.theme = readTheme(); this.draw(); }

  private pen(canvas: HTMLCanvasElement): CanvasRenderingContext2D {
    const pen = canvas.getContext("2d") as CanvasRenderingContext2D, dpr = window.devicePixelRatio || 1;
    pen.setTransform(dpr, 0, 0, dpr, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    return pen;
  }

  /** With the next frame, once, however many changes ask for it before. */
  draw(): void {
    if (!this.pending) this.pending = requestAnimationFrame(() => { this.pending = 0; this.drawNow(); });
  }

  private drawNow(): void {
    if (!this.box.clientWidth) return; // out of sight
    if (!this.layout || this.stale || this.model !== this.own.model()) { this.resize(); return; }
    paint(this.pen(this.back), this.scene());
    this.drawOver();
  }

  private drawOver(): void {
    if (!this.layout || this.model !== this.own.model()) return;
    const focused = document.activeElement === this.box;
    paintOver(this.pen(this.front), this.scene(), this.hover, focused ? this.cursor : null, this.alike(this.hover));
  }

  /** The same feature at other positions. */
  private alike(n: GraphNode | null): GraphNode[] {
    if (n !== this.alikeOf.node) {
      const list = n?.kind === "feature" ? this.own.model().nodes.filter((m) => m !== n && m.key === n.key) : [];
      this.alikeOf = { node: n, list };
    }
    return this.alikeOf.list.filter((m) => this.scene().shows(m));
  }

  private later(): void {
    this.moving = true;
    this.draw();
    clearTimeout(this.settle);
    this.settle = window.setTimeout(() => { this.moving = false; this.draw(); }, 140);
  }

  // ---- camera -------------------------------------------------------------------------
  private least(): number {
    const l = this.layout;
    return l ? Math.min(1, (this.width - GUTTER) / (l.width - GUTTER), this.upright(l)) : 1;
  }

  /** The vertical scale at which all layers are in sight. */
  private upright(l: Layout): number { return Math.min(1, (this.height - l.foot) / l.height); }

  private clamp(): void {
    const { camera: c } = this, l = this.layout as Layout;
    c.k = Math.min(MOST_ZOOM, Math.max(this.least(), c.k));
    c.v = c.k >= 1 ? c.k : Math.max(c.k, this.upright(l));
    // The first column stays right of the layers' names, which do not scale.
    c.x = Math.min(GUTTER * (1 - c.k), Math.max(this.width - l.width * c.k, c.x));
    c.y = Math.min(0, Math.max(this.height - l.foot - l.height * c.v, c.y));
  }

  zoom(factor: number, x = (this.width + GUTTER) / 2, y = (this.height - (this.layout?.foot ?? 0)) / 2): void {
    const { camera: c } = this, before = { ...c };
    c.k *= factor;
    this.clamp();
    c.x = x - ((x - before.x) * c.k) / before.k;
    c.y = y - ((y - before.y) * c.v) / before.v;
    this.clamp();
    this.later();
  }

  /** The whole graph in the window. */
  fit(): void {
    this.camera.k = this.least();
    this.camera.x = this.camera.y = 0;
    this.clamp();
    this.later();
  }

  pan(dx: number, dy: number): void {
    this.camera.x += dx;
    this.camera.y += dy;
    this.clamp();
    this.later();
  }

  reveal(n: GraphNode): void {
    if (!this.layout) return;
    const { x, y } = place(this.scene(), n), pad = 40, right = this.width - pad, bottom = this.height - this.layout.foot - 12;
    const dx = x < GUTTER + pad ? GUTTER + pad - x : x > right ? right - x : 0, dy = y < 20 ? 20 - y : y > bottom ? bottom - y : 0;
    if (dx || dy) this.pan(dx, dy);
  }

  where(n: GraphNode): { x: number; y: number } {
    const { x, y } = place(this.scene(), n), rect = this.box.getBoundingClientRect();
    return { x: rect.left + x, y: rect.top + y };
  }

  at(x: number, y: number): GraphNode | null {
    const scene = this.scene();
    let best: GraphNode | null = null, distance = REACH ** 2;
    if (this.model !== scene.model) return null; // not laid out yet
    if (y > this.height - scene.layout.foot || x < GUTTER - 6) return null;
    for (const n of scene.model.nodes) {
      const p = place(scene, n), d = (p.x - x) ** 2 + (p.y - y) ** 2;
      if (d < distance && scene.shows(n)) { best = n; distance = d; }
    }
    return best;
  }

  // ---- pointer and keys ---------------------------------------------------------------
  private listen(): void {
    const { box } = this, local = (e: MouseEvent) => {
      const rect = box.getBoundingClientRect();
      return { x: e.clientX - rect.left, y: e.clientY - rect.top };
    };
    box.addEventListener("wheel", (e) => {
      e.preventDefault();
      const { x, y } = local(e), unit = e.deltaMode === 1 ? 16 : 1;
      if (e.ctrlKey || e.metaKey) { this.zoom(Math.exp(-e.deltaY * unit * 0.0035), x, y); return; }
      const l = this.layout as Layout, fits = l.height * this.camera.v <= this.height - l.foot + 1;
      // A wheel that only turns one way moves along the prompt when all layers are in sight.
      const sideways = e.shiftKey || (fits && Math.abs(e.deltaX) < Math.abs(e.deltaY));
      this.pan(-(sideways ? e.deltaY || e.deltaX : e.deltaX) * unit, sideways ? 0 : -e.deltaY * unit);
    }, { passive: false });
    box.addEventListener("pointerdown", (e) => {
      this.pointers.set(e.pointerId, { x: e.clientX, y: e.clientY });
      this.dragged = false;
    });
    box.addEventListener("pointermove", (e) => {
      const last = this.pointers.get(e.pointerId);
      if (!last) { this.point(this.at(local(e).x, local(e).y), e); return; }
      const dx = e.clientX - last.x, dy = e.clientY - last.y;
      if (!this.dragged && Math.hypot(dx, dy) < 4) return;
      if (!this.dragged) box.setPointerCapture(e.pointerId);
      this.dragged = true;
      this.point(null, e);
      const others = [...this.pointers].filter(([id]) => id !== e.pointerId).map(([, p]) => p);
      if (others[0]) {
        const apart = (p: { x: number; y: number }) => Math.hypot(p.x - (others[0]?.x ?? 0), p.y - (others[0]?.y ?? 0)) || 1;
        const { x, y } = local(e);
        this.zoom(apart({ x: e.clientX, y: e.clientY }) / apart(last), x, y);
      } else this.pan(dx, dy);
      this.pointers.set(e.pointerId, { x: e.clientX, y: e.clientY });
    });
    for (const type of ["pointerup", "pointercancel"] as const) box.addEventListener(type, (e) => this.pointers.delete(e.pointerId));
    box.addEventListener("pointerleave", (e) => this.point(null, e));
    box.addEventListener("click", (e) => {
      if (this.dragged) return;
      const { x, y } = local(e), n = this.at(x, y), fold = n ? null : this.foldAt(x, y);
      if (fold !== null) this.unfold(fold);
      else if (n && (e.ctrlKey || e.metaKey || e.shiftKey) && this.own.says) this.app.togglePin(n);
      else this.choose(n === this.scene().selected ? null : n);
    });
    box.addEventListener("dblclick", (e) => { const { x, y } = local(e); if (!this.at(x, y)) this.zoom(2, x, y); });
    box.addEventListener("focus", () => this.drawOver());
    box.addEventListener("blur", () => this.drawOver());
    box.addEventListener("keydown", (e) => { if (this.key(e)) e.preventDefault(); });
  }

  /** The column whose rail or stub is at a point. */
  private foldAt(x: number, y: number): number | null {
    const l = this.layout;
    if (!l || y > this.height - l.foot || y < l.top * this.camera.v + this.camera.y) return null;
    const at = (x - this.camera.x) / this.camera.k, t = columnAt(l, at), column = l.columns[t];
    return column && (column.stub || (column.rail && Math.abs(column.rail.x - at) * this.camera.k < 5)) ? t : null;
  }

  private unfold(pos: number): void {
    this.app.unfold(pos);
    $("live").textContent = foldText(this.app, this.own.model(), pos, this.layout?.columns[pos]);
  }

  /** What the column under the pointer says of itself. */
  private columnText(e: PointerEvent): string {
    const l = this.layout as Layout, rect = this.box.getBoundingClientRect(), x = e.clientX - rect.left, y = e.clientY - rect.top;
    const model = this.own.model(), fold = this.foldAt(x, y);
    if (fold !== null) return foldText(this.app, model, fold, l.columns[fold]);
    const t = columnAt(l, (x - this.camera.x) / this.camera.k);
    return t >= 0 && y > this.height - l.foot && y < rect.height && x > GUTTER - 6 ? tokenText(model, t) : "";
  }

  private choose(n: GraphNode | null): void {
    this.cursor = n ?? this.cursor;
    this.own.choose(n);
  }

  private key(e: KeyboardEvent): boolean {
    if (e.ctrlKey || e.metaKey || e.altKey) return false;
    const n = this.cursor;
    if (e.key.startsWith("Arrow") || e.key === "[" || e.key === "]") this.step(e.key);
    else if (e.key === "Enter" && n) this.choose(n);
    else if (e.key === "p" && this.own.says && (n ?? this.app.selected)) this.app.togglePin((n ?? this.app.selected) as GraphNode);
    else if (e.key === "+" || e.key === "=") this.zoom(STEP, ...this.middle(n));
    else if (e.key === "-") this.zoom(1 / STEP, ...this.middle(n));
    else if (e.key === "e" && (n ?? this.app.selected)) this.unfold((n ?? this.app.selected as GraphNode).pos);
    else if (e.key === "0") this.fit();
    else return false;
    return true;
  }

  private middle(n: GraphNode | null): [number?, number?] {
    if (!n) return [];
    const { x, y } = place(this.scene(), n);
    return [x, y];
  }

  private step(key: string): void {
    const to = neighbour(this.scene(), this.cursor, key);
    if (!to) return;
    this.cursor = to;
    this.reveal(to);
    if (this.own.says) say(this.app, to);
    this.drawOver();
  }

  private point(n: GraphNode | null, e: PointerEvent): void {
    showTip(n ? nodeText(this.own.model(), n) : this.layout && this.pointers.size === 0 ? this.columnText(e) : "", e);
    if (n === this.hover) return;
    this.hover = n;
    this.box.style.cursor = n ? "pointer" : "";
    this.drawOver();
  }

  /** The share of the errors of each column. */
  rails(): number[] { return this.layout?.columns.map((c) => c.rail?.share ?? 0) ?? []; }

  /** What the window shows, as it is printed. */
  drawing(): Drawing {
    if (!this.layout || this.stale) this.resize();
    const theme = readTheme(true), pen = new SvgPen();
    pen.fillStyle = theme.panel;
    pen.fillRect(0, 0, this.width, this.height);
    paint(pen, { ...this.scene(), theme, moving: false });
    return { width: this.width, height: this.height, body: pen.body };
  }
}

export function say(app: App, n: GraphNode | null): void {
  const { model } = app;
  $("live").textContent = n
    ? `${model.label(n)}, ${model.where(n)}, ${plural(model.insOf(n).length, "input")}, ${plural(model.outsOf(n).length, "output")}`
    : "Nothing selected";
}
