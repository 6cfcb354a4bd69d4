// What the picture is drawn with: a canvas, or this pen that writes the same as SVG.

export type Pen = Pick<CanvasRenderingContext2D,
  "beginPath" | "moveTo" | "lineTo" | "bezierCurveTo" | "arc" | "rect" | "closePath" | "stroke" | "fill"
  | "fillRect" | "fillText" | "setLineDash" | "save" | "restore" | "translate" | "rotate" | "clip" | "measureText"
  | "strokeStyle" | "fillStyle" | "lineWidth" | "globalAlpha" | "font" | "textAlign" | "textBaseline">;

export const fixed = (x: number): string => String(Math.round(x * 100) / 100);
export const escape = (text: string): string =>
  // eslint-disable-next-line no-control-regex -- XML has no word for the other control characters
  text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|\p{Surrogate}/gu, "�")
    .replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c] ?? c);

export class SvgPen implements Pen {
  strokeStyle: string | CanvasGradient | CanvasPattern = "#000";
  fillStyle: string | CanvasGradient | CanvasPattern = "#000";
  lineWidth = 1;
  globalAlpha = 1;
  font = "12px sans-serif";
  textAlign: CanvasTextAlign = "left";
  textBaseline: CanvasTextBaseline = "alphabetic";
  private parts: string[] = [];
  private path = "";
  private dash: number[] = [];
  private open = 0; // groups since the last save
  private saved: number[] = [];
  private clips = 0;

  private readonly ruler = document.createElement("canvas").getContext("2d") as CanvasRenderingContext2D;


  beginPath(): void { this.path = ""; }
  moveTo(x: number, y: number): void { this.path += `M${fixed(x)} ${fixed(y)}`; }
  lineTo(x: number, y: number): void { this.path += `L${fixed(x)} ${fixed(y)}`; }
  bezierCurveTo(a: number, b: number, c: number, d: number, x: number, y: number): void {
    this.path += `C${[a, b, c, d, x, y].map(fixed).join(" ")}`;
  }
  arc(x: number, y: number, r: number): void {
    this.path += `M${fixed(x - r)} ${fixed(y)}a${fixed(r)} ${fixed(r)} 0 1 0 ${fixed(2 * r)} 0a${fixed(r)} ${fixed(r)} 0 1 0 ${fixed(-2 * r)} 0Z`;
  }
  rect(x: number, y: number, w: number, h: number): void {
    this.path += `M${fixed(x)} ${fixed(y)}h${fixed(w)}v${fixed(h)}h${fixed(-w)}Z`;
  }
  closePath(): void { this.path += "Z"; }
  setLineDash(dash: number[]): void { this.dash = dash; }
  private alpha(): string { return this.globalAlpha < 1 ? ` opacity="${fixed(this.globalAlpha)}"` : ""; }
  stroke(): void {
    const dash = this.dash.length ? ` stroke-dasharray="${this.dash.join(" ")}"` : "";
    this.parts.push(`<path d="${this.path}" fill="none" stroke="${String(this.strokeStyle)}" stroke-width="${fixed(this.lineWidth)}"${dash}${this.alpha()}/>`);
  }
  fill(): void { this.parts.push(`<path d="${this.path}" fill="${String(this.fillStyle)}"${this.alpha()}/>`); }
  fillRect(x: number, y: number, w: number, h: number): void {
    this.parts.push(`<rect x="${fixed(x)}" y="${fixed(y)}" width="${fixed(w)}" height="${fixed(h)}" fill="${String(this.fillStyle)}"${this.alpha()}/>`);
  }
  fillText(text: string, x: number, y: number): void {
    const size = /(\d+)px/.exec(this.font)?.[1] ?? "12", bold = this.font.startsWith("bold") ? ' font-weight="bold"' : "";
    const anchor = { left: "start", start: "start", right: "end", end: "end", center: "middle" }[this.textAlign];
    const shift = this.textBaseline === "middle" ? Number(size) * 0.35 : 0;
    this.parts.push(`<text x="${fixed(x)}" y="${fixed(y + shift)}" font-size="${size}" text-anchor="${anchor}" fill="${String(this.fillStyle)}"${bold}${this.alpha()} xml:space="preserve">${escape(text)}</text>`);
  }
  measureText(text: string): TextMetrics { this.ruler.font = this.font; return this.ruler.measureText(text); }
  private group(attributes: string): void { this.parts.push(`<g ${attributes}>`); this.open += 1; }
  save(): void { this.saved.push(this.open); this.open = 0; }
  restore(): void { this.parts.push("</g>".repeat(this.open)); this.open = this.saved.pop() ?? 0; }
  translate(x: number, y: number): void { this.group(`transform="translate(${fixed(x)} ${fixed(y)})"`); }
  rotate(angle: number): void { this.group(`transform="rotate(${fixed((angle * 180) / Math.PI)})"`); }
  clip(): void {
    const id = `clip${++this.clips}`;
    this.parts.push(`<clipPath id="${id}"><path d="${this.path}"/></clipPath>`);
    this.group(`clip-path="url(#${id})"`);
  }

  /** What no canvas has a word for. */
  add(markup: string): void { this.parts.push(markup); }
  get body(): string { return this.parts.join("\n"); }
}
