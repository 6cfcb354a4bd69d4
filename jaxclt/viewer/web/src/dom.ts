// Elements and numbers. Every string of a file reaches the page through text only.

type Child = globalThis.Node | string;

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K, className = "", ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** A name and its value, for a list of facts. */
export function fact(name: string, value: string, why = ""): HTMLElement {
  return Object.assign(el("div", "", el("dt", "", name), el("dd", "", value)), { title: why });
}

export function svg(tag: string, attributes: Record<string, string | number>): SVGElement {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  return made;
}

export function $<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found as T;
}

export function button(text: string, className: string, press: () => void): HTMLButtonElement {
  const made = el("button", className, text);
  made.type = "button";
  made.addEventListener("click", press);
  return made;
}

/** A label with a control that edits it in place: Enter keeps, Escape gives up. */
export function editText(
  shown: HTMLElement, value: string, name: string, done: (text: string) => void,
): void {
  const input = el("input", "edit");
  input.type = "text";
  input.value = value;
  input.maxLength = 500;
  input.setAttribute("aria-label", name);
  let over = false;
  const finish = (keep: boolean) => {
    if (over) return;
    over = true;
    input.replaceWith(shown);
    if (keep && input.value.trim() !== value) done(input.value.trim());
    else if (shown.tabIndex >= -1) shown.focus();
  };
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  input.addEventListener("blur", () => finish(true));
  shown.replaceWith(input);
  input.focus();
  input.select();
}

export const isNumber = (x: unknown): x is number => typeof x === "number" && Number.isFinite(x);
/** With commas between thousands; toLocaleString would load its tables first. */
export const count = (n: number): string => String(n).replace(/\B(?=(\d{3})+$)/g, ",");
export const plural = (n: number, what: string): string => `${count(n)} ${what}${n === 1 ? "" : "s"}`;

export function percent(x: number): string {
  const size = Math.abs(x);
  const digits = x === 0 || size >= 0.0995 ? String(Math.round(x * 100)) : (x * 100).toPrecision(size < 0.001 ? 1 : 2);
  return `${digits} %`;
}

export function short(x: number): string {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return (x < 0 ? "−" : "") + text;
}

export const signed = (w: number): string => (w < 0 ? "" : "+") + short(w);

/** White space that a reader must see; the raw token stays in the file. */
export const visible = (t: string): string =>
  t.replace(/\r?\n/g, "⏎").replace(/\r/g, "␍").replace(/\t/g, "⇥").replace(/[\u2028\u2029]/g, "⏎");
export const spaced = (t: string): string => (t === "" ? "∅" : visible(t).replace(/^ | $/g, "·"));
export const quoted = (t: string): string => `“${visible(t)}”`;
export const clip = (t: string, most: number): string => {
  const letters = Array.from(t.slice(0, 4 * most + 4));
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : t;
};
/** A path as part of an address. */
export const inPath = (path: string): string => path.split("/").map(encodeURIComponent).join("/");
