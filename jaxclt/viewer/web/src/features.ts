// What a feature does in general: its top tokens and the texts that switch it on.

import type { App } from "./app";
import { type Json, asObject, asText } from "./document";
import { count, el, inPath, isNumber, percent, short, svg, visible } from "./dom";
import { type GraphNode, cantor, isBelow } from "./model";

const FEW_EXAMPLES = 5, BEFORE = 5, AFTER = 20;

interface Example { tokens: string[]; acts: number[]; centre: number }
interface Quantile { name: string; examples: Example[] }
interface Feature {
  top: string[]; bottom: string[]; quantiles: Quantile[]; histogram: number[];
  low: number | null; high: number | null; frequency: number | null;
}

const texts = (x: unknown): string[] => (Array.isArray(x) ? x.map(asText) : []);
const numbers = (x: unknown): number[] => (Array.isArray(x) ? x.map(Number).map((v) => (Number.isFinite(v) ? v : 0)) : []);

function readFeature(raw: Json): Feature {
  const quantiles = (Array.isArray(raw.examples_quantiles) ? raw.examples_quantiles : []).map(asObject).map((q) => ({
    name: asText(q.quantile_name),
    examples: (Array.isArray(q.examples) ? q.examples : []).map(asObject).map((e) => {
      const tokens = texts(e.tokens), acts = numbers(e.tokens_acts_list);
      const most = acts.reduce((m, v, t) => (Math.abs(v) > Math.abs(acts[m] ?? 0) ? t : m), 0);
      return { tokens, acts, centre: isNumber(e.train_token_ind) ? e.train_token_ind : most };
    }),
  }));
  const number = (x: unknown) => (isNumber(x) ? x : null);
  return {
    top: texts(raw.top_logits), bottom: texts(raw.bottom_logits), quantiles, histogram: numbers(raw.histogram),
    low: number(raw.act_min), high: number(raw.act_max), frequency: number(raw.activation_frequency),
  };
}

export const isFeatureFile = (raw: unknown): boolean => Array.isArray(asObject(raw).examples_quantiles);

/** Records by layer_index or by cantor number, as files are named. */
export class Features {
  private readonly records = new Map<string, Json>();
  private readonly missing = new Set<string>();

  constructor(private readonly app: App) { this.embedded(); }

  embedded(): void {
    for (const [key, raw] of Object.entries(asObject(this.app.model.doc.jaxclt.features))) this.records.set(key, asObject(raw));
  }

  /** Take a file; its name is the number unless it has none. */
  add(name: string, raw: Json): void {
    const key = /^(\d+(?:_\d+)?)\.json$/.exec(name)?.[1] ?? asText(raw.index);
    this.records.set(key, raw);
  }

  get size(): number { return this.records.size; }

  find(n: GraphNode): Feature | null {
    const raw = this.records.get(n.key) ?? this.records.get(String(cantor(n)));
    return raw ? readFeature(raw) : null;
  }

  /** Ask the server that shows this page, once. */
  async request(n: GraphNode): Promise<boolean> {
    const { serve } = this.app;
    if (!serve || this.missing.has(n.key)) return false;
    this.missing.add(n.key);
    const answer = await fetch(`/api/feature/${inPath(serve.path)}/${cantor(n)}.json`);
    if (!answer.ok) return false;
    this.records.set(n.key, asObject(await answer.json()));
    return true;
  }

  /** The panel of a feature, or null where nothing is known. */
  panel(n: GraphNode): HTMLElement | null {
    const f = this.find(n);
    if (!f) return null;
    const body = el("div", "feature"), below = isBelow(n);
    const logits = (title: string, list: string[]) => {
      if (list.length) body.append(el("p", "logits", el("b", "", title), ...list.slice(0, 10).map((t) => el("span", "chip", visible(t)))));
    };
    // What it writes is its direction times an activation: below zero, the reverse.
    logits(below ? "Raises here, below zero" : "Top logits", below ? f.bottom : f.top);
    logits(below ? "Lowers here" : "Bottom logits", below ? f.top : f.bottom);
    if (f.frequency !== null) body.append(el("p", "note", `Active on ${percent(f.frequency)} of tokens.`));
    if (f.histogram.length) body.append(histogram(f, n.activation));
    const sizes = f.quantiles.flatMap((q) => q.examples.flatMap((e) => e.acts)).map(Math.abs);
    const high = Math.max(Math.abs(f.high ?? 0), Math.abs(f.low ?? 0)) || sizes.reduce((m, v) => Math.max(m, v), 1e-9);
    if (f.quantiles.some((q) => q.examples.some((e) => e.acts.some((v) => v < 0)))) {
      body.append(el("p", "note shades", el("span", "up", "above zero"), " ", el("span", "down much", "below zero")));
    }
    // Those of the side that it is on here come first.
    const here = (e: Example) => (e.acts[e.centre] ?? 0) < 0 === below;
    const quantiles = f.quantiles.slice().sort((a, b) => Number(b.examples.every(here)) - Number(a.examples.every(here)));
    if (below && quantiles.length && !quantiles.some((q) => q.examples.some(here))) {
      body.append(el("p", "note", "All examples are of the other side: above zero, not below it as here."));
    }
    for (const [i, q] of quantiles.entries()) {
      const list = el("ol", "examples", ...q.examples.slice(0, i === 0 ? 20 : FEW_EXAMPLES).map((e) => el("li", "", example(e, high))));
      const box = el("details", "", el("summary", "", `${q.name || "Examples"} (${count(q.examples.length)})`), list);
      box.open = i === 0;
      body.append(box);
    }
    return body;
  }
}

/** Tokens shaded by the size of their activation; those below zero in another colour, and underlined. */
function example(e: Example, high: number): HTMLElement {
  const first = Math.max(0, e.centre - BEFORE), line = el("span", "example", first > 0 ? "…" : "");
  for (let t = first; t < Math.min(e.tokens.length, e.centre + AFTER); t++) {
    const act = e.acts[t] ?? 0, token = el("span", t === e.centre ? "centre" : "", visible(e.tokens[t] ?? ""));
    if (act !== 0) {
      const size = Math.min(1, Math.abs(act) / high);
      token.classList.add(act > 0 ? "up" : "down", size > 0.1 ? "much" : "little"); // dense features underline every word else
      token.style.setProperty("--shade", (0.08 + 0.42 * size).toFixed(2));
      token.title = `activation ${short(act)}`;
    }
    line.append(token);
  }
  return line;
}

function histogram(f: Feature, here: number | null): HTMLElement {
  const W = 320, H = 44, most = Math.max(...f.histogram, 1e-9), bar = W / f.histogram.length;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "histogram", role: "img" });
  picture.setAttribute("aria-label", "Histogram of the feature's activations");
  f.histogram.forEach((v, i) => {
    const h = (Math.max(v, 0) / most) * (H - 4);
    picture.append(svg("rect", { x: i * bar, y: H - h, width: Math.max(bar - 0.5, 0.5), height: h, class: "column" }));
  });
  const low = f.low ?? 0, high = f.high ?? 0, zero = (-low / (high - low)) * W;
  if (low < 0 && high > 0) picture.append(svg("line", { x1: zero, x2: zero, y1: 0, y2: H, class: "zero" }));
  if (here !== null && high > low) {
    const x = Math.min(1, Math.max(0, (here - low) / (high - low))) * W;
    picture.append(svg("line", { x1: x, x2: x, y1: 0, y2: H, class: "here" }));
  }
  const says = high > low ? `${short(low)} to ${short(high)}${here === null ? "" : `; here ${short(here)}`}` : "";
  const figure = el("figure", "", el("figcaption", "note", `Activations ${says}`.trim()));
  figure.prepend(picture);
  return figure;
}
