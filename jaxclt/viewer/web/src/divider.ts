// The lines between panels: dragged, or moved with arrow keys; their place is in the address.

import type { App, Panels } from "./app";
import { $ } from "./dom";

const STEP = 2; // percent a key moves
const LEAST = { side: 280, lower: 140 }, REST = { side: 480, lower: 220 }; // px of the panel and of what is left

export class Divider {
  private readonly line: HTMLElement;
  private readonly upright: boolean;
  private held = false;

  constructor(private readonly app: App, private readonly panel: keyof Panels, private readonly whole: HTMLElement) {
    this.upright = panel === "side";
    const line = this.line = $(`divide-${panel}`);
    line.addEventListener("pointerdown", (e) => {
      this.held = true;
      line.setPointerCapture(e.pointerId);
      e.preventDefault();
      line.focus();
    });
    line.addEventListener("pointermove", (e) => { if (this.held) this.to(this.shareAt(e.clientX, e.clientY)); });
    for (const end of ["pointerup", "pointercancel"] as const) line.addEventListener(end, () => { this.held = false; });
    line.addEventListener("dblclick", () => this.to(null));
    line.addEventListener("keydown", (e) => {
      const grow = this.upright ? "ArrowLeft" : "ArrowUp", shrink = this.upright ? "ArrowRight" : "ArrowDown";
      const [least, most] = this.ends();
      if (e.key === grow) this.to(this.now() + STEP);
      else if (e.key === shrink) this.to(this.now() - STEP);
      else if (e.key === "Home") this.to(least);
      else if (e.key === "End") this.to(most);
      else if (e.key === "Enter") this.to(null);
      else return;
      e.preventDefault();
    });
    new ResizeObserver(() => this.show()).observe($(panel));
  }

  private size(): number { return this.upright ? this.whole.clientWidth : this.whole.clientHeight; }
  private now(): number {
    const box = $(this.panel).getBoundingClientRect();
    return (100 * (this.upright ? box.width : box.height)) / (this.size() || 1);
  }
  private ends(): [number, number] {
    const size = this.size() || 1, least = (100 * LEAST[this.panel]) / size;
    return [Math.min(least, 50), Math.max(50, 100 - (100 * REST[this.panel]) / size)];
  }
  private shareAt(x: number, y: number): number {
    const box = this.whole.getBoundingClientRect();
    return (100 * (this.upright ? box.right - x : box.bottom - y)) / (this.size() || 1);
  }

  private to(share: number | null): void {
    const [least, most] = this.ends();
    this.app.panels[this.panel] = share === null ? null : Math.round(10 * Math.min(most, Math.max(least, share))) / 10;
    this.app.changed("layout");
  }

  /** The panel as wide as the state says, within what the window allows. */
  apply(): void {
    const share = this.app.panels[this.panel], [least, most] = this.ends();
    const name = `--${this.panel}`, { style } = document.documentElement;
    if (share === null) style.removeProperty(name);
    else style.setProperty(name, `${Math.min(most, Math.max(least, share))}%`);
    this.show();
  }

  private show(): void {
    const [least, most] = this.ends().map(Math.round), now = Math.round(this.now());
    this.line.setAttribute("aria-valuemin", String(least));
    this.line.setAttribute("aria-valuemax", String(most));
    this.line.setAttribute("aria-valuenow", String(now));
    this.line.setAttribute("aria-valuetext", `${now} % of the page`);
  }
}
