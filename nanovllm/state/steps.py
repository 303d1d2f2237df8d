"""Steps: a verb that needs bytes of a tier, written once, for who may wait and for who may not.

What it is: such a verb is a generator that yields every transfer whose end it needs; `finish` waits for them, `begin`
lets it go on by itself, from `poll`. What it knows nothing about: verbs. Invariants: what a verb returns or raises
reaches `then` exactly once; between two of its steps anything may have happened to what it works on, and the verb
looks again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from nanovllm.state.mover import Mover, Transfer

T = TypeVar("T")
Steps = Generator[Transfer, None, T]
Then = Callable[[T | None, Exception | None], None]


def finish(mover: Mover, steps: Steps[T]) -> T:
    """Run a verb to its end; the deadlines of its transfers bound that."""
    try:
        while True:
            mover.wait(next(steps))
    except StopIteration as end:
        value: T = end.value
        return value


def begin(steps: Steps[T], then: Then[T]) -> None:
    """Run a verb as far as it goes without waiting; each transfer's end takes it further."""
    try:
        transfer = next(steps)
        while transfer.done:
            transfer = next(steps)
    except StopIteration as end:
        then(end.value, None)
    except Exception as error:  # noqa: BLE001  it belongs to whoever asked
        then(None, error)
    else:
        after(transfer, lambda: begin(steps, then))


def after(transfer: Transfer, go_on: Callable[[], None]) -> None:
    """Call `go_on` when the transfer ends, or now where it has, after all that it was to do at its end."""
    if transfer.done:
        go_on()
        return
    first = transfer.then

    def ended(done: Transfer) -> None:
        try:
            first(done)
        finally:
            go_on()

    transfer.then = ended
