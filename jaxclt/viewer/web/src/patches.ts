// What the model answers when a supernode's features are changed: asked of the server,
// or read from what `jaxclt patch` and `jaxclt validate` left beside the graph.

import type { App, PatchOf } from "./app";
import { type Json, asObject, asText } from "./document";
import { $, button, clip, el, inPath, isNumber, percent, plural, short, spaced, visible } from "./dom";

const MODES = [
  ["constrained", "constrained: MLPs are clamped"],
  ["iterative", "iterative: replacement model"],
  ["additive", "additive: MLPs respond"],
] as const;
const PATTERNS = [
  ["frozen", "patterns frozen"],
  ["live", "patterns live"],
] as const;
const MOST = 100; // that the server accepts as a factor
const MOST_NAME = 300;

const byKey = (ids: string[]): string => ids.slice().sort().join(" ");
const idsOf = (record: Json): string[] => (Array.isArray(record.nodes) ? record.nodes.map(asText) : []);

/** How the features were changed, in a few letters. */
export function changeText(record: Json): string {
  const [how, value] = Object.entries(asObject(record.change))[0] ?? [];
  if (!isNumber(value)) return "changed";
  return how === "scale" ? `× ${short(value)}` : how === "add" ? `${value < 0 ? "−" : "+"} ${short(Math.abs(value))}` : `set to ${short(value)}`;
}

/** What a patch held, and where it acted, in a few words. */
export function howText(record: Json): string {
  const { patterns } = asObject(record.options), heads = (Array.isArray(record.heads) ? record.heads : []).map(asText);
  return [[asText(record.mode), ...heads].join(" "), ...(patterns ? [`patterns ${asText(patterns)}`] : [])].join(", ");
}

export function patchOfRecord(record: Json): PatchOf {
  return { name: visible(asText(record.name)), ids: idsOf(record) };
}

export class Patches {
  private readonly box = $("patched");
  private scale = "0";
  private mode = "constrained";
  private patterns = "frozen";
  private running = false;
  private said = "";
  private wrong = false;
  private of: PatchOf | null = null;

  constructor(private readonly app: App) {}

  show(): void {
    const of = this.app.patchOf, focused = this.box.contains(document.activeElement);
    if (of !== this.of) { this.said = ""; this.wrong = false; }
    this.of = of;
    this.box.hidden = of === null;
    document.body.classList.toggle("patching", of !== null);
    if (!of) { this.box.replaceChildren(); return; }
    const title = el("h3", "", el("span", "name", `Patch ${clip(visible(of.name), 80)}`),
      button("Close", "plain", () => { this.app.openPatch(null); $("sidebody").focus(); }));
    const status = el("p", this.wrong ? "note bad" : "note", this.said);
    status.setAttribute("role", "status");
    const command = el("code", "command", this.command(of)), results = this.results(of);
    this.box.replaceChildren(title, this.controls(of, command), status, ...(results.length ? results : [el("p", "note", "Not patched yet.")]));
    if (!this.app.serve?.patch) this.box.append(...this.toRun(command));
    if (focused) (this.box.querySelector<HTMLElement>(".go:not(:disabled)") ?? this.box).focus();
  }

  private controls(of: PatchOf, command: HTMLElement): HTMLElement {
    const form = el("form", "patchform"), scale = el("input");
    const choice = (options: readonly (readonly [string, string])[], label: string, value: string, take: (value: string) => void) => {
      const select = el("select", "plain");
      for (const [value, says] of options) select.append(Object.assign(el("option", "", says), { value }));
      select.value = value;
      select.setAttribute("aria-label", label);
      select.addEventListener("change", () => { take(select.value); command.textContent = this.command(of); });
      return select;
    };
    scale.type = "number";
    scale.step = "any";
    scale.min = String(-MOST);
    scale.max = String(MOST);
    scale.value = this.scale;
    scale.addEventListener("input", () => { this.scale = scale.value; command.textContent = this.command(of); });
    form.append(el("label", "", `Scale ${plural(of.ids.length, "feature")} by `, scale),
      choice(MODES, "Kind of patch", this.mode, (value) => { this.mode = value; }),
      choice(PATTERNS, "Attention patterns", this.patterns, (value) => { this.patterns = value; }));
    scale.title = "0 ablates, −1 inhibits, 2 doubles";
    form.addEventListener("submit", (e) => { e.preventDefault(); if (this.app.serve?.patch) void this.run(of); });
    if (this.app.serve?.patch) {
      const run = el("button", "plain go", this.running ? "Running…" : "Run");
      run.disabled = this.running;
      form.append(run);
    }
    return form;
  }

  /** For who has no server with a model: the command, to copy. */
  private toRun(command: HTMLElement): HTMLElement[] {
    command.tabIndex = 0;
    const copy = button("Copy", "plain", () => { void this.copy(command); });
    copy.setAttribute("aria-label", "Copy the command");
    const why = this.app.serve
      ? "The server was started with --no-patch. Run this in its folder, then load the page again:"
      : "This page cannot run the model. Run this, then open the page again:";
    return [el("p", "note", why), el("div", "run", command, copy)];
  }

  /** What to type for the same patch. */
  private command(of: PatchOf): string {
    const places = of.ids.map((id) => { const [layer, feature, pos] = id.split("_"); return `${layer}:${pos}:${feature}`; });
    const quote = (text: string) => (/^[\w./:-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
    const at = this.app.serve ? this.app.serve.path
      : location.protocol === "file:" ? decodeURIComponent(location.pathname).split("/").at(-2) || "DIR" : "DIR";
    const more = (this.mode === "constrained" ? "" : ` --mode ${this.mode}`) + (this.patterns === "frozen" ? "" : ` --patterns ${this.patterns}`);
    return `jaxclt patch ${quote(at)} --feature ${places.join(" ")} --scale ${Number(this.scale) || 0}${more}`;
  }

  private async copy(from: HTMLElement): Promise<void> {
    try {
      await navigator.clipboard.writeText(from.textContent ?? "");
      this.said = "Copied";
    } catch { // a notebook's frame may not write it
      getSelection()?.selectAllChildren(from);
      this.said = document.execCommand("copy") ? "Copied" : "Press Ctrl + C to copy what is marked";
    }
    const status = this.box.querySelector("[role=status]");
    if (status) status.textContent = this.said;
  }

  private async run(of: PatchOf): Promise<void> {
    const { app } = this, scale = Number(this.scale);
    if (this.scale.trim() === "" || !Number.isFinite(scale) || Math.abs(scale) > MOST) {
      this.tell(`The factor is a number from −${MOST} to ${MOST}`, true);
      return;
    }
    this.running = true;
    this.tell("The model runs; the first patch also loads and compiles it…");
    try {
      const answer = await fetch(`/api/patch/${inPath(app.serve?.path ?? "")}`, {
        method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ nodes: of.ids, scale, mode: this.mode, patterns: this.patterns, name: of.name.slice(0, MOST_NAME) }),
      });
      const said = asObject(await answer.json().catch(() => ({})));
      if (!answer.ok) throw new Error(asText(said.error) || String(answer.status));
      const made = (r: Json) => JSON.stringify([idsOf(r).sort(), r.change, r.mode, r.layers, r.options, r.heads]);
      app.patches = [said, ...app.patches.filter((r) => made(r) !== made(said))];
      this.running = false;
      this.tell("");
    } catch (error) {
      this.running = false;
      this.tell(`Not patched: ${error instanceof Error ? error.message : String(error)}`, true);
    }
  }

  private tell(text: string, wrong = false): void {
    this.said = text;
    this.wrong = wrong;
    this.app.changed("patches");
  }

  /** Of these features, from here and from earlier. */
  private results(of: PatchOf): HTMLElement[] {
    const { app } = this, own = byKey(of.ids), parts: HTMLElement[] = [];
    for (const record of app.patches) if (byKey(idsOf(record)) === own) parts.push(result(record));
    const groups = asObject(app.validation?.supernodes).groups;
    for (const g of Array.isArray(groups) ? groups.map(asObject) : []) {
      if (asText(g.name) !== of.name || Number(g.members) !== of.ids.length) continue;
      parts.push(el("p", "note", `Validation ablated it: the first target's logit was to change by ${number(g.predicted)} and changed by ${number(g.measured)}; KL ${number(g.kl)} nats.`));
    }
    return parts;
  }
}

const number = (x: unknown): string => (isNumber(x) ? short(x) : "–");

/** Targets and most probable tokens, before and after. */
function result(record: Json): HTMLElement {
  const layers = Array.isArray(record.layers) ? record.layers.map(asText).join("–") : "";
  const says = `${changeText(record)}, ${howText(record)}, layers ${layers}, KL ${number(record.kl)} nats`;
  const pairs = new Map<string, [number | null, number | null]>();
  const take = (list: unknown, which: 0 | 1) => {
    for (const item of Array.isArray(list) ? list : []) {
      if (!Array.isArray(item)) continue;
      const token = asText(item[0]), pair = pairs.get(token) ?? [null, null];
      if (isNumber(item[1])) pair[which] = item[1];
      pairs.set(token, pair);
    }
  };
  const targets = (Array.isArray(record.targets) ? record.targets : []).map(asObject);
  for (const t of targets) pairs.set(asText(t.token), [isNumber(t.p_before) ? t.p_before : null, isNumber(t.p_after) ? t.p_after : null]);
  take(record.top_before, 0);
  take(record.top_after, 1);
  const target = new Set(targets.map((t) => asText(t.token)));
  const rows = [...pairs].sort((a, b) => most(b[1]) - most(a[1])).slice(0, 12).map(([token, [before, after]]) => {
    const cell = (p: number | null) => {
      const bar = el("b");
      bar.style.width = `${100 * (p ?? 0)}%`;
      return el("td", "num", p === null ? "–" : percent(p), el("span", "bar", bar));
    };
    return el("tr", "", el("td", "", clip(spaced(token), 24), target.has(token) ? el("small", "", " target") : ""), cell(before), cell(after));
  });
  const head = el("tr", "", ...["token", "before", "patched"].map((t, i) => Object.assign(el("th", i ? "num" : "", t), { scope: "col" })));
  const table = el("table", "small", el("caption", "", says), el("thead", "", head), el("tbody", "", ...rows));
  const parts: HTMLElement[] = [table];
  const warning = asText(record.warning);
  if (warning) parts.push(el("p", "note", warning));
  return el("div", "result", ...parts);
}

const most = (pair: [number | null, number | null]): number => Math.max(pair[0] ?? 0, pair[1] ?? 0);
