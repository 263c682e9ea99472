// Uploads of many files, a few at a time. A file that is no image or video is named, and the others go on.
import { ApiError } from '../api/errors'
import { upload, type Dropped, type Picture } from './pictures'

const CONCURRENCY = 4

export class Uploads {
  total = $state(0)
  done = $state(0)
  /** What is wrong with the files that were left out. */
  refused = $state<string[]>([])
  #controller = new AbortController()
  /** The files of the last run, and what was uploaded of them: another run of the same files does not send it again. */
  #files: Dropped[] = []
  #uploaded = new Map<File, Picture>()

  /** Ends all uploads with an `AbortError`. */
  cancel() {
    this.#controller.abort()
    this.#controller = new AbortController()
  }

  /** Returns the uploaded pictures in the order of the files. */
  async run(files: Dropped[]): Promise<Picture[]> {
    Object.assign(this, { total: files.length, done: 0, refused: [] })
    if (files !== this.#files) this.#uploaded.clear()
    this.#files = files
    const pictures: (Picture | null)[] = []
    const remaining = [...files.entries()].reverse()
    const { signal } = this.#controller
    const work = async () => {
      for (let next = remaining.pop(); next; next = remaining.pop())
        pictures[next[0]] = await this.#uploadOne(next[1], signal)
    }
    // one failure ends all uploads, so that none continues after the error is shown
    const stop = () => void (remaining.length = 0)
    const workers = Array.from({ length: CONCURRENCY }, () => work().finally(stop))
    await Promise.allSettled(workers)
    this.total = this.done // also after a failure, so that no progress is shown any more
    await Promise.all(workers)
    return pictures.filter((picture) => picture !== null)
  }

  async #uploadOne({ file, folder }: Dropped, signal: AbortSignal): Promise<Picture | null> {
    try {
      const picture = this.#uploaded.get(file) ?? (await upload(file, file.name, folder, signal))
      this.#uploaded.set(file, picture)
      return picture
    } catch (error) {
      if (!(error instanceof ApiError) || ![400, 413, 415, 422].includes(error.status)) throw error
      this.refused.push(error.message)
      return null
    } finally {
      this.done += 1
    }
  }
}
