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
  $("storytext").replaceChildren(...linked(app, story.text.join(" ")));
  $("storytext").hidden = !story.text.length;
  $("trust").hidden = !trust;
  $("trust").replaceChildren(el("b", "", "How far to trust it: "), visible(trust), " ", button("Evidence", "inline", () => app.showTab("evidence")));
  $("effects").replaceChildren(...story.tokens.map(({ position, effect, share }) => el("li", "", [
    quoted(tokens[position] ?? ""),
    effect === null ? "" : `without it the lead of the answer changes by ${signed(effect)}`,
    share === null ? "" : `the graph's share is ${percent(share)}`,
  ].filter(Boolean).join(", "))));
}

/** The text, with names of groups to press. */
function linked(app: App, text: string): (HTMLElement | string)[] {
  const found = app.model.story.groups.map((g) => ({ name: g.name, at: g.name ? text.indexOf(g.name) : -1 })).filter((f) => f.at >= 0);
  found.sort((a, b) => a.at - b.at || b.name.length - a.name.length);
  // A token's own space keeps its quotation mark with it.
  const plain = (part: string) => visible(part).replace(/(["'“‘]) /g, "$1\u00a0");
  const parts: (HTMLElement | string)[] = [];
  let end = 0;
  for (const { name, at } of found) {
    if (at < end) continue; // inside another's
    const open = () => { const group = app.groups.find((g) => g.label === name); if (group) app.selectGroup(group); };
    parts.push(plain(text.slice(end, at)), pressed(plain(name), open));
    end = at + name.length;
  }
  return [...parts, plain(text.slice(end))];
}

/** Words to press that wrap as text does, which those of a button do not. */
function pressed(text: string, press: () => void): HTMLElement {
  const made = el("span", "inline", text);
  made.tabIndex = 0;
  made.setAttribute("role", "button");
  made.addEventListener("click", press);
  made.addEventListener("keydown", (e) => {
    if (e.key !== "Enter" && e.key !== " ") return;
    e.preventDefault();
    press();
  });
  return made;
}
