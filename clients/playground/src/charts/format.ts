// Numbers as people read them.

const TOLERANCE = 1e-9 // of sums of floating-point numbers

/** A share in percents. It is 0% or 100% only if it is exactly none or all; a share near them has one decimal. */
export function percent(share: number, digits = 0): string {
  const text = (100 * share).toFixed(digits)
  const isSome = share > TOLERANCE && share < 1 - TOLERANCE
  if (!isSome || (Number(text) > 0 && Number(text) < 100)) return `${text}%`
  if (!digits) return percent(share, 1)
  return share < 0.5 ? '< 0.1%' : '> 99.9%'
}

/** A place along an axis of a drawing, as SVG reads it. */
export const place = (share: number) => `${(100 * share).toFixed(2)}%`

/** A probability in whole percents. It is none of 0% and 100%, which would be certain. */
export function probable(probability: number): string {
  if (probability < 0.01) return '< 1%'
  return probability > 0.99 ? '> 99%' : percent(probability)
}

export const whole = (value: number) => Math.round(value).toLocaleString('en')

/** A number with about three digits that count: 0, 0.042, 1.25, 48.3, 1,300. */
export function short(value: number): string {
  if (Math.abs(value) < 0.0005 || Math.abs(value) >= 100) return whole(value)
  return value.toLocaleString('en', { maximumSignificantDigits: 3 })
}

export function seconds(value: number): string {
  return value < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`
}

/** A long time as people say it: in seconds, minutes or hours. */
export function duration(value: number): string {
  if (value < 90) return `${whole(Math.max(value, 1))} s`
  return value < 90 * 60 ? `${whole(value / 60)} min` : `${(value / 3600).toFixed(1)} h`
}

export function bytes(value: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB']
  const unit = value < 1 ? 0 : Math.min(Math.floor(Math.log2(value) / 10), units.length - 1)
  return `${short(value / 1024 ** unit)} ${units[unit]}`
}

/** A time in Unix seconds. */
export function date(time: number): string {
  return new Date(1000 * time).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' })
}
