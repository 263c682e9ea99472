// What a line chart shows.

export type Point = { x: number; y: number; low?: number; high?: number }

/** Points that are joined. `colour` is a number of `--series-N`. */
export type Series = { name: string; colour: number; points: Point[]; dash?: string }

/** A horizontal line that the series are compared with. */
export type Reference = { name: string; y: number }
