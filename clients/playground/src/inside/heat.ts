// The colours of heat over a picture. They are the same in dark and light, because the picture is.

const STOPS: [number, number[]][] = [
  [0, [24, 16, 51, 0.74]],
  [0.33, [120, 28, 109, 0.66]],
  [0.66, [237, 105, 37, 0.6]],
  [1, [252, 225, 110, 0.56]],
]

/** Returns red, green, blue and opacity of a value from 0 to 1. */
export function heatColour(value: number): number[] {
  const at = Math.min(Math.max(value, 0), 1)
  const upper = Math.max(
    1,
    STOPS.findIndex(([stop]) => stop >= at),
  )
  const [from, start] = STOPS[upper - 1]!
  const [to, end] = STOPS[upper]!
  const mix = (at - from) / (to - from)
  return start.map((channel, index) => channel + (end[index]! - channel) * mix)
}

/** Draws shares by row and column, one pixel each: the page scales them up smoothly. */
export function drawHeat(canvas: HTMLCanvasElement, grid: number[][], [least, most]: [number, number]) {
  const [height, width] = [grid.length, grid[0]?.length ?? 0]
  Object.assign(canvas, { width, height })
  const pixels = new ImageData(width, height)
  grid.flat().forEach((share, index) => {
    const [red, green, blue, opacity] = heatColour(most > least ? (share - least) / (most - least) : 0)
    pixels.data.set([red!, green!, blue!, opacity! * 255], index * 4)
  })
  canvas.getContext('2d')!.putImageData(pixels, 0, 0)
}
