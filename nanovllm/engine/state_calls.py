"""Calls on the state store as messages, for callers that do not share the engine's thread.

What it is: a table of verbs, the way of a call there (plain data) and of its answer back (the store's own
types); one verb, `written`, is the engine's own. What it knows nothing about: links, HTTP, who may call what.
Invariants: what crosses is numbers, strings, bytes, lists and maps; each call is answered exactly once, by its
result or by its error; none of them waits for a tier: it goes on when the tier has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from nanovllm.engine.messages import ErrorInfo, StateAnswer, StateCall
from nanovllm.engine.tiered_state import TieredState
from nanovllm.engine.written import Written
from nanovllm.errors import ExecutionError, InvalidRequestError, NanoVLLMError, StateRefusedError
from nanovllm.state.objects import Metadata, StateId, StateMatch, StateObject
from nanovllm.state.payload import decode, encode, object_of, payload_of
from nanovllm.state.receipts import Explanation, Receipt
from nanovllm.state.store import StateStore
from nanovllm.state.storing import Pending
from nanovllm.state.verbs import LATER

Answer = Callable[[StateAnswer], None]
WIRE_BYTES = 32 << 20  # of one object: half of what a frame may hold
OBJECT = "obj"
WRITTEN = "written"
RESULTS: dict[str, Any] = {
    WRITTEN: Written,
    "put": StateId,
    "update": Receipt,
    "get": object,
    "match": StateMatch,
    "fork": StateId,
    "drop": Receipt,
    "export": bytes,
    "import_": StateId,
    "pin": Receipt,
    "unpin": Receipt,
    "migrate": Receipt,
    "evict": Receipt,
    "verify": Receipt,
    "explain": Explanation,
    "ls": list[StateObject],
    "find": StateObject,
    "leaving": list[StateObject],
    "holdings": dict[str, int],
    "top": dict[str, Any],
}


def call_of(call_id: int, verb: str, arguments: Mapping[str, Any]) -> StateCall:
    """A call as a message. Raises InvalidRequestError on an unknown verb, TypeError on an object that is no state."""
    if verb not in RESULTS:
        raise InvalidRequestError(f"There is no call {verb!r:.60} on state.", param="verb", hint=", ".join(RESULTS))
    plain = {name: _plain(value) for name, value in arguments.items()}
    _check_size(plain.get("bundle"), "bundle")
    if OBJECT in plain:
        plain[OBJECT] = encode(payload_of(arguments[OBJECT]), WIRE_BYTES)
    return StateCall(call_id, verb, plain)


def result_of(answer: StateAnswer, verb: str) -> Any:
    """What the call on the store would have returned, or raised."""
    receipt = None if answer.receipt is None else msgspec.convert(answer.receipt, Receipt)
    if answer.error is not None:
        error = answer.error.as_error()
        if isinstance(error, StateRefusedError):
            error.receipt = receipt
        raise error
    if verb == "get":
        return object_of(decode(answer.result))
    kind = RESULTS[verb]
    if kind is not StateId:
        return msgspec.convert(answer.result, kind)
    state_id = StateId(answer.result)
    state_id.receipt = receipt
    return state_id


def apply_engine_call(state: TieredState, call: StateCall, answer: Answer) -> None:
    """As `apply_call`; `written` is answered now, or by a later `state.poll()`."""
    if call.verb != WRITTEN:
        apply_call(state.store, call, answer)
        return
    try:
        state.written.ask(lambda written: answer(_answered(call, written)), **call.args)
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs to whoever asked
        answer(_refused(call, error))


def apply_call(store: StateStore, call: StateCall, answer: Answer) -> None:
    """Run a call between two steps; `answer` is called now, or by a later `store.poll()`."""
    try:
        arguments = dict(call.args)
        if OBJECT in arguments:
            arguments[OBJECT] = object_of(decode(arguments[OBJECT]))
        if call.verb in ("put", "update"):
            _begin(store, call, arguments, answer)
        elif call.verb in LATER:
            store.later(call.verb, lambda result, error: answer(_outcome(call, result, error)), **arguments)
        else:
            answer(_answered(call, _apply(store, call.verb, arguments)))
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs to whoever asked
        answer(_refused(call, error))


def _begin(store: StateStore, call: StateCall, arguments: dict[str, Any], answer: Answer) -> None:
    """A put or an update, answered when it is where it was promised."""

    def then(pending: Pending) -> None:
        if pending.error is not None:
            answer(_refused(call, pending.error))
        else:
            answer(_answered(call, pending.result() if call.verb == "put" else pending.receipt))

    later = store.put_later if call.verb == "put" else store.update_later
    later(**arguments, then=then)


def _apply(store: StateStore, verb: str, arguments: dict[str, Any]) -> Any:
    if verb not in RESULTS:
        raise InvalidRequestError(f"There is no call {verb!r:.60} on state.", param="verb")
    return getattr(store, verb)(**arguments)


def _outcome(call: StateCall, result: Any, error: Exception | None) -> StateAnswer:
    """The answer to a verb that read or wrote; a result that no frame would hold is a refusal."""
    try:
        if error is not None:
            raise error
        _check_size(result, "state_id")
        return _answered(call, encode(payload_of(result), WIRE_BYTES) if call.verb == "get" else result)
    except Exception as refusal:  # noqa: BLE001  it belongs to whoever asked
        return _refused(call, refusal)


def _check_size(bundle: Any, param: str) -> None:
    """Raise InvalidRequestError for a bundle that no frame would hold."""
    if isinstance(bundle, bytes) and len(bundle) > WIRE_BYTES:
        hint = "Export from the folder itself, while no engine has it."
        raise InvalidRequestError(
            f"The bundle has {len(bundle):,} bytes; at most {WIRE_BYTES:,} pass at once.", param=param, hint=hint
        )


def _plain(value: Any) -> Any:
    """An argument without its class: an id, or metadata."""
    if isinstance(value, Metadata):
        return asdict(value)
    return str(value) if isinstance(value, StateId) else value


def _answered(call: StateCall, result: Any) -> StateAnswer:
    receipt = asdict(result.receipt) if isinstance(result, StateId) and result.receipt is not None else None
    plain = str(result) if isinstance(result, StateId) else msgspec.to_builtins(result, builtin_types=(bytes,))
    return StateAnswer(call.call_id, plain, None, receipt)


def _refused(call: StateCall, error: Exception) -> StateAnswer:
    if isinstance(error, TypeError):
        error = InvalidRequestError(f"{call.verb} cannot be called so: {error}.", param="args")
    if not isinstance(error, NanoVLLMError):
        error = ExecutionError(f"The call {call.verb} failed: {type(error).__name__}.")
    receipt = getattr(error, "receipt", None)
    return StateAnswer(call.call_id, None, ErrorInfo.of(error), None if receipt is None else asdict(receipt))
