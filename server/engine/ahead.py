"""The rows of the next step, if they are known while the current one runs, whatever tokens it samples.

A GPU is idle while it waits for its host between steps. So the next step is launched ahead if it depends on the results
of the current one only by tokens, which are on the device. If an answer has ended, its row in the next step is discarded.
"""

from __future__ import annotations

from server.engine.plan import Plan, Row


def rows_after(before: Plan, num_running: int, *, may_propose: bool) -> list[Row]:
    """Return the rows of the step after one that runs: those of sequences that do not end with it.

    None are returned unless the step has rows of all running sequences, of one priority. Where tokens `may_propose` to
    follow those of greedy sequences, these have none.
    """
    rows = {number: row for number, row in enumerate(before.rows) if not row.sequence.is_finished}
    if len(rows) != num_running or not all(_can_be_followed(row, may_propose) for row in rows.values()):
        return []
    if len({row.sequence.account.priority for row in rows.values()}) > 1:
        return []
    return [
        Row(row.sequence, row.end, 1, samples=True, follows=number)
        for number, row in rows.items()
        if row.sequence.num_output_tokens + 1 < row.sequence.sampling.max_tokens
    ]


def _can_be_followed(row: Row, may_propose: bool) -> bool:
    """Return whether the row samples a token that the host need not know before the next one is chosen."""
    sequence = row.sequence
    return row.samples and not (row.proposed or sequence.needs_last_token or (may_propose and sequence.is_greedy))
