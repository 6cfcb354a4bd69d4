// Pictures for papers: the subgraph drawn as SVG, drawings one under the other, and as PNG.

import { type Point, extent } from "./arrange";
import { clip, visible } from "./dom";
import { type Line, strokeOf } from "./lines";
import type { Theme } from "./paint";
import { SvgPen, escape, fixed } from "./pen";
import { CARD, type Card } from "./supernodes";

const [WIDTH, HEIGHT] = CARD, INSIDE = WIDTH - 12, GAP = 12, SCALE = 3; // pixels of a PNG for one of the screen
const SIZES = [12, 10]; // of a label, the smaller where it would be cut
const DASH = "6 4", MOST_PIXELS = 16_000;

export interface Drawing { width: number; height: number; body: string }

interface Shown { cards: Card[]; at: ReadonlyMap<string, Point>; lines: Line[]; below: (card: Card) => string; theme: Theme }

/** The cards with their links; as large as they need. */
export function drawCards({ cards, at, lines, below, theme }: Shown): Drawing {
  const pen = new SvgPen(), box = around(at, lines), family = theme.font.replace(/^\S+ /, "");
  pen.fillStyle = theme.panel;
  pen.fillRect(0, 0, box.w, box.h);
  pen.save();
  pen.translate(-box.x, -box.y);
  for (const sign of ["pos", "neg"] as const) {
    pen.add(`<marker id="head-${sign}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8Z" fill="${theme[sign]}"/></marker>`);
  }
  for (const { d, share } of lines.slice().reverse()) {
    const sign = share < 0 ? "neg" : "pos", stroke = strokeOf(share, false);
    pen.add(`<path d="${d}" class="link" fill="none" stroke="${theme[sign]}" stroke-width="${stroke["stroke-width"]}" opacity="${stroke.opacity}"${share < 0 ? ` stroke-dasharray="${DASH}"` : ""} marker-end="url(#head-${sign})"/>`);
  }
  for (const { words } of lines) {
    if (words) pen.add(`<text x="${fixed(words.at[0])}" y="${fixed(words.at[1] + 4)}" font-size="11" text-anchor="middle" fill="${theme.ink}" stroke="${theme.panel}" stroke-width="4" paint-order="stroke">${escape(words.text)}</text>`);
  }
  for (const card of cards) drawCard(pen, card, at.get(card.id) ?? [0, 0], below(card), theme, family);
  pen.restore();
  return { width: Math.ceil(box.w), height: Math.ceil(box.h), body: pen.body };
}

/** What holds cards, bends and words. */
function around(at: ReadonlyMap<string, Point>, lines: Line[]): { x: number; y: number; w: number; h: number } {
  const cards = extent(at.values(), []);
  let [x0, y0, x1, y1] = [cards.x, cards.y, cards.x + cards.w, cards.y + cards.h];
  const hold = (x: number, y: number, w: number, h: number) => {
    [x0, y0, x1, y1] = [Math.min(x0, x - w), Math.min(y0, y - h), Math.max(x1, x + w), Math.max(y1, y + h)];
  };
  for (const { d, words } of lines) {
    const numbers = (d.match(/-?\d+(?:\.\d+)?(?:e-?\d+)?/g) ?? []).map(Number); // a curve lies between its points
    for (let i = 0; i + 1 < numbers.length; i += 2) hold(numbers[i] as number, numbers[i + 1] as number, 8, 8);
    if (words) hold(...words.at, words.half + 4, 10);
  }
  return { x: x0, y: y0, w: x1 - x0, h: y1 - y0 };
}

function drawCard(pen: SvgPen, card: Card, [x, y]: Point, below: string, theme: Theme, family: string): void {
  const kind = card.group ? "group" : card.members[0]?.kind ?? "feature", corner = kind === "embedding" || kind === "logit" ? 2 : 8;
  const frame = (dx: number) => `<rect x="${fixed(x - WIDTH / 2 + dx)}" y="${fixed(y - HEIGHT / 2 + dx)}" width="${WIDTH}" height="${HEIGHT}" rx="${corner}" fill="${theme.panel}" stroke="${theme.muted}"${kind === "error" ? ' stroke-dasharray="4 3"' : ""}/>`;
  const label = visible(card.label) || "supernode", under = visible(below);
  pen.add(`<g class="card"><title>${escape(clip(label, 300))}</title>${card.group ? frame(3) : ""}${frame(0)}`);
  pen.textAlign = "center"; pen.textBaseline = "middle"; pen.fillStyle = theme.ink;
  let lines: string[] = [];
  for (const size of SIZES) {
    pen.font = `bold ${size}px ${family}`;
    lines = broken(pen, label);
    if (lines.join(" ").length >= label.length) break;
  }
  const top = y - (13 * lines.length) / 2;
  lines.forEach((text, i) => pen.fillText(text, x, top + 13 * i));
  pen.fillStyle = theme.muted; pen.font = `11px ${family}`;
  pen.fillText(cut(pen, under), x, top + 13 * lines.length + 0.5);
  pen.add("</g>");
}

/** On one line or two, at a space where there is one. */
function broken(pen: SvgPen, text: string): string[] {
  if (pen.measureText(text).width <= INSIDE) return [text];
  const first = cut(pen, text, ""), space = first.lastIndexOf(" "), end = space > 0 ? space : first.length;
  return [text.slice(0, end), cut(pen, text.slice(end).trimStart())];
}

function cut(pen: SvgPen, text: string, dots = "…"): string {
  if (pen.measureText(text).width <= INSIDE) return text;
  const letters = Array.from(text.slice(0, 300));
  while (letters.length > 1 && pen.measureText(letters.join("") + dots).width > INSIDE) letters.pop();
  return letters.join("") + dots;
}

/** Drawings under each other, each in the middle. */
export function stacked(drawings: Drawing[]): Drawing {
  const width = Math.max(...drawings.map((d) => d.width));
  let height = 0;
  const body = drawings.map((d) => {
    const at = `translate(${fixed((width - d.width) / 2)} ${fixed(height)})`;
    height += d.height + GAP;
    return `<g transform="${at}">${d.body}</g>`;
  });
  return { width, height: height - GAP, body: body.join("\n") };
}

export const asSvg = ({ width, height, body }: Drawing, title: string): string =>
  `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" role="img"><title>${escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>${body}</svg>\n`;

/** The same in pixels. */
export async function rasterised(svg: string, { width, height }: Drawing): Promise<Blob> {
  const image = new Image(), canvas = document.createElement("canvas"), scale = Math.min(SCALE, MOST_PIXELS / Math.max(width, height));
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  (canvas.getContext("2d") as CanvasRenderingContext2D).drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise<Blob | null>((done) => canvas.toBlob(done, "image/png"));
  if (!blob) throw new Error("too large");
  return blob;
}
