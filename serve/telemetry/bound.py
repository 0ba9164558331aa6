"""What binds a step: one word, by a rule."""

from __future__ import annotations

from typing import Literal, get_args

Bound = Literal["host", "pages", "compute", "seats", "bandwidth", "idle"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
HOST_SHARE = 0.1
NEAR = 0.5
REMEDIES: dict[Bound, str] = {
    "host": "the device waits for the host: run fewer Python threads beside it, or give a step more work",
    "pages": "requests wait for memory: raise num_pages, or lower max_model_len, or quantise",
    "compute": "the arithmetic is the nearer limit: fewer FLOPs, a faster device; more requests take longer",
    "seats": "requests wait for a seat: raise max_num_seqs",
    "bandwidth": "the memory is the nearer limit: quantise, or let more requests share a step's weights",
    "idle": "too few requests: send more at once",
}


def bound(
    *, step_s: float, host_gap_s: float, bandwidth_share: float, compute_share: float, waiting: int,
    running: int, seats: int, room: bool, preempted: int,
) -> Bound:  # fmt: skip
    """What would have to change for the engine to do more; the first that holds:

    1. "host": for 10 % of the step or more, the device waited for the host.
    2. "pages": a running request was preempted in this step; or requests wait although a seat is free and the
       step had room for more tokens (`room`), so memory is what they wait for.
    3. "compute": the step is nearer to the compute ceiling than to the bandwidth ceiling. More requests at once
       would take as much longer.
    4. "seats": requests wait and every seat is taken. More seats would share what the step reads.
    5. "bandwidth": the step reaches half of the bandwidth ceiling, or runs more than half of its seats.
    6. "idle": too few requests: nobody waits, and half of the seats or more are empty.

    step_s and host_gap_s in seconds; shares of the measured ceilings; the others count requests.
    """
    if step_s > 0 and host_gap_s >= HOST_SHARE * step_s:
        return "host"
    if preempted or (waiting and running < seats and room):
        return "pages"
    if compute_share > bandwidth_share:
        return "compute"
    if waiting and running >= seats:
        return "seats"
    if bandwidth_share >= NEAR or 2 * running > seats:
        return "bandwidth"
    return "idle"
