// The findings of the diagnostics as lists of examples, each with the changes that would mend it.
import type { Schemas } from '../../api/client'
import { percent } from '../../charts/format'
import { isolated } from '../isolated'

type Diagnostics = Schemas['Diagnostics']

/** A change of one example: another label, or its removal. */
export type Fix = { name: string; id: string; label?: string }
export type Finding = { key: string; ids: string[]; text: string; fixes: Fix[] }
export type Group = { title: string; explanation: string; count: number; findings: Finding[]; removable?: string[] }

const removal = (id: string, name = 'Remove'): Fix => ({ name, id })
const relabelling = (id: string, label: string): Fix => ({ name: `Relabel as ${isolated(label)}`, id, label })

function mislabelled({ mislabelled: { count, data } }: Diagnostics): Group {
  return {
    title: 'Perhaps mislabelled',
    explanation: 'Another label fits these examples with confidence. A rare kind of a label looks like this too.',
    count,
    findings: data.map(({ id, label, looks_like, score }) => ({
      key: id,
      ids: [id],
      text: `${isolated(label)}, looks like ${isolated(looks_like)} (more probable by ${percent(score)})`,
      fixes: [relabelling(id, looks_like), removal(id)],
    })),
  }
}

function harmful({ harmful: { count, data } }: Diagnostics): Group {
  return {
    title: 'Harmful',
    explanation: 'These examples make more answers wrong than right when their neighbours are asked.',
    count,
    findings: data.map(({ id, label, value }) => ({
      key: id,
      ids: [id],
      text: `${isolated(label)}, part in the right answers ${value.toFixed(2)}`,
      fixes: [removal(id)],
    })),
  }
}

function redundant({ redundant: { count, data } }: Diagnostics): Group {
  return {
    title: 'Redundant',
    explanation: 'Near duplicates of an earlier example with the same label. All of them can go.',
    count,
    removable: data.map(({ id }) => id),
    findings: data.map(({ id, label, duplicate_of, similarity, same_media }) => ({
      key: id,
      ids: [id, duplicate_of],
      text: `${isolated(label)}, ${same_media ? 'the same file as the second' : `very similar to the second (${similarity.toFixed(3)})`}`,
      fixes: [removal(id)],
    })),
  }
}

function conflicting({ conflicting: { count, data } }: Diagnostics): Group {
  return {
    title: 'Contradictions',
    explanation: 'Near duplicates that have different labels. One of the two is wrong.',
    count,
    findings: data.map(({ ids, labels, similarity, same_media }) => ({
      key: ids.join(' '),
      ids,
      text: `${labels.map(isolated).join(' and ')}, ${same_media ? 'the same file' : `similarity ${similarity.toFixed(3)}`}`,
      fixes: [
        { ...relabelling(ids[0]!, labels[1]!), name: `Both are ${isolated(labels[1]!)}` },
        { ...relabelling(ids[1]!, labels[0]!), name: `Both are ${isolated(labels[0]!)}` },
        removal(ids[0]!, `Remove the ${isolated(labels[0]!)}`),
        removal(ids[1]!, `Remove the ${isolated(labels[1]!)}`),
      ],
    })),
  }
}

/** Returns the groups that have findings. */
export function groupsOf(diagnostics: Diagnostics): Group[] {
  return [mislabelled, harmful, conflicting, redundant].map((group) => group(diagnostics)).filter(({ count }) => count)
}
