// Answers: what the server sent, as the page shows it.
import type { Schemas } from '../api/client'

export type Option = { text: string; probability: number }
/** A generated token, and the most likely tokens in its place. */
export type Token = Option & { alternatives: Option[] }
/** What a request cost. A picture is null where the server does not say it. */
export type Cost = {
  computed: number | null
  reused: number | null
  promptTokens: number
  cachedTokens: number
  /** Milliseconds from the request to the first token, or to the answer if it is not streamed. */
  firstToken: number
}
export type Answer = {
  shots: number
  text: string
  probability: number
  /** Whether it reached the limit of its length before its end. */
  isCut: boolean
  tokens: Token[]
  /** The labels from the most to the least likely, where the task is to choose. */
  candidates: Option[]
  /** How the label was chosen. */
  method: string | null
  cost: Cost | null
}

export function emptyAnswer(shots: number): Answer {
  return { shots, text: '', probability: 1, isCut: false, tokens: [], candidates: [], method: null, cost: null }
}

/** Adds a chunk of a stream to an answer. */
export function addChunk(answer: Answer, chunk: Schemas['CompletionChunk'], firstToken: number): Answer {
  const [choice] = chunk.choices
  const text = answer.text + (choice?.text ?? '')
  const tokens = [...answer.tokens, ...(choice?.logprobs ? tokensOf(choice.logprobs) : [])]
  const cost = chunk.usage ? costOf(chunk.usage, firstToken) : answer.cost
  const isCut = answer.isCut || choice?.finish_reason === 'length'
  return { ...answer, text, tokens, cost, isCut, probability: probabilityOf(tokens, text) }
}

function tokensOf(logprobs: Schemas['CompletionLogprobs']): Token[] {
  return logprobs.tokens.map((text, index) => ({
    text,
    probability: Math.exp(logprobs.token_logprobs[index] ?? 0),
    alternatives: Object.entries(logprobs.top_logprobs[index] ?? {})
      .map(([text, logprob]) => ({ text, probability: Math.exp(logprob) }))
      .sort((a, b) => b.probability - a.probability),
  }))
}

/** Returns the probability of a text: the product over its tokens, without those that only end it. No text is its end. */
function probabilityOf(tokens: Token[], text: string): number {
  let length = 0
  let product = 1
  for (const [index, token] of tokens.entries()) {
    if (index && length >= text.length) break
    length += token.text.length
    product *= token.probability
  }
  return product
}

export function classified(shots: number, reply: Schemas['Classification'], milliseconds: number): Answer {
  const candidates = reply.candidates.map(({ label, probability }) => ({ text: label, probability }))
  return {
    ...emptyAnswer(shots),
    text: reply.label ?? '',
    probability: reply.confidence,
    candidates,
    method: reply.method,
    cost: costOf(reply.usage, milliseconds),
  }
}

function costOf(usage: Schemas['Usage'], firstToken: number): Cost {
  return {
    computed: usage.fewshot_details?.media_encoded ?? null,
    reused: usage.fewshot_details?.media_cached ?? null,
    promptTokens: usage.prompt_tokens,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
    firstToken,
  }
}
