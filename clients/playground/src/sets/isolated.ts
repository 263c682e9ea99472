// Labels within a sentence.

/** Returns a label whose writing direction does not reorder the text around it, by Unicode's isolates. */
export const isolated = (label: string) => `\u2068${label}\u2069`
