"""Admission: how much may wait, counted before a body is read.

What it is: a ledger of slots. A slot is taken by an estimate, corrected when the prompt
has been tokenized, leaves the queue when the engine runs the request, and is given back
at its end. What it knows nothing about: HTTP, the engine's own queue. Invariants: the
sums are those of the slots held, never negative; giving back twice is giving back once;
an empty queue takes any one request. Everything here runs on the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nanovllm.errors import BusyError, InvalidRequestError, RateLimitError
from nanovllm.serve.config import ServerConfig
from nanovllm.serve.context import Tenant

MIN_RETRY_S, MAX_RETRY_S = 1, 30


class Slot:
    """One request's share of the ledger. Made by `Admission.admit`."""

    __slots__ = ("_ledger", "count", "is_held", "is_queued", "tenant", "tokens")

    def __init__(self, ledger: Admission, tenant: Tenant, tokens: int) -> None:
        self._ledger, self.tenant, self.tokens = ledger, tenant, tokens
        self.count = 1
        self.is_held = self.is_queued = True

    def revise(self, tokens: int, count: int) -> None:
        """What was estimated is known: prompt tokens, and sequences.

        Raises BusyError, RateLimitError, InvalidRequestError for more sequences than its tenant may ever have.
        """
        if self.is_held:
            self._ledger.revise(self, tokens, count)

    def started(self) -> None:
        """The engine runs it: it waits no longer."""
        if self.is_queued:
            self.is_queued = False
            self._ledger.unqueue(self)

    def release(self) -> None:
        """It is over."""
        self.started()
        if self.is_held:
            self.is_held = False
            self._ledger.forget(self)


class Admission:
    """The ledger of one server."""

    def __init__(self, config: ServerConfig, prefill_tokens_per_s: Callable[[], float]) -> None:
        self._config, self._prefill_tokens_per_s = config, prefill_tokens_per_s
        self.queued_requests = 0  # admitted and not yet run by the engine; n answers are n requests
        self.queued_tokens = 0  # their prompts'
        self.in_flight = 0  # admitted and not over
        self.in_flight_of: Counter[str] = Counter()  # by tenant
        self.rejected: Counter[str] = Counter()  # by code, for metrics

    def admit(self, tenant: Tenant, tokens: int) -> Slot:
        """A slot for a request of about so many prompt tokens. Raises BusyError, RateLimitError."""
        slot = Slot(self, tenant, tokens)
        self._check(tenant, self.in_flight_of[tenant.name] + 1, self.queued_requests, self.queued_tokens, slot)
        self._add(slot, 1, tokens)
        return slot

    def revise(self, slot: Slot, tokens: int, count: int) -> None:
        """Make `slot` as large as it turned out to be; where that does not fit it stays as it was, and raises."""
        if slot.tenant.name and count > self._config.max_tenant_requests:  # waiting would not help
            raise InvalidRequestError(
                f"prompts x n makes {count} answers; a key may have {self._config.max_tenant_requests} in flight.",
                param="n",
            )
        more_count, more_tokens = count - slot.count, tokens - slot.tokens
        if more_count > 0 or (more_tokens > 0 and slot.is_queued):
            others = (self.queued_requests - slot.count, self.queued_tokens - slot.tokens)
            probe = Slot(self, slot.tenant, tokens)
            probe.count = count
            self._check(slot.tenant, self.in_flight_of[slot.tenant.name] + more_count, *others, probe)
        if not slot.is_queued:  # the queue has forgotten it already
            self.queued_requests -= more_count
            self.queued_tokens -= more_tokens
        self._add(slot, more_count, more_tokens)
        slot.count, slot.tokens = count, tokens

    def unqueue(self, slot: Slot) -> None:
        """`slot` waits no longer."""
        self.queued_requests -= slot.count
        self.queued_tokens -= slot.tokens

    def forget(self, slot: Slot) -> None:
        """`slot` is over."""
        self.in_flight -= slot.count
        self.in_flight_of[slot.tenant.name] -= slot.count
        if not self.in_flight_of[slot.tenant.name]:
            del self.in_flight_of[slot.tenant.name]

    def retry_after_s(self) -> int:
        """When there may be room: the queue's tokens at the measured speed, within bounds."""
        speed = self._prefill_tokens_per_s()
        wait_s = self.queued_tokens / speed if speed > 0 else MIN_RETRY_S
        return max(MIN_RETRY_S, min(MAX_RETRY_S, round(wait_s)))

    @property
    def max_queued_tokens(self) -> float:
        """Prompt tokens that may wait: as set, or as many as are prefilled within the TTFT objective."""
        if self._config.max_queued_tokens is not None:
            return self._config.max_queued_tokens
        speed = self._prefill_tokens_per_s()
        return speed * self._config.ttft_slo if speed > 0 else float("inf")  # nothing measured, nothing known

    def _check(self, tenant: Tenant, tenants_own: int, queued: int, queued_tokens: int, slot: Slot) -> None:
        """Raise unless `slot` fits beside what is queued without it. The texts are constant: they are rendered once."""
        if tenant.name and tenants_own > self._config.max_tenant_requests:
            self.rejected[RateLimitError.code] += 1
            raise RateLimitError("This key has too many requests in flight.", retry_after_s=self.retry_after_s())
        if not queued:
            return
        is_full = queued + slot.count > self._config.max_queued_requests
        if is_full or queued_tokens + slot.tokens > self.max_queued_tokens:
            self.rejected[BusyError.code] += 1
            raise BusyError("The queue is full.", retry_after_s=self.retry_after_s(), hint="Try again later.")

    def _add(self, slot: Slot, count: int, tokens: int) -> None:
        self.queued_requests += count
        self.queued_tokens += tokens
        self.in_flight += count
        self.in_flight_of[slot.tenant.name] += count
