// How much of the outputs' weight goes through each link.

import type { Model } from "./model";

/** A link matters as far as its target does: weight flows down from the outputs. Returns
 * what flows through each link, and what arrives at each node. */
export function flowDown(model: Model): { flow: Float32Array; arrives: Float64Array } {
  const { source, share } = model, flow = new Float32Array(source.length);
  const arrives = Float64Array.from(model.nodes, (n) => (n.kind === "logit" ? Math.max(n.prob, 1e-6) : 0));
  for (const n of model.nodes.slice().sort((a, b) => b.band - a.band)) {
    const mine = model.ins.unsorted(n.index), here = arrives[n.index] as number;
    for (let i = 0; i < mine.length; i++) {
      const e = mine[i] as number, s = source[e] as number;
      flow[e] = here * (share[e] as number);
      arrives[s] = (arrives[s] as number) + (flow[e] as number);
    }
  }
  return { flow, arrives };
}

/** The links of the largest flow, about so many, largest first. */
export function mostOf(flow: Float32Array, most: number): number[] {
  const least = most < flow.length ? nearKth(flow, most) : -1, chosen: number[] = [];
  for (let e = 0; e < flow.length; e++) if ((flow[e] as number) >= least) chosen.push(e);
  return chosen.sort((a, b) => (flow[b] as number) - (flow[a] as number));
}

/** A number that at least k of these, which are not negative, reach, and few more: by the
 * upper half of their bits, which are in the order of the numbers. */
function nearKth(values: Float32Array, k: number): number {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length), count = new Uint32Array(1 << 16);
  for (let i = 0; i < bits.length; i++) {
    const b = (bits[i] as number) >>> 16;
    count[b] = (count[b] as number) + 1;
  }
  let bucket = count.length, left = k;
  while (bucket > 0 && left > 0) left -= count[--bucket] as number;
  return new Float32Array(new Uint32Array([bucket << 16]).buffer)[0] as number;
}
