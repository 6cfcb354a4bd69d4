// What attention.json says: heads, the cells that were taken apart, whole patterns.

import { type Json, asObject, asText } from "./document";
import { isNumber } from "./dom";
import type { Head } from "./model";

export const SIDES = ["query", "key"] as const;
export type Side = (typeof SIDES)[number];

/** A node by its id, and its name where the graph does not show it. */
export interface Named { id: string; name: string }
export interface Piece { node: Named; score: number }
/** Part of the score, and against the keys attended to on average: why it attends here. */
export interface Pair { query: Named; key: Named; whole: number; score: number }

/** Where a head attends, with its score taken apart. */
export interface Cell {
  head: Head;
  cell: [query: number, key: number];
  weight: number;
  score: number | null;
  effect: number;
  patternEffect: number | null;
  row: number[]; // of the pattern
  text: string;
  sides: Record<Side, Piece[]>;
  pairs: Pair[];
  error: number | null; // of the pairs' sum, relative
}

export interface Part { cell: Cell; side: Side; score: number }

const number = (x: unknown): number | null => (isNumber(x) ? x : null);
const list = (x: unknown): unknown[] => (Array.isArray(x) ? x : []);
const numbers = (x: unknown): number[] => list(x).map((value) => number(value) ?? 0);
const same = (a: readonly number[], b: readonly number[]): boolean => a.every((x, i) => x === b[i]);
export const headName = ([layer, head]: Head): string => `L${layer}H${head}`;

export class Attention {
  readonly contrast: string; // what effects are on
  readonly heads: { head: Head; effect: number }[]; // strongest first
  readonly cells: Cell[];
  private readonly patterns: Record<string, unknown>;

  constructor(raw: Json) {
    this.contrast = asText(raw.contrast);
    this.heads = list(raw.heads).map(asObject).map((h) => ({ head: readHead(h), effect: number(h.effect) ?? 0 }))
      .sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
    this.cells = list(raw.cells).map(asObject).map(readCell);
    this.patterns = asObject(raw.patterns);
  }

  /** The whole pattern of a head: of each token what it gives to the tokens up to it. */
  pattern(head: Head): number[][] | null {
    const rows = list(this.patterns[head.join(".")]);
    return rows.length ? rows.map(numbers) : null;
  }

  ofHead(head: Head): Cell[] { return this.cells.filter((c) => same(c.head, head)); }

  find(head: Head, cell: [number, number]): Cell | null {
    return this.ofHead(head).find((c) => same(c.cell, cell)) ?? null;
  }

  /** Scores that a node takes part in, on either side. */
  withNode(id: string): Part[] {
    return this.cells.flatMap((cell) => SIDES.flatMap((side) =>
      cell.sides[side].filter((piece) => piece.node.id === id).map(({ score }) => ({ cell, side, score }))));
  }
}

const readHead = (raw: Json): Head => [number(raw.layer) ?? 0, number(raw.head) ?? 0];

function readCell(raw: Json): Cell {
  const pieces = (x: unknown): Piece[] => list(x).map(list).map(([id, name, score]) => ({ node: named(id, name), score: number(score) ?? 0 }));
  return {
    head: readHead(raw),
    cell: [number(raw.query) ?? 0, number(raw.key) ?? 0],
    weight: number(raw.weight) ?? 0,
    score: number(raw.score),
    effect: number(raw.effect) ?? 0,
    patternEffect: number(raw.pattern_effect),
    row: numbers(raw.pattern),
    text: asText(raw.text),
    sides: { query: pieces(raw.query_nodes), key: pieces(raw.key_nodes) },
    pairs: list(raw.pairs).map(list).map(([query, key, queryName, keyName, score, competition]) =>
      ({ query: named(query, queryName), key: named(key, keyName), whole: number(score) ?? 0, score: number(competition) ?? number(score) ?? 0 })),
    error: number(raw.relative_error),
  };
}

const named = (id: unknown, name: unknown): Named => ({ id: asText(id), name: asText(name) || asText(id) });
