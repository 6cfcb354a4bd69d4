// The reader's own circuit: pinned nodes and supernodes as cards, links merged.

import type { App } from "./app";
import { type Point, acyclic, arrange, extent, scaleTo } from "./arrange";
import { readSupernodes } from "./document";
import { $, clip, count, editText, el, percent, plural, signed, svg, visible } from "./dom";
import { type Drawing, drawCards } from "./figure";
import { type Line, linesOf, strokeOf } from "./lines";
import { verb } from "./model";
import { readTheme } from "./paint";
import { storyOf } from "./story";
import { CARD, type Card, type CardLink, mergeLinks } from "./supernodes";

const [WIDTH, HEIGHT] = CARD, LEAST_SHARE = 0.01, MOST_LINKS = 150;

export class Subgraph {
  private readonly box = $("subgraph");
  private readonly stage = $("cards");
  private cards: Card[] = [];
  private links: CardLink[] = [];
  private at = new Map<string, [number, number]>();
  private sideways = false;
  private routes = new Map<CardLink, Point[]>();
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
    new ResizeObserver(() => { if (!this.own && this.cards.length) { this.arrange(); this.place(); this.fit(); } }).observe(this.box);
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
    this.links = acyclic(merged.filter((l) => Math.abs(l.share) >= LEAST_SHARE).slice(0, MOST_LINKS));
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
    const { at, sideways, routes } = arrange(this.cards, this.links, { w: this.box.clientWidth || 1, h: this.box.clientHeight || 1 });
    this.sideways = sideways;
    this.routes = routes;
    this.at = new Map([...at].map(([id, place]) => [id, this.app.positions.get(id) ?? place]));
    this.app.placed = this.at;
  }

  private draw(): void {
    const lines = svg("svg", { class: "lines", "aria-hidden": "true" });
    const made = this.cards.map((card) => this.card(card));
    const list = el("ul", "sr");
    list.setAttribute("aria-label", "Links of the subgraph");
    for (const l of this.links) {
      const a = this.cards[l.source] as Card, b = this.cards[l.target] as Card;
      list.append(el("li", "", `${clip(visible(a.label), 80)} ${verb(b.members[0], l.share)} ${clip(visible(b.label), 80)}: ${percent(Math.abs(l.share))} of what it reads`));
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
    const made = el("button", `card ${card.group ? "group" : `is-${first?.kind ?? ""}`}${this.chosen(card) ? " chosen" : ""}`,
      el("b", "", clip(visible(card.label), 60) || "supernode"), el("small", "", clip(this.below(card), 40)));
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

  private below(card: Card): string {
    const first = card.members[0];
    return card.group ? this.effects(card) : first ? this.app.model.brief(first) : "";
  }

  /** What the story says that a group does; else its size. */
  private effects(card: Card): string {
    const { model } = this.app, said = storyOf(model.story, card.members.map((n) => n.id), (id) => model.byId.has(id));
    const parts = [["ablated", said?.measured], ["predicted", said?.predicted]].flatMap(([name, x]) => (typeof x === "number" ? [`${name} ${signed(Number(x.toFixed(1)))}`] : []));
    return parts.join(", ") || plural(card.members.length, "node");
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
    for (const { d, share, words, faint } of this.lines((card) => this.chosen(card))) {
      const sign = share < 0 ? "neg" : "pos";
      drawn.unshift(svg("path", { d, class: sign, ...strokeOf(share, faint), "marker-end": `url(#arrow-${sign})` })); // the strongest lies on top
      if (!words) continue; // the side panel says it too
      const text = svg("text", { x: words.at[0], y: words.at[1] + 4 });
      text.textContent = words.text;
      drawn.push(text);
    }
    drawn.push(heads());
    lines.replaceChildren(...drawn);
  }

  private lines(chosen: (card: Card) => boolean): Line[] {
    const { cards, links, at, routes, sideways, app } = this;
    return linesOf({ cards, links, at, routes, sideways, moved: (id) => app.positions.has(id), chosen });
  }

  /** The cards and their links, as they are printed; nothing without cards. */
  drawing(): Drawing | null {
    const lines = this.lines(() => false), below = (card: Card) => this.below(card);
    return this.cards.length ? drawCards({ cards: this.cards, at: this.at, lines, below, theme: readTheme(true) }) : null;
  }

  private zoom(factor: number): void {
    const cx = this.box.clientWidth / 2, cy = this.box.clientHeight / 2, k = Math.min(3, Math.max(0.15, this.k * factor));
    this.x = cx - ((cx - this.x) * k) / this.k;
    this.y = cy - ((cy - this.y) * k) / this.k;
    this.k = k;
    this.own = true;
    this.transform();
  }

  /** All cards inside the panel. */
  private fit(): void {
    if (!this.cards.length || !this.box.clientWidth) return;
    const size = extent(this.at.values(), this.routes.values()), room = { w: this.box.clientWidth, h: this.box.clientHeight };
    this.k = scaleTo(size, room);
    this.x = room.w / 2 - (size.x + size.w / 2) * this.k;
    this.y = room.h / 2 - (size.y + size.h / 2) * this.k;
    this.transform();
  }

  private transform(): void {
    this.stage.style.transform = `translate(${this.x.toFixed(1)}px, ${this.y.toFixed(1)}px) scale(${this.k.toFixed(3)})`;
  }
}

/** Arrowheads in the colours of the signs. */
function heads(): SVGElement {
  const defs = svg("defs", {});
  for (const sign of ["pos", "neg"]) {
    const head = svg("marker", { id: `arrow-${sign}`, class: `arrow ${sign}`, viewBox: "0 0 8 8", refX: 8, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" });
    head.append(svg("path", { d: "M0 0L8 4L0 8Z" }));
    defs.append(head);
  }
  return defs;
}
