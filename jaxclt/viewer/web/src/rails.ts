// Errors of a position as one thin line, thicker at layers where more is left unexplained,
// and a sink's column as one stub: each says its share and unfolds when pressed.

import { percent } from "./dom";
import { GUTTER, type Rail } from "./layout";
import type { Scene } from "./paint";
import type { Pen } from "./pen";

const HALF = 3, THICK = 0.04; // half of the thickest, which holds such a share

export function rails(pen: Pen, s: Scene, bottom: number): void {
  const { layout: l, camera: c, theme, model } = s;
  const yOf = (y: number) => y * c.v + c.y, ends = model.nodes.reduce((sum, n) => (n.kind === "error" || n.kind === "embedding" ? sum + n.own : sum), 0) || 1;
  const edge = (b: number) => { const band = l.bands[b] ?? { y: 0, h: 0 }; return yOf(band.y + band.h); };
  const high = edge(model.nLayers + 1), low = Math.min(bottom, edge(1));
  l.columns.forEach(({ x, w, stub, rail }) => {
    const left = x * c.k + c.x, wide = w * c.k;
    if (left + wide < 0 || left > s.width) return;
    if (stub) {
      pen.globalAlpha = 0.25; pen.fillStyle = theme.node;
      pen.fillRect(left + 3, high, wide - 6, low - high);
      pen.globalAlpha = 1;
      if (left + wide / 2 > GUTTER) upright(pen, s, left + wide / 2, (high + low) / 2, stubText(s, low - high));
    } else if (rail) thin(pen, s, rail, wide, { high, low }, THICK * ends);
  });
}

function thin(pen: Pen, s: Scene, rail: Rail, wide: number, ends: { high: number; low: number }, most: number): void {
  const { layout: l, camera: c, theme } = s, x = rail.x * c.k + c.x;
  pen.globalAlpha = l.turned ? 0.15 : 0.35; pen.fillStyle = theme.error;
  const ys = rail.errors.map((n) => (l.y[n.index] as number) * c.v + c.y);
  pen.fillRect(x - 0.5, ends.high, 1, ends.low - ends.high);
  pen.globalAlpha = 0.85;
  rail.errors.forEach((n, i) => {
    const half = HALF * Math.sqrt(Math.min(1, n.own / most)), height = Math.max(1, (l.bands[n.band]?.h ?? 0) * c.v - 1);
    pen.fillRect(x - half, (ys[i] as number) - height / 2, 2 * half, height);
  });
  pen.globalAlpha = 1;
  if (rail.share < 0.005 || wide < 40) return;
  const output = l.bands[s.model.nLayers + 1] ?? { y: 0, h: 0 };
  pen.font = theme.font.replace("12px", "10px"); pen.textAlign = "right"; pen.textBaseline = "middle"; pen.fillStyle = theme.error;
  pen.fillText(percent(rail.share), x + 12, (output.y + output.h / 2) * c.v + c.y);
}

function stubText(s: Scene, room: number): string {
  const { share } = s.model.story.sink, said = share === null ? "" : ` ${percent(share)}`;
  return room < 120 ? `sink${said}` : `attention sink${said}`;
}

/** Text that is read from below to above. */
export function upright(pen: Pen, s: Scene, x: number, y: number, text: string, align: CanvasTextAlign = "center"): void {
  pen.save();
  pen.translate(x, y);
  pen.rotate(-Math.PI / 2);
  pen.font = s.theme.font.replace("12px", "11px"); pen.textAlign = align; pen.textBaseline = "middle";
  pen.fillStyle = s.theme.ink;
  pen.fillText(text, 0, 0);
  pen.restore();
}
