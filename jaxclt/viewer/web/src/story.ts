// What a document says of the prompt in words and numbers: the story, what each token
// contributes, the sink. All of it may be missing.

import { type Json, asObject, asText } from "./document";
import { isNumber } from "./dom";

/** Predicted and measured: what the lead of the answer changes by when it is ablated. */
export interface StoryGroup { name: string; members: string[]; predicted: number | null; measured: number | null; share: number | null }
/** What that changes by when a token's embedding is the mean one; the graph's share. */
export interface TokenEffect { position: number; effect: number | null; share: number | null }

export interface Story {
  text: string[];
  trust: string;
  groups: StoryGroup[];
  tokens: TokenEffect[];
  sink: { positions: Set<number>; share: number | null; rule: string };
}

const number = (x: unknown): number | null => (isNumber(x) ? x : null);
const list = (x: unknown): unknown[] => (Array.isArray(x) ? x : []);

export function readStory(jaxclt: Json, nTokens: number): Story {
  const story = asObject(jaxclt.story), sink = asObject(jaxclt.sink);
  const isPlace = (x: unknown): x is number => Number.isInteger(x) && (x as number) >= 0 && (x as number) < nTokens;
  return {
    text: (typeof story.text === "string" ? [story.text] : list(story.text)).map(asText).filter(Boolean),
    trust: asText(story.trust),
    groups: list(story.groups).map(asObject).map((g) => ({
      name: asText(g.name), members: list(g.members).map(asText), predicted: number(g.predicted), measured: number(g.measured), share: number(g.share),
    })),
    tokens: list(jaxclt.tokens).map(asObject).flatMap(({ position, effect, share }) =>
      (isPlace(position) ? [{ position, effect: number(effect), share: number(share) }] : [])),
    sink: { positions: new Set(list(sink.positions).filter(isPlace)), share: number(sink.share), rule: asText(sink.rule) },
  };
}

/** What the story says of a group that has exactly the members it was told of, as far as
 * the document has these. */
export function storyOf(story: Story, ids: string[], known: (id: string) => boolean): StoryGroup | null {
  const own = new Set(ids);
  return story.groups.find((g) => {
    const members = g.members.filter(known);
    return members.length > 0 && members.length === own.size && members.every((id) => own.has(id));
  }) ?? null;
}
