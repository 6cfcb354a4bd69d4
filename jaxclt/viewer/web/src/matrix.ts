// A head's pattern as a triangle: a row for each token, a column for each it may attend to.

import { clip, el, percent, quoted, spaced, svg } from "./dom";

type At = readonly [query: number, key: number];

const WIDTH = 336, MARGIN = 74, MOST = 24, LETTERS = 11, EDGE = 4; // in the picture's own units

export class Matrix {
  readonly element: HTMLElement;
  private readonly picture: SVGElement;
  private readonly said = el("p", "said");
  private readonly step: number; // from cell to cell
  private readonly size: number; // of a cell
  private readonly marks: SVGElement;
  private cursor: At | null = null;

  constructor(private readonly of: {
    name: string; tokens: string[]; rows: number[][]; listed: At[]; chosen: At | null; choose: (at: At) => void;
  }) {
    const { rows, name } = of;
    this.step = Math.min(MOST, (WIDTH - MARGIN) / rows.length);
    this.size = this.step - (this.step > 8 ? 1 : 0);
    this.picture = svg("svg", {
      class: "matrix", viewBox: [-EDGE, -EDGE, WIDTH, this.step * rows.length + 2 * EDGE].join(" "), tabindex: 0, role: "application",
      "aria-label": `Pattern of ${name}: a row for each token that attends, a column for each that it attends to. Arrow keys move, Enter chooses.`,
    });
    this.marks = svg("g", {});
    this.picture.append(...this.cells(), ...this.names(), this.marks);
    this.said.setAttribute("role", "status");
    this.element = el("div", "pattern", this.said);
    this.element.prepend(this.picture);
    this.listen();
    this.choose(of.chosen);
  }

  choose(at: At | null): void {
    this.of.chosen = at;
    this.cursor = at;
    this.show(at);
  }

  private cells(): SVGElement[] {
    const { rows, listed } = this.of, stairs = rows.map((_, q) => `M0 ${q * this.step}h${q * this.step + this.size}v${this.size}H0Z`);
    const made = [svg("path", { class: "empty", d: stairs.join("") })];
    rows.forEach((row, q) => row.slice(0, q + 1).forEach((weight, k) => {
      if (weight < 0.002) return;
      // The root, so that a tenth is seen beside a one.
      made.push(this.square("weight", [q, k], { "fill-opacity": Math.sqrt(Math.min(weight, 1)).toFixed(3), "data-at": `${q} ${k}` }));
    }));
    return [...made, ...listed.map((at) => this.square("listed", at))];
  }

  /** A token's name stands where its row ends, which is where its column begins. */
  private names(): SVGElement[] {
    const every = Math.ceil(LETTERS / this.step), made: SVGElement[] = [];
    for (let t = 0; t < this.of.rows.length; t += every) {
      const name = svg("text", { x: (t + 1) * this.step + 3, y: (t + 0.5) * this.step + 3.5, "data-token": t });
      name.textContent = clip(spaced(this.of.tokens[t] ?? ""), 12);
      made.push(name);
    }
    return made;
  }

  private square(name: string, [q, k]: At, more: Record<string, string | number> = {}): SVGElement {
    return svg("rect", { class: name, x: k * this.step, y: q * this.step, width: this.size, height: this.size, ...more });
  }

  /** Point a cell out, with its row and its column, and say what it is. */
  private show(at: At | null): void {
    const { rows, chosen } = this.of;
    this.marks.replaceChildren();
    if (at) {
      const [q, k] = at, along = (cells: number) => (cells - 1) * this.step + this.size;
      this.marks.append(this.square("cross", [q, 0], { width: along(q + 1) }), this.square("cross", [k, k], { height: along(rows.length - k) }), this.square("at", at));
    }
    if (chosen) this.marks.append(this.square("chosen", chosen));
    for (const name of this.picture.querySelectorAll("text")) {
      name.classList.toggle("on", at !== null && at.includes(Number(name.dataset.token)));
    }
    this.said.textContent = at ? this.words(at) : "";
  }

  private words([q, k]: At): string {
    const token = (t: number) => `${quoted(clip(this.of.tokens[t] ?? "", 40))} at ${t}`;
    return `${token(q)} attends to ${token(k)}: ${percent(this.of.rows[q]?.[k] ?? 0)}`;
  }

  private listen(): void {
    const { picture } = this, T = this.of.rows.length;
    const under = (e: MouseEvent): At | null => {
      const box = picture.getBoundingClientRect(), scale = WIDTH / box.width;
      const cell = (px: number) => Math.floor((px * scale - EDGE) / this.step), k = cell(e.clientX - box.left), q = cell(e.clientY - box.top);
      return q >= 0 && q < T && k >= 0 && k <= q ? [q, k] : null;
    };
    picture.addEventListener("pointermove", (e) => this.show(under(e) ?? this.of.chosen));
    picture.addEventListener("pointerleave", () => this.show(this.of.chosen));
    picture.addEventListener("click", (e) => { const at = under(e); if (at) this.of.choose(at); });
    picture.addEventListener("keydown", (e) => {
      const [q, k] = this.cursor ?? [T - 1, T - 1];
      const to = { ArrowUp: [q - 1, k], ArrowDown: [q + 1, k], ArrowLeft: [q, k - 1], ArrowRight: [q, k + 1], Home: [q, 0], End: [q, q] }[e.key];
      if (e.key === "Enter" || e.key === " ") this.of.choose([q, k]);
      else if (to) {
        const row = Math.min(T - 1, Math.max(0, to[0] as number));
        this.cursor = [row, Math.min(row, Math.max(0, to[1] as number))];
        this.show(this.cursor);
      } else return;
      e.preventDefault();
    });
  }
}
