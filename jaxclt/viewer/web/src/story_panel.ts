// Above the picture: what the graph says in words, how far to trust it, and for readers
// of text what each token contributes, which the picture draws under the tokens.

import type { App } from "./app";
import { $, button, el, percent, quoted, signed, visible } from "./dom";
import { scoreList } from "./evidence";

export function showStory(app: App): void {
  const { story, tokens } = app.model, scores = scoreList(app), first = scores[0];
  const trust = story.trust || (first ? `${first.value} ${first.text.split(";")[0] ?? ""}.` : "");
  const box = $("story");
  box.classList.toggle("brief", !story.text.length);
  box.hidden = !story.text.length && !trust;
  // A token's own space keeps its quotation mark with it.
  $("storytext").textContent = visible(story.text.join(" ")).replace(/(["'“‘]) /g, "$1\u00a0");
  $("storytext").hidden = !story.text.length;
  $("trust").hidden = !trust;
  $("trust").replaceChildren(el("b", "", "How far to trust it: "), visible(trust), " ", button("Evidence", "inline", () => app.showTab("evidence")));
  $("effects").replaceChildren(...story.tokens.map(({ position, effect, share }) => el("li", "", [
    quoted(tokens[position] ?? ""),
    effect === null ? "" : `without it the lead of the answer changes by ${signed(effect)}`,
    share === null ? "" : `the graph's share is ${percent(share)}`,
  ].filter(Boolean).join(", "))));
}
