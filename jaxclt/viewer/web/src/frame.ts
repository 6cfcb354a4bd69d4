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
  const most = (pick: (t: { effect: number | null; share: number | null }) => number | null) =>
    s.model.story.tokens.reduce((m, t) => Math.max(m, Math.abs(pick(t) ?? 0)), 0) || 1;
  const scale = { effect: most((t) => t.effect), share: most((t) => t.share) };
  layout.columns.forEach((column, t) => {
    const left = column.x * s.camera.k + s.camera.x, wide = column.w * s.camera.k;
    if (left + wide < GUTTER || left > s.width) return;
    token(pen, s, t, left, wide);
    if (layout.bars) bar(pen, s, t, left, wide, scale);
  });
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

/** What the lead changes by without this token, and the graph's share of it as a line. */
function bar(pen: Pen, s: Scene, t: number, left: number, wide: number, scale: { effect: number; share: number }): void {
  const { theme, layout } = s, said = s.model.story.tokens.find((x) => x.position === t);
  if (!said) return;
  const room = layout.bars - 13, base = s.height - 1, w = Math.min(wide - 3, 40), x = left + (wide - w) / 2;
  const h = (Math.abs(said.effect ?? 0) / scale.effect) * room;
  if (said.effect !== null) {
    pen.fillStyle = said.effect <= 0 ? theme.pos : theme.neg;
    if (said.effect <= 0) pen.fillRect(x, base - h, w, h);
    else for (let i = 0; i < w; i += 4) pen.fillRect(x + i, base - h, Math.min(2.5, w - i), h); // as dashes: without it the lead grows
    pen.font = theme.font.replace("12px", "10px"); pen.textAlign = "center"; pen.textBaseline = "middle";
    const text = short(Number(said.effect.toFixed(1)));
    pen.fillStyle = theme.ink;
    if (pen.measureText(text).width < wide - 1) pen.fillText(text, left + wide / 2, base - Math.max(h, mark(said.share, scale, room)) - 6);
  }
  if (said.share === null) return;
  pen.fillStyle = theme.ink;
  pen.fillRect(x - 1, base - mark(said.share, scale, room) - 0.75, w + 2, 1.5);
}

const mark = (share: number | null, scale: { share: number }, room: number): number => (Math.abs(share ?? 0) / scale.share) * room;

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
