// The attention tab: which heads move the output, where they attend, and what makes them.

import type { App } from "./app";
import { type Attention, type Cell, type Named, type Pair, SIDES, headName } from "./attention";
import { button, clip, count, el, fact, percent, quoted, signed, visible } from "./dom";
import { Matrix } from "./matrix";
import type { GraphNode, Head } from "./model";

const HEADS = 12, PAIRS = 10, PIECES = 8, KEYS = 8; // rows until more are asked for

export function attentionPanel(app: App): HTMLElement[] {
  const { attention, head } = app;
  if (!attention) return nothing();
  return head ? headPanel(app, attention, head) : overview(app, attention);
}

function nothing(): HTMLElement[] {
  return [
    el("div", "head", el("div", "", el("h2", "", "Attention"))),
    el("p", "note", "No head of this trace was taken apart: ", el("code", "", "jaxclt trace … --attention 20"), " says which heads matter, where they attend and why."),
  ];
}

function overview(app: App, attention: Attention): HTMLElement[] {
  const { cells, heads } = attention;
  return [
    heading("Attention", `What heads do for ${contrast(attention)}: what they move there, and which nodes make them attend.`),
    ...rows("Strongest cells", "effect", cells, cells.length, (c) => cellRow(app, c, strongest(cells))),
    ...rows(`Heads (${count(heads.length)})`, "effect", heads, HEADS, (h) =>
      barred(button("", "piece", () => open(app, h.head)), h.effect, strongest(heads), el("span", "name", headName(h.head)))),
  ];
}

function headPanel(app: App, attention: Attention, head: Head): HTMLElement[] {
  const cells = attention.ofHead(head), pattern = attention.pattern(head), details = el("div", "details");
  const rank = attention.heads.findIndex((h) => headName(h.head) === headName(head)), effect = attention.heads[rank]?.effect;
  const title = heading(`Layer ${head[0]}, head ${head[1]}`, effect === undefined ? "not among the strongest heads"
    : `${signed(effect)} on ${contrast(attention)}, rank ${rank + 1} of ${count(attention.heads.length)}`);
  title.append(el("div", "actions", button("All heads", "plain", () => open(app, null))));
  const rowOf = new Map(cells.map((c) => [c.cell.join(), cellRow(app, c, strongest(cells), () => choose(c.cell))]));
  const matrix = pattern && new Matrix({
    name: headName(head), tokens: app.model.tokens, rows: pattern, listed: cells.map((c) => c.cell), chosen: app.cell, choose: (at) => choose([...at]),
  });
  function choose(at: [number, number]): void {
    app.cell = at;
    app.changed("cell");
    show(at);
  }
  function show(at: [number, number] | null): void {
    matrix?.choose(at);
    for (const [key, row] of rowOf) row.setAttribute("aria-pressed", String(key === at?.join()));
    details.replaceChildren(...(at ? cellDetails(app, attention, head, at, !pattern) : []));
  }
  show(app.cell);
  const parts: HTMLElement[] = [title];
  if (matrix) parts.push(el("p", "note", "A row is a token that attends, a column one that it attends to; framed cells are taken apart. Dashed rings in the graph: nodes that take part in the chosen one."), matrix.element);
  else if (!cells.length) parts.push(el("p", "note", "None of its cells is taken apart: ", el("code", "", "jaxclt trace … --attention N"), " does so for the N strongest."));
  parts.push(...rows(`Cells taken apart (${cells.length})`, "effect", [...rowOf.values()], cells.length, (row) => row), details);
  return parts;
}

function cellDetails(app: App, attention: Attention, head: Head, at: [number, number], alone: boolean): HTMLElement[] {
  const cell = attention.find(head, at), token = (t: number) => quoted(clip(app.model.tokens[t] ?? "", 40));
  const title = el("h3", "", `${token(at[0])} attends to ${token(at[1])}`);
  if (!cell) {
    const call = `jaxclt.attention(model, clt, graph, layer=${head[0]}, head=${head[1]}, query=${at[0]}, key=${at[1]})`;
    return [title, el("p", "note", "Not taken apart in this trace; in Python ", el("code", "", call), " does it.")];
  }
  const facts = el("dl", "facts");
  facts.append(fact("Attention", percent(cell.weight), "The weight that the row gives to this column"));
  if (cell.score !== null) facts.append(fact("Score", signed(cell.score), "Before the softmax; the pairs below add up to it"));
  facts.append(fact("Effect", signed(cell.effect), `What it moves here does this to ${contrast(attention)}`));
  if (cell.patternEffect !== null) facts.append(fact("Per unit of score", signed(cell.patternEffect), `How fast ${contrast(attention)} changes with the score: the row would attend elsewhere less`));
  const parts: HTMLElement[] = [title, facts];
  if (alone) parts.push(...attendedTo(app, cell));
  const most = largest(cell.pairs);
  parts.push(...rows("Query × key", "against other keys, score below", cell.pairs, PAIRS, (p) => pairRow(app, p, most)));
  if (cell.error !== null) parts.push(el("p", "note", `All pairs add up to the score within ${cell.error === 0 ? "rounding" : percent(cell.error)}. Against other keys: less what the same query gives to the keys attended to on average.`));
  for (const side of SIDES) {
    const pieces = cell.sides[side], longest = largest(pieces);
    parts.push(...rows(side === "query" ? "What asks" : "What answers", "sum of its pairs", pieces, PIECES,
      (p) => barred(el("div", "piece"), p.score, longest, nodeName(app, p.node))));
  }
  return parts;
}

/** The strongest weights of a row, where there is no matrix to show them. */
function attendedTo(app: App, cell: Cell): HTMLElement[] {
  const keys = cell.row.map((weight, key) => ({ weight, key })).sort((a, b) => b.weight - a.weight).filter((x) => x.weight > 0.001);
  return rows("What it attends to", "weight", keys, KEYS, ({ weight, key }) =>
    barred(el("div", "piece"), weight, keys[0]?.weight ?? 1, el("span", "node", el("span", "name", quoted(clip(app.model.tokens[key] ?? "", 60)), "  ", el("i", "", `at ${key}`))), percent(weight)));
}

// ---- rows ------------------------------------------------------------------------------------

/** A list under a heading, the first of it until more are asked for. */
function rows<T>(title: string, hint: string, items: T[], first: number, make: (item: T) => HTMLElement): HTMLElement[] {
  if (!items.length) return [];
  const list = el("ul", "links");
  list.setAttribute("aria-label", title);
  const fill = (n: number) => list.replaceChildren(...items.slice(0, n).map((item) => el("li", "", make(item))));
  fill(first);
  const parts = [el("h3", "", title, el("small", "", hint)), list];
  if (items.length > first) {
    const more = button(`Show all ${count(items.length)}`, "plain", () => { fill(items.length); more.parentElement?.remove(); });
    parts.push(el("p", "note", more));
  }
  return parts;
}

/** A row with a name, a bar of its size and the number. */
function barred<T extends HTMLElement>(row: T, size: number, most: number, name: HTMLElement, said = signed(size)): T {
  const length = el("b");
  length.style.width = `${Math.max(2, (100 * Math.abs(size)) / most)}%`;
  row.classList.add(size < 0 ? "neg" : "pos");
  row.append(name, el("span", "bar", length), el("span", "right", said));
  return row;
}

const cellRow = (app: App, c: Cell, most: number, choose = () => open(app, c.head, c.cell)): HTMLButtonElement =>
  barred(button("", "told", choose), c.effect, most, el("span", "words", clip(inOneLine(c.text), 300)));

/** A token's first space stays with its quote. */
const inOneLine = (text: string): string => visible(text).replace(/(?<=^|[\s[(])(["']) /g, "$1\u00a0");

/** A node of the graph as a button that selects it; of others the name. */
function nodeName(app: App, named: Named): HTMLElement {
  const n = app.model.byId.get(named.id);
  if (!n) return Object.assign(el("span", "node", el("span", "name", clip(visible(named.name), 120))), { title: "Not among the nodes of the page" });
  const made = button("", "node", () => app.light(n));
  made.append(el("span", "name", clip(app.model.label(n), 120), "  ", el("i", "", clip(app.model.brief(n), 60))));
  made.title = "Select it in the graph";
  return made;
}

function pairRow(app: App, p: Pair, most: number): HTMLElement {
  const row = barred(el("div", "product"), p.score, most, nodeName(app, p.query));
  row.append(nodeName(app, p.key), el("span", "raw", signed(p.whole)));
  return row;
}

/** Of a node: the scores that it takes part in. */
export function attendedBy(app: App, n: GraphNode): HTMLElement[] {
  const found = app.attention?.withNode(n.id) ?? [];
  const most = largest(found), token = (t: number) => quoted(clip(app.model.tokens[t] ?? "", 20));
  return rows(`Attention it takes part in (${found.length})`, "part of the score", found, PIECES, ({ cell, side, score }) => {
    const name = el("span", "name", `${side === "query" ? "asks" : "answers"} in ${headName(cell.head)}`, "  ", el("i", "", `${token(cell.cell[0])} to ${token(cell.cell[1])}`));
    return barred(button("", "piece", () => open(app, cell.head, cell.cell)), score, most, name);
  });
}

/** Open a head, and let the keyboard follow. */
export function open(app: App, head: Head | null, cell: [number, number] | null = null): void {
  app.openHead(head, cell);
  document.querySelector<HTMLElement>("#sidebody h2")?.focus();
}

function heading(title: string, text: string): HTMLElement {
  const h2 = el("h2", "", title);
  h2.tabIndex = -1;
  return el("div", "head", el("div", "", h2, el("p", "", text)));
}

const contrast = (attention: Attention): string => clip(visible(attention.contrast), 80) || "the output";
const strongest = (list: { effect: number }[]): number => Math.max(...list.map((x) => Math.abs(x.effect)), 1e-9);
const largest = (list: { score: number }[]): number => Math.max(...list.map((x) => Math.abs(x.score)), 1e-9);
