// What stays where it is while the picture is scrolled: layers, tokens, what each contributes.

import { short, spaced } from "./dom";
import { GUTTER, type Layout } from "./layout";
import type { Scene } from "./paint";
import type { Pen } from "./pen";
import { upright } from "./rails";

/** Layer names on the left and tokens below, over whatever is scrolled under them. */
export function frame(pen: Pen, s: Scene): void {
  const { layout, theme } = s, bottom = s.height - layout.foot;
  pen.fillStyle = theme.panel;
  pen.fillRect(0, 0, GUTTER - 6, bottom);
  pen.fillRect(0, bottom, s.width, layout.foot);
  pen.strokeStyle = theme.line; pen.lineWidth = 1;
  pen.beginPath(); pen.moveTo(0, bottom + 0.5); pen.lineTo(s.width, bottom + 0.5); pen.stroke();
  layers(pen, s, bottom);
  pen.save();
  pen.beginPath(); pen.rect(GUTTER - 6, bottom, s.width, layout.foot); pen.clip();
  const across = (column: Layout["columns"][number]) => ({ left: column.x * s.camera.k + s.camera.x, wide: column.w * s.camera.k });
  layout.columns.forEach((column, t) => {
    const { left, wide } = across(column);
    if (left + wide >= GUTTER && left <= s.width) token(pen, s, t, left, wide);
  });
  if (layout.bars) effects(pen, s, across);
  pen.restore();
}

function layers(pen: Pen, s: Scene, bottom: number): void {
  const { model, theme, layout, camera } = s, last = model.nLayers + 1;
  pen.font = theme.font.replace("12px", "11px"); pen.textAlign = "right"; pen.textBaseline = "middle"; pen.fillStyle = theme.muted;
  if (layout.bars) pen.fillText("effect", GUTTER - 12, s.height - layout.bars / 2);
  const written: number[] = [], order = [0, last, ...Array.from({ length: Math.max(0, last - 1) }, (_, b) => b + 1)];
  for (const b of order) {
    const band = layout.bands[b] ?? { y: 0, h: 0 }, y = (band.y + band.h / 2) * camera.v + camera.y;
    if (y < 6 || y > bottom - 6 || written.some((other) => Math.abs(other - y) < 13)) continue;
    written.push(y);
    pen.fillText(b === 0 ? "tokens" : b === last ? "output" : `L${b - 1}`, GUTTER - 12, y);
  }
}

function token(pen: Pen, s: Scene, t: number, left: number, wide: number): void {
  const { layout, theme, model } = s, bottom = s.height - layout.foot, room = layout.foot - layout.bars, on = s.selected?.pos === t;
  const middle = left + wide / 2, said = spaced(model.tokens[t] ?? "");
  pen.font = (on ? "bold " : "") + theme.font;
  pen.fillStyle = on ? theme.ink : theme.muted;
  if (layout.turned && wide < pen.measureText(said).width + 8) {
    pen.font = theme.font.replace("12px", "11px");
    if (wide >= 11) upright(pen, s, middle, bottom + 3, fit(pen, said, room - 6), "right");
    return;
  }
  if (wide < 10) return;
  const text = fit(pen, said, wide - 6), half = pen.measureText(text).width / 2;
  if (middle - half < GUTTER - 6 || middle + half > s.width) return; // half a word would be read as another
  pen.textAlign = "center"; pen.textBaseline = "middle";
  pen.fillText(text, middle, bottom + Math.min(room, 24) / 2 + 1);
}

/** Bars of what the lead changes by without each token, and lines of the graph's shares;
 * the largest changes say their number, as far as these do not touch. */
function effects(pen: Pen, s: Scene, across: (column: Layout["columns"][number]) => { left: number; wide: number }): void {
  const { theme, layout } = s, { tokens } = s.model.story, room = layout.bars - 13, base = s.height - 1;
  const most = { effect: Math.max(...tokens.map((t) => Math.abs(t.effect ?? 0))) || 1, share: Math.max(...tokens.map((t) => t.share ?? 0)) || 1 };
  const numbers: { size: number; x: number; y: number; text: string }[] = [];
  for (const { position, effect, share } of tokens) {
    const { left, wide } = across(layout.columns[position] as Layout["columns"][number]), w = Math.min(wide - 2, 40), x = left + (wide - w) / 2;
    if (left < GUTTER - 6 || left > s.width) continue;
    const h = (Math.abs(effect ?? 0) / most.effect) * room, line = (Math.max(share ?? 0, 0) / most.share) * room;
    pen.fillStyle = (effect ?? 0) <= 0 ? theme.pos : theme.neg;
    if ((effect ?? 0) <= 0) pen.fillRect(x, base - h, w, h);
    else for (let i = 0; i < w; i += 4) pen.fillRect(x + i, base - h, Math.min(2.5, w - i), h); // striped: without it the lead grows
    pen.fillStyle = theme.ink;
    if (share !== null) pen.fillRect(x - 0.5, base - line - 0.75, w + 1, 1.5);
    if (effect !== null) numbers.push({ size: Math.abs(effect), x: left + wide / 2, y: base - Math.max(h, line) - 6, text: short(Number(effect.toFixed(1))) });
  }
  pen.font = theme.font.replace("12px", "10px"); pen.textAlign = "center"; pen.textBaseline = "middle";
  const written: { x: number; half: number }[] = [];
  for (const { x, y, text } of numbers.sort((a, b) => b.size - a.size)) {
    const half = pen.measureText(text).width / 2;
    if (x - half < GUTTER - 6 || x + half > s.width || written.some((other) => Math.abs(other.x - x) < other.half + half + 4)) continue;
    written.push({ x, half });
    pen.fillText(text, x, y);
  }
}

function fit(pen: Pen, text: string, width: number): string {
  let letters = Array.from(text.slice(0, 200));
  if (pen.measureText(text.slice(0, 200)).width <= width && text.length <= 200) return text;
  while (letters.length > 1 && pen.measureText(letters.join("") + "…").width > width) {
    letters = letters.slice(0, Math.max(1, Math.floor(letters.length * 0.8)));
  }
  return letters.length > 2 ? letters.join("") + "…" : "";
}

/** Which column a point of the picture is in. */
export const columnAt = (l: Layout, x: number): number => l.columns.findIndex((c) => x >= c.x && x < c.x + c.w);
