// What the picture says under the pointer.

import type { App } from "./app";
import { $, clip, count, percent, plural, quoted, short, signed, visible } from "./dom";
import type { Layout } from "./layout";
import type { GraphNode, Model } from "./model";

/** A text at the pointer; none hides it. */
export function showTip(text: string, at: MouseEvent): void {
  const tip = $("tip");
  tip.hidden = text === "";
  if (!text) return;
  tip.textContent = text;
  const right = at.clientX + 14 + tip.offsetWidth > innerWidth - 4, low = at.clientY + 18 + tip.offsetHeight > innerHeight;
  tip.style.left = `${right ? Math.max(4, at.clientX - tip.offsetWidth - 14) : at.clientX + 14}px`;
  tip.style.top = `${low ? Math.max(4, at.clientY - tip.offsetHeight - 12) : at.clientY + 18}px`;
}

export function nodeText(model: Model, n: GraphNode): string {
  return [clip(model.label(n), 300), `${n.kind === "feature" ? `feature ${n.number} · ` : ""}${model.where(n)}`,
    n.activation === null ? "" : `activation ${short(n.activation)}`,
    n.rank === null ? "" : `${model.byChange ? "change" : "influence"} rank ${count(n.rank)} of ${count(model.nRanked)}`].filter(Boolean).join("\n");
}

/** What a rail or a stub holds. */
export function foldText(app: App, model: Model, t: number, column: Layout["columns"][number] | undefined): string {
  const token = quoted(clip(model.tokens[t] ?? "", 40)), press = "press to see each on its own (key e)";
  if (column?.stub) {
    const { share, rule } = model.story.sink;
    return [`${token}: attention sink`, share === null ? "" : `${percent(share)} of the influence that the graph traces to tokens`, clip(rule, 200), press].filter(Boolean).join("\n");
  }
  const of = model.byChange ? "change" : "influence", open = app.unfolded.has(t) || app.errors;
  return `errors at ${token}\n${percent(column?.rail?.share ?? 0)} of what the ${of} rests on, in ${plural(column?.rail?.errors.length ?? 0, "layer")}\n${open ? "press to fold them" : press}`;
}

/** A token, and what it contributes. */
export function tokenText(model: Model, t: number): string {
  const said = model.story.tokens.find((x) => x.position === t), lines = [`position ${t}`, clip(visible(model.tokens[t] ?? ""), 300)];
  if (said && said.effect !== null) lines.push(`without it the lead of the answer changes by ${signed(said.effect)} (measured)`);
  if (said && said.share !== null) lines.push(`the graph's share: ${percent(said.share)}`);
  return lines.join("\n");
}
