"""Fair shares of the engine: which requests a step serves first, and how much work fits into it.

Work is counted in tokens. A request's *need* is the work that it has received plus the work that it is known to require.
Small needs come first, and a request ages while others are served, so that none waits for ever. If a client has received
more than another, the difference is added to the need of each of its requests (a virtual token counter, after Sheng et al.
2024, "Fairness in Serving Large Language Models").
"""

from __future__ import annotations

from dataclasses import dataclass

# the number of context tokens whose keys and values are read at about the cost of computing one token
CONTEXT_PER_TOKEN = 256
# the number of a piece's tokens that together read their context at about the cost of one token
TOKENS_PER_READ = 16
TOKENS_PER_FRAME = 32
# lengths of pieces that end before a prompt's end are multiples of the first of these that is at most half as long
PIECE_MULTIPLES = (64, 32, 16)
# the total work after which a request that waits is ahead of later ones by one more token
WORK_PER_TOKEN_OF_AGE = 256
# The share of steps in which the oldest requests of a client come first, whatever their needs: otherwise, smaller ones that
# never cease would delay a request very long. The steps are drawn, so that no rhythm of other requests avoids them.
BY_AGE_SHARE = 1 / 4


def work_of(count: int, context: int, num_logits: int = 1) -> float:
    """Return the work of computing `count` tokens after `context` others and reading `num_logits` of their logits."""
    return num_logits + count + context * (count + TOKENS_PER_READ - 1) / (TOKENS_PER_READ * CONTEXT_PER_TOKEN)


def count_within(work: float, context: int, *, reads_all_logits: bool) -> int:
    """Return how many tokens can be computed within this work."""
    num_logits = 0 if reads_all_logits else 1
    fixed = work_of(0, context, num_logits)
    per_token = work_of(1, context, num_logits) - fixed + reads_all_logits
    return max(int((work - fixed) / per_token), 0)


def rounded_piece(count: int) -> int:
    """Round down to one of the few lengths of pieces, for each of which a CPU compiles its products once."""
    return count - count % next((multiple for multiple in PIECE_MULTIPLES if count >= 2 * multiple), 1)


@dataclass(slots=True, eq=False)
class ClientAccount:
    """The work that a client's requests have had, and by how much that is more than the least served client's."""

    served: float = 0.0
    surplus: float = 0.0
    num_requests: int = 0
    num_seats: int = 0


@dataclass(slots=True, eq=False)
class Account:
    """The work that a request has had. `age` is the time of its arrival, in tokens, `step` the last in which it took part.

    The units of side work are seconds in place of tokens, and rounds in place of steps.

    Each sequence that runs has a seat, but the beams of a search share one. A request `is_large` once a smaller one
    has waited for one of its seats.
    """

    client: ClientAccount
    priority: int = 0
    age: float = 0.0
    served: float = 0.0
    num_sequences: int = 0
    num_running: int = 0
    is_search: bool = False
    is_large: bool = False
    step: int = 0

    def need(self, num_left: int) -> float:
        return self.served + num_left + self.client.surplus

    @property
    def num_seats(self) -> int:
        return min(self.num_running, 1) if self.is_search else self.num_running

    def note_running(self, change: int) -> None:
        before = self.num_seats
        self.num_running += change
        self.client.num_seats += self.num_seats - before


class Shares:
    """The accounts of all requests that have sequences, and of their clients.

    `credit` is the most work that a client saves up while others are served, whether it is idle or needs little.
    """

    def __init__(self, credit: float) -> None:
        self.total = 0.0  # work done for all
        self._credit = credit
        self._accounts: dict[str, Account] = {}
        self._clients: dict[str, ClientAccount] = {}

    @property
    def num_requests(self) -> int:
        return len(self._accounts)

    @property
    def expects_others(self) -> bool:
        """True if there are several requests, or if the only one yields to requests that may arrive."""
        return len(self._accounts) > 1 or any(account.priority > 0 for account in self._accounts.values())

    @property
    def num_seats(self) -> int:
        return sum(client.num_seats for client in self._clients.values())

    def open(self, request_id: str, client: str, priority: int, *, is_search: bool) -> Account:
        """Return the account of a request for one more of its sequences."""
        account = self._accounts.get(request_id)
        if account is None:
            of_client = self._clients.setdefault(client, ClientAccount())
            if not of_client.num_requests:  # an idle client saves up at most the credit
                of_client.served = max(of_client.served, self._least_served() - self._credit)
            of_client.num_requests += 1
            account = Account(of_client, priority, self.total / WORK_PER_TOKEN_OF_AGE, is_search=is_search)
            self._accounts[request_id] = account
        account.num_sequences += 1
        return account

    def close(self, request_id: str) -> None:
        """Note the end of a sequence; the account ends with the last one of its request."""
        account = self._accounts[request_id]
        account.num_sequences -= 1
        if not account.num_sequences:
            del self._accounts[request_id]
            account.client.num_requests -= 1
            self._forget_clients()

    def charge(self, account: Account, work: float, num_tokens: float) -> None:
        account.served += num_tokens
        account.client.served += work
        self.total += work

    def compare_clients(self) -> None:
        """Bring the clients' surpluses up to date."""
        active = [client for client in self._clients.values() if client.num_requests]
        least_allowed = max((client.served for client in active), default=0.0) - self._credit
        for client in active:
            client.served = max(client.served, least_allowed)
        least = self._least_served()
        for client in self._clients.values():
            client.surplus = client.served - least

    def _least_served(self) -> float:
        return min((client.served for client in self._clients.values() if client.num_requests), default=0.0)

    def _forget_clients(self) -> None:
        """Drop idle clients that would return with the whole credit."""
        least = self._least_served() - self._credit
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.num_requests or (self._accounts and client.served > least)
        }
