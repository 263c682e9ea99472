// A version of a support set as one file.
import { api } from '../../api/client'
import { send } from '../../api/request'
import type { SetInfo } from '../calls'

/** Saves a file on the computer of the person: a link to the server could not carry a key. */
export async function downloadArchive(name: string): Promise<void> {
  const response = await send(`/v1/support_sets/${encodeURIComponent(name)}/export`)
  const url = URL.createObjectURL(await response.blob())
  const link = Object.assign(document.createElement('a'), { href: url, download: `${name}.zip` })
  link.click()
  setTimeout(() => URL.revokeObjectURL(url), 60_000)
}

/** Creates a set from an archive, with the archive's name or another one, once for each idempotency key. */
export async function importArchive(file: File, key: string, name?: string): Promise<SetInfo> {
  const { data } = await api.POST('/v1/support_sets/import', {
    params: { query: { name }, header: { 'Idempotency-Key': key } },
    headers: { 'Content-Type': 'application/zip' },
    body: file as unknown as string,
    bodySerializer: (archive) => archive,
  })
  return data!
}
