"""Turns without processes: who is next, and what a cancelled job leaves behind."""

from __future__ import annotations

import asyncio

import pytest

from server.limits.turns import client_in_turn
from server.media.turns import NEWCOMER_LEAD, NUM_SHORT, RECENT_SECONDS, DecodeTurns, Job, Requester

pytestmark = pytest.mark.anyio


class Queue:
    """One resource, and the names of those that had it, in order."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.turns = DecodeTurns(["resource"], clock=lambda: self.now)
        self.served: list[str] = []

    async def use(self, name: str, job: Job) -> None:
        resource = await self.turns.take(job)
        self.served.append(name)
        await asyncio.sleep(0)
        self.turns.give_back(resource)

    def start(self, name: str, *requesters: Requester) -> asyncio.Task[None]:
        return asyncio.create_task(self.use(name, Job(*requesters)))


@pytest.fixture
async def queue() -> Queue:
    return Queue()


async def test_a_new_request_is_next(queue: Queue) -> None:
    large = Requester()
    resource = await queue.turns.take(Job(large))
    tasks = [queue.start(name, large) for name in "abc"]
    await asyncio.sleep(0)
    tasks.append(queue.start("new", Requester()))
    await asyncio.sleep(0)
    queue.turns.give_back(resource)
    await asyncio.gather(*tasks)
    assert queue.served == ["new", "a", "b", "c"]


async def test_requests_take_turns(queue: Queue) -> None:
    names = "aaabbbc"
    requesters = {name: Requester() for name in names}
    await asyncio.gather(*(queue.start(name, requesters[name]) for name in names))
    assert "".join(queue.served) == "abcabab"


async def test_new_requests_cannot_hold_up_a_request_for_good(queue: Queue) -> None:
    large = Requester()
    tasks = [queue.start("large", large) for _ in range(3)]
    tasks += [queue.start("new", Requester()) for _ in range(2 * NEWCOMER_LEAD)]
    while queue.served.count("large") < 3:
        await asyncio.sleep(0)
        while len(tasks) < len(queue.served) + 2 * NEWCOMER_LEAD:  # as many arrive as are served
            tasks.append(queue.start("new", Requester()))
        assert len(queue.served) < 20 * NEWCOMER_LEAD
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_clients_take_turns_however_many_requests_each_has(queue: Queue) -> None:
    tasks = [queue.start("many", Requester(client="a")) for _ in range(9)]
    tasks += [queue.start("one", Requester(client="b")) for _ in range(3)]
    await asyncio.gather(*tasks)
    assert queue.served == ["many", "one"] * 3 + ["many"] * 6


async def test_requests_of_a_client_take_turns_between_those_of_others(queue: Queue) -> None:
    requesters = {name: Requester(client=name.lower()) for name in "aAb"}
    await asyncio.gather(*(queue.start(name, requesters[name]) for name in "aaaAAbbb"))
    assert "".join(queue.served) == "abAbabAa"


async def test_a_client_that_has_no_request_for_a_while_is_forgotten(queue: Queue) -> None:
    for number in range(3 * NEWCOMER_LEAD):
        queue.now += (RECENT_SECONDS + 1) / NEWCOMER_LEAD
        await queue.start("", Requester(client=str(number)))
    assert len(queue.turns._last_turns) == NEWCOMER_LEAD


async def test_a_client_without_a_request_for_a_while_precedes_no_new_client(queue: Queue) -> None:
    await queue.start("old", Requester(client="old"))
    for number in range(2 * NEWCOMER_LEAD):
        await queue.start("", Requester(client=str(number)))
    queue.served.clear()
    await asyncio.gather(*(queue.start(name, Requester(client=name)) for name in ("busy", "new", "old")))
    assert queue.served == ["busy", "new", "old"]


async def test_a_client_that_waits_keeps_its_turn_while_it_sends_more(queue: Queue) -> None:
    resource = await queue.turns.take(Job(Requester(client="busy")))
    tasks = []
    for name in ("patient", "new", "patient"):
        tasks.append(queue.start(name, Requester(client=name)))
        await asyncio.sleep(0)
        queue.turns._num_turns += 10  # of clients that have come since
    queue.turns.give_back(resource)
    await asyncio.gather(*tasks)
    assert queue.served == ["patient", "new", "patient"]


async def test_a_request_is_of_the_client_that_sent_it() -> None:
    before = client_in_turn.set("a")
    assert Requester().client == "a"
    client_in_turn.reset(before)


async def test_a_cancelled_job_does_not_cost_its_client_a_turn(queue: Queue) -> None:
    resource = await queue.turns.take(Job(Requester(client="first")))
    cancelled, *tasks = [queue.start(name, Requester(client=name[0])) for name in ("b1", "b2", "c1", "d1")]
    await asyncio.sleep(0)
    cancelled.cancel()  # it leaves after the resource has been returned
    queue.turns.give_back(resource)
    await asyncio.gather(cancelled, *tasks, return_exceptions=True)
    assert queue.served == ["b2", "c1", "d1"]


async def test_a_job_has_the_turns_of_all_who_share_it(queue: Queue) -> None:
    large, small = Requester(), Requester()
    shared = Job(large)
    tasks = [queue.start(f"large {i}", large) for i in range(3)]
    tasks.append(asyncio.create_task(queue.use("shared", shared)))
    await asyncio.sleep(0)
    shared.add(small)
    await asyncio.gather(*tasks)
    assert queue.served == ["large 0", "shared", "large 1", "large 2"]


async def test_one_who_leaves_a_shared_job_has_no_turn_there(queue: Queue) -> None:
    large, small = Requester(), Requester()
    shared = Job(large)
    tasks = [queue.start(f"large {i}", large) for i in range(3)]
    tasks.append(asyncio.create_task(queue.use("shared", shared)))
    await asyncio.sleep(0)
    shared.add(small)
    shared.discard(small)
    await asyncio.gather(*tasks)
    assert queue.served[-1] == "shared"


async def test_a_cancelled_job_is_passed_over(queue: Queue) -> None:
    tasks = [queue.start(name, Requester()) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert queue.served == ["a", "c"]


async def test_a_resource_that_comes_with_the_cancellation_is_returned(queue: Queue) -> None:
    resource = await queue.turns.take(Job(Requester()))
    taking = asyncio.create_task(queue.turns.take(Job(Requester())))
    await asyncio.sleep(0)
    queue.turns.give_back(resource)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await asyncio.wait_for(queue.use("next", Job(Requester())), 5)


async def test_a_paused_request_has_no_turns_until_it_goes_on(queue: Queue) -> None:
    paused, other = Requester(is_paused=True), Requester(is_paused=True)
    shared = Job(paused, other)
    tasks = [queue.start("paused", paused), asyncio.create_task(queue.use("shared", shared))]
    await asyncio.sleep(0.01)
    assert queue.served == []
    other.is_paused = False
    queue.turns.grant()
    await tasks[1]
    assert queue.served == ["shared"]
    paused.is_paused = False
    queue.turns.grant()
    await tasks[0]


async def test_media_count_once_for_each_request() -> None:
    first, second = Requester(), Requester()
    job = Job(first, second)
    first.pixels.record(b"a", 5)
    second.frame_bytes.record(b"a", 7)
    assert (job.pixels_before(b"b"), job.frame_bytes_before(b"b")) == (0, 0)
    for requester in job.requesters:
        requester.pixels.record(b"b", 3)
        requester.pixels.record(b"b", 4)
    assert [(r.pixels.without(b""), r.pixels.without(b"b")) for r in (first, second)] == [(9, 5), (4, 0)]
    assert (job.pixels_before(b"c"), Job().pixels_before(b"c"), Job().frame_bytes_before(b"c")) == (4, 0, 0)


async def test_one_of_several_resources_is_never_lent_to_a_long_job() -> None:
    turns, videos = DecodeTurns(["a", "b", "c"]), Requester()
    long = [asyncio.create_task(turns.take(Job(videos), is_long=True)) for _ in range(3)]
    await asyncio.sleep(0)
    assert [task.done() for task in long] == [True, True, False]
    short = await asyncio.wait_for(turns.take(Job(Requester())), 5)
    turns.give_back(short)
    await asyncio.sleep(0)
    assert not long[2].done(), "the short one's resource was lent to a long job"
    turns.give_back(long[0].result())
    await asyncio.wait_for(long[2], 5)


async def test_a_short_job_passes_a_long_one_of_its_request_that_has_to_wait() -> None:
    turns, request = DecodeTurns(["a", "b"]), Requester()
    first = await turns.take(Job(request), is_long=True)
    second = asyncio.create_task(turns.take(Job(request), is_long=True))
    await asyncio.sleep(0)
    await asyncio.wait_for(turns.take(Job(request)), 5)
    turns.give_back(first)
    await asyncio.wait_for(second, 5)


async def test_a_single_resource_is_lent_to_long_jobs() -> None:
    await asyncio.wait_for(DecodeTurns(["a"]).take(Job(Requester()), is_long=True), 5)


async def test_a_slow_job_leaves_a_resource_to_other_clients() -> None:
    turns, slow, other = DecodeTurns(["a", "b"]), Requester(client="slow"), Requester(client="other")
    jobs = [Job(slow) for _ in range(3)]
    first, second = [await turns.take(job) for job in jobs[:2]]
    assert turns.try_to_keep(first, jobs[0])
    assert turns.try_to_keep(second, jobs[1]), "no other job waits for it"
    third = asyncio.create_task(turns.take(jobs[2]))
    await asyncio.sleep(0)
    assert turns.try_to_keep(second, jobs[1]), "only its own client waits for it"
    short = asyncio.create_task(turns.take(Job(other)))
    await asyncio.sleep(0)
    assert turns.try_to_keep(first, jobs[0])
    assert not turns.try_to_keep(second, jobs[1])
    turns.give_back(second)
    turns.give_back(await asyncio.wait_for(short, 5))
    await asyncio.sleep(0)
    assert not third.done(), "another job of the client was lent the other resource"
    turns.give_back(first)
    await asyncio.wait_for(third, 5)


async def test_a_client_of_a_slow_job_leaves_a_resource_to_others_until_its_jobs_are_short_again() -> None:
    turns, slow = DecodeTurns(["a", "b"]), Requester(client="slow")
    job = Job(slow)
    resource = await turns.take(job)
    assert turns.try_to_keep(resource, job)
    turns.record_end(job)
    turns.give_back(resource)
    for _ in range(NUM_SHORT):
        jobs = [Job(slow), Job(slow)]
        resource = await turns.take(jobs[0])
        second = asyncio.create_task(turns.take(jobs[1]))
        await asyncio.sleep(0)
        assert not second.done()
        turns.record_end(jobs[0])
        turns.give_back(resource)
        turns.give_back(await second)
    await turns.take(Job(slow))
    await asyncio.wait_for(turns.take(Job(slow)), 5)


async def test_a_slow_job_keeps_its_resource_from_a_cancelled_one() -> None:
    turns, slow = DecodeTurns(["a", "b"]), Job(Requester(client="slow"))
    await turns.take(Job(Requester(client="video")), is_long=True)
    resource = await turns.take(slow)
    waiting = asyncio.create_task(turns.take(Job(Requester(client="other"))))
    await asyncio.sleep(0)
    assert not turns.try_to_keep(resource, slow)
    waiting.cancel()
    assert turns.try_to_keep(resource, slow)
    await asyncio.wait([waiting])


async def test_a_slow_job_is_not_counted_as_a_short_one() -> None:
    turns, slow = DecodeTurns(["a", "b"]), Job(Requester(client="slow"))
    await turns.take(Job(Requester(client="video")), is_long=True)
    assert turns.try_to_keep(await turns.take(slow), slow)
    assert not slow.is_long
    turns.record_end(slow)
    assert turns._slow_clients == {"slow": NUM_SHORT}


async def test_a_slow_client_is_forgotten_when_others_have_had_many_turns() -> None:
    turns, slow = DecodeTurns(["a", "b"]), Requester(client="slow")
    job = Job(slow)
    resource = await turns.take(job)
    turns.try_to_keep(resource, job)
    turns.give_back(resource)
    for number in range(NEWCOMER_LEAD + 1):
        turns.give_back(await turns.take(Job(Requester(client=str(number)))))
    await turns.take(Job(Requester(client="video")), is_long=True)
    await asyncio.wait_for(turns.take(Job(slow)), 5)


async def test_the_last_resource_is_kept_for_clients_that_have_had_turns_lately() -> None:
    turns, many, other = DecodeTurns(["a", "b", "c"]), Requester(client="many"), Requester(client="other")
    turns.give_back(await turns.take(Job(other)))
    first = [await turns.take(Job(many)) for _ in range(2)]
    third = asyncio.create_task(turns.take(Job(many)))
    await asyncio.sleep(0)
    assert not third.done()
    turns.give_back(await asyncio.wait_for(turns.take(Job(other)), 5))
    await asyncio.sleep(0)
    assert not third.done()
    turns.give_back(first[0])
    await asyncio.wait_for(third, 5)


async def test_no_resource_is_kept_when_others_have_had_no_turn_for_seconds() -> None:
    now = 0.0
    turns, lone = DecodeTurns(["a", "b"], lambda: now), Requester(client="lone")
    turns.give_back(await turns.take(Job(Requester(client="other"))))
    now += RECENT_SECONDS / 2
    first = await turns.take(Job(lone))
    second = asyncio.create_task(turns.take(Job(lone)))
    await asyncio.sleep(0)
    assert not second.done()
    turns.give_back(first)
    now += RECENT_SECONDS / 2 + 1
    await asyncio.gather(asyncio.wait_for(second, 5), asyncio.wait_for(turns.take(Job(lone)), 5))


async def test_no_resource_is_kept_when_all_clients_have_a_short_job() -> None:
    turns, clients = DecodeTurns(["a", "b", "c"]), [Requester(client="one"), Requester(client="two")]
    for client in clients:
        await turns.take(Job(client))
    await asyncio.wait_for(turns.take(Job(clients[0])), 5)


async def test_clients_that_show_the_same_pictures_use_all_resources() -> None:
    turns, clients = DecodeTurns(["a", "b"]), [Requester(client="one"), Requester(client="two")]
    for _ in range(2):
        await asyncio.wait_for(turns.take(Job(*clients)), 5)


async def test_a_client_that_no_longer_needs_a_running_job_gets_the_last_resource() -> None:
    turns, first, second = DecodeTurns(["a", "b"]), Requester(client="first"), Requester(client="second")
    turns.give_back(await turns.take(Job(Requester(client="other"))))
    running = Job(first, second)
    await turns.take(running)
    waiting = asyncio.create_task(turns.take(Job(first)))
    await asyncio.sleep(0)
    assert not waiting.done()
    running.discard(first)
    turns.grant()
    await asyncio.wait_for(waiting, 5)


async def test_when_a_job_turns_out_slow_its_client_gets_the_last_resource_for_a_short_one() -> None:
    turns, first, second = DecodeTurns(["a", "b", "c"]), Requester(client="first"), Requester(client="second")
    turns.give_back(await turns.take(Job(Requester(client="other"))))
    both, job = Job(first, second), Job(first)
    resource = await turns.take(job)
    await turns.take(Job(second))
    waiting = asyncio.create_task(turns.take(both))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert turns.try_to_keep(resource, job)
    await asyncio.wait_for(waiting, 5)


async def test_a_job_that_is_expected_to_be_short_again_waits_for_no_other() -> None:
    turns, slow = DecodeTurns(["a", "b", "c"]), Requester(client="slow")
    job = Job(slow)
    resource = await turns.take(job)
    turns.try_to_keep(resource, job)
    turns.give_back(resource)
    for _ in range(2):
        await turns.take(Job(Requester(client="video")), is_long=True)
    waiting = asyncio.create_task(turns.take(Job(slow)))
    for _ in range(NUM_SHORT):
        await asyncio.sleep(0)
        assert not waiting.done()
        turns.record_end(Job(slow))
    await asyncio.wait_for(waiting, 5)


async def test_a_client_without_others_uses_all_resources() -> None:
    turns, requests = DecodeTurns(["a", "b"]), [Requester(client="lone") for _ in range(2)]
    for request in requests:
        await asyncio.wait_for(turns.take(Job(request)), 5)


async def test_a_client_with_a_long_job_uses_the_last_resource_for_a_short_one() -> None:
    turns, both = DecodeTurns(["a", "b"]), Requester(client="both")
    turns.give_back(await turns.take(Job(Requester(client="other"))))
    await turns.take(Job(both), is_long=True)
    await asyncio.wait_for(turns.take(Job(both)), 5)


async def test_a_media_item_that_other_clients_need_as_well_uses_the_last_resource() -> None:
    turns, many, other = DecodeTurns(["a", "b"]), Requester(client="many"), Requester(client="other")
    turns.give_back(await turns.take(Job(other)))
    await turns.take(Job(many))
    await asyncio.wait_for(turns.take(Job(many, other)), 5)
