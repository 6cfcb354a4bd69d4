// Which links a node has.

/** Links by one of their ends, in one array, but for some. */
export class Adjacency {
  private readonly start: Int32Array;
  private readonly list: Int32Array;
  private readonly ordered: Uint8Array;

  constructor(end: Int32Array, nNodes: number, private readonly share: Float32Array, without: Set<number>) {
    this.start = new Int32Array(nNodes + 1);
    for (let e = 0; e < end.length; e++) {
      if (without.has(e)) continue;
      const i = (end[e] as number) + 1;
      this.start[i] = (this.start[i] as number) + 1;
    }
    for (let i = 0; i < nNodes; i++) this.start[i + 1] = (this.start[i + 1] as number) + (this.start[i] as number);
    const next = this.start.slice();
    this.list = new Int32Array(end.length - without.size);
    for (let e = 0; e < end.length; e++) {
      if (without.has(e)) continue;
      const i = end[e] as number, at = next[i] as number;
      this.list[at] = e;
      next[i] = at + 1;
    }
    this.ordered = new Uint8Array(nNodes);
  }

  unsorted(i: number): Int32Array { return this.list.subarray(this.start[i], this.start[i + 1]); }

  sorted(i: number): Int32Array {
    const mine = this.unsorted(i);
    if (!this.ordered[i]) {
      mine.sort((a, b) => (this.share[b] as number) - (this.share[a] as number));
      this.ordered[i] = 1;
    }
    return mine;
  }
}
