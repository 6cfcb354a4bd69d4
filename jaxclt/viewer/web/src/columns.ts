// Links as columns of numbers.

import type { Json } from "./document";

/** What links carry in numbers: their weight, and where the graph has it their response
 * and the parts of it that are not the weight (0 where a link does not name one). */
export const NUMBERS = ["weight", "response", "qk_query", "qk_key", "norm", "gate"] as const;
export type NumberName = (typeof NUMBERS)[number];
type Numbers = Float32Array | Float64Array | number[];
type NumberColumns = Partial<Record<NumberName, Numbers>> & { weight: Numbers };

/** Links as columns; what few links carry beside lies in `extra`. */
export interface Columns {
  source: Uint16Array | Uint32Array | number[];
  target: Uint16Array | Uint32Array | number[];
  numbers: NumberColumns;
  extra: [number, Json][];
}

/** The same as `page()` embeds them: node numbers of `width` bytes, in base64. */
export interface PackedColumns {
  width: 2 | 4;
  source: string;
  target: string;
  numbers: Record<string, { single: boolean; bytes: string }>; // single: float32, each its shortest decimal
  extra: [number, Json][];
}

/** What `page()` packed. */
export function unpack(packed: PackedColumns): Columns {
  const ends = (text: string) => (packed.width === 2 ? new Uint16Array(bytes(text)) : new Uint32Array(bytes(text)));
  const numbers = Object.entries(packed.numbers).map(([name, column]) => {
    const raw = bytes(column.bytes);
    return [name, column.single ? new Float32Array(raw) : new Float64Array(raw)];
  });
  return { source: ends(packed.source), target: ends(packed.target), numbers: Object.fromEntries(numbers) as NumberColumns, extra: packed.extra };
}

function bytes(text: string): ArrayBuffer {
  const { fromBase64 } = Uint8Array as unknown as { fromBase64?: (text: string) => Uint8Array<ArrayBuffer> };
  if (fromBase64) return fromBase64.call(Uint8Array, text).buffer;
  const raw = atob(text), read = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) read[i] = raw.charCodeAt(i);
  return read.buffer;
}

/** What a link of a file carries in numbers; parts that are 0 are not named. */
export function numbersOf(links: Columns, e: number): Partial<Record<NumberName, number>> {
  const said: Partial<Record<NumberName, number>> = {};
  for (const name of NUMBERS) {
    const column = links.numbers[name], x = column?.[e];
    if (x === undefined || (x === 0 && name !== "weight" && name !== "response")) continue;
    said[name] = column instanceof Float32Array ? shortest(x) : x;
  }
  return said;
}

/** The decimal that a float32 stands for in a file. */
function shortest(x: number): number {
  for (let digits = 1; digits < 9; digits++) {
    const said = Number(x.toPrecision(digits));
    if (Math.fround(said) === x) return said;
  }
  return Number(x.toPrecision(9));
}
