// How far to trust the graph: scores, certificate, and what patches of the model did.

import type { App } from "./app";
import { type Json, asObject, asText } from "./document";
import { button, clip, el, isNumber, percent, spaced, svg, visible } from "./dom";
import { changeText, howText, patchOfRecord } from "./patches";

const number = (x: unknown): number | null => (isNumber(x) ? x : null);
const two = (x: unknown): string => (isNumber(x) ? x.toFixed(2).replace("-", "−") : "–");
const within = (x: unknown): string =>
  Array.isArray(x) && x.every(isNumber) ? ` [${x.map(two).join(", ")}]` : "";

interface Score { name: string; value: string; text: string }

/** What the header shows in one line and the panel explains. */
export function scoreList(app: App): Score[] {
  const all = asObject(app.report.scores ?? app.report), full = asObject(all.full ?? all), pruned = asObject(all.pruned);
  const proof = asObject(app.report.certificate), list: Score[] = [];
  const shown = (key: string) => (isNumber(pruned[key]) ? `; ${percent(pruned[key])} in what is shown` : "");
  const most = (key: string) => (isNumber(full[key]) ? `; at most ${percent(full[key])} if more features were added` : "");
  const { replacement, completeness, mean_path_length: steps } = full, worst = number(proof.max_relative_row_error);
  if (isNumber(replacement)) list.push({ name: "Replacement", value: percent(replacement), text: `of the influence on the output runs through features alone${shown("replacement")}${most("replacement_at_most")}` });
  if (isNumber(completeness)) list.push({ name: "Completeness", value: percent(completeness), text: `of what nodes read comes from features and tokens${shown("completeness")}${most("completeness_at_most")}` });
  if (isNumber(full.completeness_logit_edges)) list.push({ name: "Output edges", value: percent(full.completeness_logit_edges), text: `of what the output reads directly, but for the constant term, comes from features and tokens${shown("completeness_logit_edges")}` });
  if (isNumber(steps)) list.push({ name: "Path length", value: steps.toFixed(1), text: "steps from a token to the output, on average" });
  if (worst !== null) list.push({ name: "Largest sum error", value: percent(worst), text: `between a node and the sum of its inputs: ${worst < 1e-3 ? "rounding only" : "more than rounding, mistrust the weights"}` });
  const origins = ([["errors", proof.error_share], ["constant terms", proof.bias_share], ["left out", proof.rest_share]] as const)
    .flatMap(([what, share]) => (isNumber(share) ? [{ what, share }] : []));
  if (origins.length) list.push({ name: "Other inputs", value: percent(origins.reduce((s, o) => s + o.share, 0)), text: `of everything read is ${origins.map((o) => `${o.what} ${percent(o.share)}`).join(", ")}` });
  const live = asObject(app.validation?.live), patches = number(live.spearman) ?? number(asObject(asObject(app.validation?.total_effect).constrained).spearman);
  if (patches !== null) list.push({ name: "Patches agree", value: two(patches), text: "rank correlation of predicted and measured effects of ablations" });
  return list;
}

export function evidence(app: App): HTMLElement[] {
  const scores = scoreList(app), cards = el("dl", "cards");
  for (const s of scores) cards.append(el("div", "", el("dt", "", s.name), el("dd", "big", s.value), el("dd", "say", s.text)));
  const parts: HTMLElement[] = [el("div", "head", el("div", "", el("h2", "", "How far to trust this graph")))];
  if (scores.length) parts.push(cards);
  else parts.push(el("p", "note", "The file has no scores."));
  parts.push(...derivative(asObject(app.report.derivative)));
  if (app.patches.length) parts.push(el("h3", "", `Patches (${app.patches.length})`), patchList(app));
  parts.push(el("h3", "", "Validation"));
  if (app.validation) parts.push(...validation(app, app.validation));
  else parts.push(el("p", "note", "No patches were run. “jaxclt validate DIR” compares the graph's predictions with patches of the model."));
  return parts;
}

/** How total effects agree with the model's own derivative, by either reading. */
function derivative(found: Json): HTMLElement[] {
  const by = asObject(found.by_response), row = (reading: string, d: Json) =>
    isNumber(d.spearman) ? [[reading, two(d.spearman), isNumber(d.sign) ? percent(d.sign) : "–", two(d.slope)]] : [];
  const rows = [...row("by value", found), ...row("by response", by)];
  if (!rows.length) return [];
  const parts = [el("h3", "", "The model's derivative"), grid(["total effects", "Spearman", "sign", "slope"], rows, `What features do to ${clip(visible(asText(found.contrast)), 80)} against the model's first-order effects`)];
  if (isNumber(by.hidden)) parts.push(el("p", "note", `${percent(by.hidden)} of the derivative is hidden: it goes through errors, features that are no nodes, and gates that move.`));
  return parts;
}

/** What was patched: target before and after; pressed, the rest is shown beside the subgraph. */
function patchList(app: App): HTMLElement {
  const list = el("ul", "links");
  list.setAttribute("aria-label", "Patches");
  for (const record of app.patches) {
    const first = asObject(Array.isArray(record.targets) ? record.targets[0] : null), of = patchOfRecord(record);
    const row = button("", "surprise", () => app.openPatch(of));
    const p = (x: unknown) => (isNumber(x) ? percent(x) : "–");
    row.append(el("span", "name", clip(of.name, 80), "  ", el("i", "", `${changeText(record)}, ${howText(record)}`)),
      el("span", "raw", `${spaced(asText(first.token))} ${p(first.p_before)} → ${p(first.p_after)}`));
    list.append(el("li", "", row));
  }
  return list;
}

function grid(head: string[], rows: string[][], caption: string): HTMLElement {
  const made = el("table", "small", el("caption", "", caption),
    el("thead", "", el("tr", "", ...head.map((t, i) => Object.assign(el("th", i ? "num" : "", t), { scope: "col" })))),
    el("tbody", "", ...rows.map((row) => el("tr", "", ...row.map((t, i) => el("td", i ? "num" : "", t))))));
  const scroller = el("div", "scroll", made);
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", caption);
  return scroller;
}

const SAID = [
  ["response", "effects by response"],
  ["derivative", "the model's derivative"],
  ["finite", "replacement model, attention and norms live"],
  ["value", "effects by value"],
] as const;

/** One line for each prediction of a kind of patch. */
function liveRows(kind: string, found: Json): string[][] {
  const patch = kind === "full" ? "ablated" : `times ${asText(found.factor)}`;
  return SAID.flatMap(([name, says]) => {
    const one = name === found.predicted_by ? found : asObject(found[name]);
    if (!isNumber(one.n)) return [];
    return [[patch, says, two(one.spearman) + within(one.interval), isNumber(one.sign) ? percent(one.sign) : "–", two(one.slope)]];
  });
}

const PREDICTED: Record<string, string> = { value: "total effects", local: "replacement model", derivative: "model's derivative", last_norm: "total effects, last norm live" };

/** A line of like with like, and what other predictions say there. */
function alikeRows(line: Json, where: string): string[][] {
  const of = (by: string, e: Json): string[] =>
    [where, PREDICTED[by] ?? by, two(e.spearman) + within(e.interval), isNumber(e.sign) ? percent(e.sign) : "–", two(e.slope), isNumber(e.within_2) ? percent(e.within_2) : "–"];
  const first = asText(line.predicted_by), others = Object.keys(PREDICTED).filter((by) => by !== first && line[by]);
  return first ? [of(first, line), ...others.map((by) => of(by, asObject(line[by])))] : [];
}

function validation(app: App, v: Json): HTMLElement[] {
  const effect = asObject(v.total_effect), parts: HTMLElement[] = [];
  if (v.verdict) parts.push(el("p", "verdict", asText(v.verdict)));
  const alike = [["held", "norms held"], ["live", "in the model"]].flatMap(([name = "", where = ""]) => alikeRows(asObject(v[name]), where));
  if (alike.length) parts.push(grid(["measured", "predicted by", "Spearman", "sign", "slope", "within 2"], alike, `Ablations, like with like: effects on ${asObject(v.held).on === "contrast" ? clip(visible(asText(v.contrast)), 80) : "the targets"}`));
  const rows = ["constrained", "iterative", "additive"].filter((mode) => effect[mode]).map((mode) => {
    const e = asObject(effect[mode]);
    return [mode, two(e.spearman) + within(e.interval), two(e.pearson), isNumber(e.sign_agreement) ? percent(e.sign_agreement) : "–", two(e.slope)];
  });
  if (rows.length) parts.push(grid(["patch", "Spearman", "Pearson", "sign", "slope"], rows, "Predicted and measured effects on the targets"));
  const live = ["small", "full"].flatMap((kind) => liveRows(kind, asObject(asObject(v.patterns_live)[kind])));
  if (live.length) parts.push(grid(["patch", "predicted by", "Spearman", "sign", "slope"], live, "In the model, attention patterns live"));
  const influence = asObject(v.influence_vs_kl), pairs = asObject(v.pairwise), ranks: string[][] = [];
  for (const key of ["influence", "activation", "direct"]) {
    if (isNumber(influence[key])) ranks.push([`${key} with KL of an ablation`, two(influence[key]) + within(asObject(influence.intervals)[key])]);
  }
  if (isNumber(pairs.spearman)) ranks.push(["influence between features", two(pairs.spearman) + within(pairs.interval)]);
  if (ranks.length) parts.push(grid(["ranks by", "Spearman"], ranks, "What predicts what matters"));
  const groups = asObject(v.supernodes).groups;
  if (Array.isArray(groups) && groups.length) {
    parts.push(grid(["ablated group", "predicted", "measured", "KL"],
      groups.map(asObject).map((g) => [`${clip(visible(asText(g.name)), 60)} (${asText(g.members)})`, two(g.predicted), two(g.measured), two(g.kl)]),
      "Patched supernodes: change of the first target's logit"));
  }
  const spread = faithfulness(asObject(v.faithfulness), v.faithfulness_layers);
  if (spread) parts.push(spread);
  const wrong = (Array.isArray(v.failures) ? v.failures : []).map(asObject);
  if (wrong.length) {
    const list = el("ul", "links");
    list.setAttribute("aria-label", "Largest surprises");
    for (const f of wrong) {
      const n = app.model.byId.get(`${asText(f.layer)}_${asText(f.feature)}_${asText(f.pos)}`);
      const row = button("", "surprise", () => { if (n) app.select(n); });
      row.disabled = !n;
      row.append(el("span", "name", n ? app.model.label(n) : `feature ${asText(f.feature)}`, "  ", el("i", "", `L${asText(f.layer)} position ${asText(f.pos)}`)),
        el("span", "raw", `${two(f.predicted)} predicted, ${two(f.measured)} measured`));
      list.append(el("li", "", row));
    }
    parts.push(el("h3", "", "Largest surprises"), list);
  }
  return parts;
}

/** Mean cosine by layers after the perturbation, one line for each kind. */
function faithfulness(found: Json, layers: unknown): HTMLElement | null {
  const W = 340, H = 120, left = 26, low = 16;
  const kinds = [["encoder", "", "along encoders"], ["upstream", "6 3", "features changed"], ["random", "2 3", "random"]] as const;
  const lines = kinds.flatMap(([kind, dash, says]) => {
    const rows = asObject(found[kind]).cosine;
    if (!Array.isArray(rows) || !Array.isArray(layers)) return [];
    const sums: number[] = [], counts: number[] = [];
    rows.forEach((row: unknown, i) => {
      if (Array.isArray(row)) row.forEach((value: unknown, layer) => {
        const d = layer - Number(layers[i]);
        if (d >= 0 && isNumber(value)) { sums[d] = (sums[d] ?? 0) + value; counts[d] = (counts[d] ?? 0) + 1; }
      });
    });
    return sums.length ? [{ dash, says, mean: Array.from(sums, (s, d) => (counts[d] ? (s ?? 0) / (counts[d] ?? 1) : null)) }] : [];
  });
  if (!lines.length) return null;
  const far = Math.max(...lines.map((l) => l.mean.length)) - 1 || 1;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img" });
  const next = lines.map((l) => `${l.says} ${two(l.mean[1])}`).join(", ");
  picture.setAttribute("aria-label", `Cosine of predicted and measured spread by layers; one layer on: ${next}`);
  const x = (d: number) => left + (d / far) * (W - left - 6), y = (c: number) => 6 + (1 - Math.max(c, 0)) * (H - low - 6);
  const text = (at: [number, number], anchor: string, what: string) => {
    const t = svg("text", { x: at[0], y: at[1], "text-anchor": anchor });
    t.textContent = what;
    picture.append(t);
  };
  for (const c of [0, 0.5, 1]) {
    picture.append(svg("line", { x1: left, x2: W - 6, y1: y(c), y2: y(c), class: "grid" }));
    text([left - 5, y(c) + 4], "end", String(c));
  }
  text([left, H - 2], "start", "same layer");
  text([W - 6, H - 2], "end", `${far} layers on`);
  for (const l of lines) {
    const points = l.mean.flatMap((c, d) => (c === null ? [] : [`${x(d).toFixed(1)},${y(c).toFixed(1)}`]));
    picture.append(svg("polyline", { points: points.join(" "), class: "line", "stroke-dasharray": l.dash }));
  }
  const legend = el("figcaption", "note", `Does a perturbation spread as in the model? Cosine, mean over layers. ${lines.map((l) => `${{ "": "Solid", "6 3": "dashed", "2 3": "dotted" }[l.dash]}: ${l.says}`).join("; ")}.`);
  const figure = el("figure", "", legend);
  figure.prepend(picture);
  return figure;
}
