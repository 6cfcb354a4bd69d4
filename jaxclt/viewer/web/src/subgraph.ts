// The reader's own circuit: pinned nodes and supernodes as cards, links merged.

import dagre from "@dagrejs/dagre";
import type { App } from "./app";
import { readSupernodes } from "./document";
import { $, clip, count, editText, el, percent, plural, svg, visible } from "./dom";
import { verb } from "./model";
import { CARD, type Card, type CardLink, mergeLinks } from "./supernodes";

const [WIDTH, HEIGHT] = CARD, LEAST_SHARE = 0.01, MOST_LINKS = 150;
const LEGIBLE = 0.75; // smaller cards are no longer read

export class Subgraph {
  private readonly box = $("subgraph");
  private readonly stage = $("cards");
  private cards: Card[] = [];
  private links: CardLink[] = [];
  private at = new Map<string, [number, number]>();
  private k = 1;
  private x = 0;
  private y = 0;
  private own = false; // the reader moved the camera

  constructor(private readonly app: App) {
    $("suggest").addEventListener("click", () => this.suggest());
    $("group").addEventListener("click", () => app.groupMarked());
    $("unpinall").addEventListener("click", () => { app.clearPins(); $("graph").focus(); });
    $("arrange").addEventListener("click", () => { app.positions.clear(); this.own = false; this.show(); app.changed("layout"); });
    $("subin").addEventListener("click", () => this.zoom(1.25));
    $("subout").addEventListener("click", () => this.zoom(0.8));
    this.box.addEventListener("wheel", (e) => {
      e.preventDefault();
      if (e.ctrlKey || e.metaKey) this.zoom(Math.exp(-e.deltaY * 0.0035));
      else { this.x -= e.deltaX; this.y -= e.deltaY; this.own = true; this.transform(); }
    }, { passive: false });
    this.panning();
    new ResizeObserver(() => { if (!this.own) this.fit(); }).observe(this.box);
  }

  private suggestions() {
    const { model } = this.app;
    return readSupernodes(model.doc.jaxclt.suggested_supernodes).filter((s) => s.ids.some((id) => model.byId.has(id)));
  }

  private suggest(): void {
    const { app } = this, found = this.suggestions();
    app.setPins([...app.pinned, ...app.model.logits.slice(0, 1).map((n) => n.id)], [...app.groups, ...found]);
    app.changed("graph", "side", "pins");
  }

  show(): void {
    const { app } = this, focused = document.activeElement?.getAttribute("data-card");
    this.cards = app.cards();
    for (const id of app.marked) if (!this.cards.some((c) => c.id === id)) app.marked.delete(id);
    const empty = this.cards.length === 0, merged = mergeLinks(app.model, this.cards);
    this.links = merged.filter((l) => Math.abs(l.share) >= LEAST_SHARE).slice(0, MOST_LINKS);
    document.body.classList.toggle("pinned", !empty);
    this.box.hidden = empty;
    $("suggest").hidden = this.suggestions().length === 0;
    for (const id of ["group", "unpinall", "arrange", "subin", "subout"]) $(id).hidden = empty;
    ($("group") as HTMLButtonElement).disabled = app.marked.size < 2;
    const hint = app.marked.size ? ` · ${count(app.marked.size)} marked` : app.groups.length ? "" : " · Shift + click marks cards to group";
    const cut = merged.length > this.links.length ? `, ${count(this.links.length)} of ${plural(merged.length, "link")}` : "";
    $("subcount").textContent = empty ? "Pin nodes (p) to build a circuit" : `${plural(this.cards.length, "card")}${cut}${hint}`;
    if (empty) { this.own = false; return; }
    this.arrange();
    this.draw();
    if (!this.own) this.fit();
    else this.transform();
    if (focused) (this.stage.querySelector(`[data-card="${CSS.escape(focused)}"]`) as HTMLElement | null)?.focus();
  }

  private arrange(): void {
    const g = new dagre.graphlib.Graph();
    g.setGraph({ rankdir: "BT", nodesep: 14, ranksep: 30, marginx: 8, marginy: 8 });
    g.setDefaultEdgeLabel(() => ({}));
    for (const card of this.cards) g.setNode(card.id, { width: WIDTH, height: HEIGHT });
    for (const l of this.links) {
      const a = this.cards[l.source] as Card, b = this.cards[l.target] as Card;
      g.setEdge(a.id, b.id, { weight: Math.max(1, Math.round(20 * Math.abs(l.share))) });
    }
    dagre.layout(g);
    this.at = new Map(this.cards.map((card) => {
      const { x, y } = g.node(card.id);
      return [card.id, this.app.positions.get(card.id) ?? [x ?? 0, y ?? 0]];
    }));
    this.app.placed = this.at;
  }

  private draw(): void {
    const lines = svg("svg", { class: "lines", "aria-hidden": "true" });
    const made = this.cards.map((card) => this.card(card));
    const list = el("ul", "sr");
    list.setAttribute("aria-label", "Links of the subgraph");
    for (const l of this.links) {
      const a = this.cards[l.source] as Card, b = this.cards[l.target] as Card;
      list.append(el("li", "", `${clip(visible(a.label), 80)} ${verb(b.members[0], l.share)} ${clip(visible(b.label), 80)}: ${percent(Math.abs(l.share))} of its inputs`));
    }
    this.stage.replaceChildren(lines, ...made, list);
    this.place();
  }

  private chosen(card: Card): boolean {
    const { app } = this;
    return card.group ? app.group !== null && app.group.ids[0] === card.members[0]?.id : app.selected === card.members[0];
  }

  private card(card: Card): HTMLElement {
    const { app } = this, first = card.members[0];
    const group = card.group ? app.groups.find((g) => g.ids[0] === first?.id) ?? null : null;
    const below = card.group ? plural(card.members.length, "node") : first ? app.model.brief(first) : "";
    const made = el("button", `card ${card.group ? "group" : `is-${first?.kind ?? ""}`}${this.chosen(card) ? " chosen" : ""}`,
      el("b", "", clip(visible(card.label), 60) || "supernode"), el("small", "", clip(below, 40)));
    made.type = "button";
    made.dataset.card = card.id;
    made.title = clip(visible(card.label), 300);
    made.setAttribute("aria-pressed", String(app.marked.has(card.id)));
    const mark = () => {
      if (!app.marked.delete(card.id)) app.marked.add(card.id);
      this.show();
    };
    const open = () => { if (group) app.selectGroup(group); else app.select(first ?? null); };
    this.dragging(made, card, (e) => { if (e.shiftKey || e.ctrlKey || e.metaKey) mark(); else open(); });
    made.addEventListener("keydown", (e) => {
      const step = ({ ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] } as Record<string, [number, number]>)[e.key];
      if (e.key === " ") mark();
      else if (e.key === "Enter") open();
      else if (e.key === "Delete") { if (group) app.ungroup(group); else if (first) app.togglePin(first); }
      else if (e.key === "F2" && group) this.rename(made, group);
      else if (step) { this.move(card, step[0], step[1]); app.changed("layout"); }
      else return;
      e.preventDefault();
    });
    made.addEventListener("dblclick", () => { if (group) this.rename(made, group); });
    return made;
  }

  private rename(card: HTMLElement, group: { label: string; ids: string[] }): void {
    const label = card.querySelector("b") as HTMLElement;
    editText(label, group.label, "Name of this supernode", (text) => this.app.rename(group, text));
  }

  private move(card: Card, dx: number, dy: number): void {
    const [x, y] = this.at.get(card.id) ?? [0, 0], to: [number, number] = [x + dx, y + dy];
    this.at.set(card.id, to);
    this.app.positions.set(card.id, to);
    this.place();
  }

  private dragging(made: HTMLElement, card: Card, click: (e: MouseEvent) => void): void {
    let last: { x: number; y: number } | null = null, far = false;
    made.addEventListener("pointerdown", (e) => { last = { x: e.clientX, y: e.clientY }; far = false; });
    made.addEventListener("pointermove", (e) => {
      if (!last || (!far && Math.hypot(e.clientX - last.x, e.clientY - last.y) < 4)) return;
      if (!far) made.setPointerCapture(e.pointerId);
      far = true;
      this.own = true;
      this.move(card, (e.clientX - last.x) / this.k, (e.clientY - last.y) / this.k);
      last = { x: e.clientX, y: e.clientY };
    });
    made.addEventListener("pointerup", () => { last = null; if (far) this.app.changed("layout"); });
    made.addEventListener("click", (e) => { if (!far && e.detail > 0) click(e); });
  }

  private panning(): void {
    let last: { x: number; y: number } | null = null;
    this.box.addEventListener("pointerdown", (e) => {
      if ((e.target as Element).closest(".card")) return;
      last = { x: e.clientX, y: e.clientY };
      this.box.setPointerCapture(e.pointerId);
    });
    this.box.addEventListener("pointermove", (e) => {
      if (!last) return;
      this.x += e.clientX - last.x;
      this.y += e.clientY - last.y;
      last = { x: e.clientX, y: e.clientY };
      this.own = true;
      this.transform();
    });
    this.box.addEventListener("pointerup", () => { last = null; });
  }

  /** Cards and lines where they are now. */
  private place(): void {
    const lines = this.stage.querySelector("svg") as SVGElement;
    for (const card of this.stage.querySelectorAll<HTMLElement>(".card")) {
      const [x, y] = this.at.get(card.dataset.card ?? "") ?? [0, 0];
      card.style.left = `${x - WIDTH / 2}px`;
      card.style.top = `${y - HEIGHT / 2}px`;
    }
    const drawn: SVGElement[] = [];
    const taken = [...this.at.values()].map(([x, y]) => [x, y, WIDTH / 2, HEIGHT / 2] as [number, number, number, number]); // middles and half sizes
    const any = this.cards.some((c) => this.chosen(c));
    for (const l of this.links.slice().reverse()) {
      const a = this.cards[l.source] as Card, b = this.cards[l.target] as Card, size = Math.abs(l.share);
      const [x0, y0] = this.at.get(a.id) ?? [0, 0], [x1, y1] = this.at.get(b.id) ?? [0, 0];
      const start = y0 - HEIGHT / 2, end = y1 + HEIGHT / 2, bend = Math.max(20, Math.abs(start - end) * 0.4);
      const mine = this.chosen(a) || this.chosen(b);
      drawn.push(svg("path", {
        d: `M${x0} ${start}C${x0} ${start - bend} ${x1} ${end + bend} ${x1} ${end}`,
        class: l.share < 0 ? "neg" : "pos", "stroke-width": (1 + 7 * size).toFixed(2),
        opacity: any && !mine ? 0.3 : Math.min(1, 0.45 + size).toFixed(2),
      }));
      if (!mine) continue;
      const words = (l.share < 0 ? "−" : "") + percent(size), half = 3.2 * words.length;
      const spots = [0.5, 0.35, 0.65, 0.2, 0.8].map((t) => {
        const bezier = (a: number, b: number, c: number, d: number) => (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t ** 2 * c + t ** 3 * d;
        return [bezier(x0, x0, x1, x1), bezier(start, start - bend, end + bend, end)] as const;
      });
      const free = spots.find((spot) => taken.every(([bx, by, w, h]) => Math.abs(bx - spot[0]) > w + half || Math.abs(by - spot[1]) > h + 7));
      if (!free) continue; // the side panel says it too
      const [x, y] = free;
      taken.push([x, y, half, 7]);
      const text = svg("text", { x, y: y + 4 });
      text.textContent = words;
      drawn.push(text);
    }
    lines.replaceChildren(...drawn.filter((s) => s.tagName === "path"), ...drawn.filter((s) => s.tagName === "text"));
  }

  private zoom(factor: number): void {
    const cx = this.box.clientWidth / 2, cy = this.box.clientHeight / 2, k = Math.min(3, Math.max(0.15, this.k * factor));
    this.x = cx - ((cx - this.x) * k) / this.k;
    this.y = cy - ((cy - this.y) * k) / this.k;
    this.k = k;
    this.own = true;
    this.transform();
  }

  private fit(): void {
    if (!this.cards.length || !this.box.clientWidth) return;
    const xs = [...this.at.values()].map(([x]) => x), ys = [...this.at.values()].map(([, y]) => y);
    const w = Math.max(...xs) - Math.min(...xs) + WIDTH + 24, h = Math.max(...ys) - Math.min(...ys) + HEIGHT + 16;
    this.k = Math.max(LEGIBLE, Math.min(1, this.box.clientWidth / w, this.box.clientHeight / h));
    // What does not fit is panned to; the chosen card stays in sight.
    const chosen = this.cards.find((c) => this.chosen(c)), at = chosen && this.at.get(chosen.id);
    const start = (room: number, least: number, most: number, half: number, want: number | undefined) => {
      const middle = room / 2 - ((least + most) / 2) * this.k, spare = Math.max(0, (most - least + 2 * half) * this.k - room) / 2;
      return want === undefined ? middle : Math.max(middle - spare, Math.min(middle + spare, room / 2 - want * this.k));
    };
    this.x = start(this.box.clientWidth, Math.min(...xs), Math.max(...xs), WIDTH / 2 + 12, at?.[0]);
    this.y = start(this.box.clientHeight, Math.min(...ys), Math.max(...ys), HEIGHT / 2 + 8, at?.[1]);
    this.transform();
  }

  private transform(): void {
    this.stage.style.transform = `translate(${this.x.toFixed(1)}px, ${this.y.toFixed(1)}px) scale(${this.k.toFixed(3)})`;
  }
}

