"""The error tree: every failure that a user, an operator or a file can cause.

What it is: the only exceptions this package raises on purpose. What it knows
nothing about: HTTP frameworks, torch, the engine. Each class carries an HTTP
status and a stable code, so that a server maps it without a table of its own;
each instance may name the parameter at fault and says how to mend it.

    NanoVLLMError                     500 internal_error
    ├── InvalidRequestError           400 invalid_request        a request's field is off
    │   ├── RecordingError            400 recording_invalid      a recorded run cannot be read; names the line
    │   ├── BundleError               400 bundle_invalid         a folder is no bundle, or one that must be kept
    │   ├── ContextLengthError        400 context_length_exceeded  it can never fit
    │   └── UnsupportedParameterError 400 unsupported_parameter  a field this package, or this model, does not know
    ├── ConfigError                   400 invalid_config         an engine setting is off
    ├── ModelNotFoundError            404 model_not_found        no such model, or no network
    ├── ModelFileError                422 model_file_invalid     truncated, hostile or foreign bytes
    ├── UnsupportedModelError         422 model_unsupported      well-formed, but not ours (names the feature)
    ├── OutOfMemoryError              507 out_of_memory          the machine cannot hold it
    ├── RequestNotFoundError          404 request_not_found      unknown or finished request id
    ├── EngineClosedError             503 engine_closed          used after close()
    ├── ExecutionError                500 execution_failed       a stage of a step failed
    ├── DeadlineError                 504 deadline_exceeded      it took longer than it was given
    ├── UnhealthyError                503 engine_unhealthy       the engine fails again and again, or is gone
    ├── StateNotFoundError            404 state_not_found        no such state object, or not this tenant's
    ├── StateConflictError            409 state_conflict         somebody else changed it first
    ├── StateRefusedError             507 state_refused          the state plane has no room for it; has the receipt
    │   └── SessionQuotaError         507 session_quota          a tenant keeps as many turns as it may
    ├── StateFolderError              409 state_folder           the folder is in use, of another schema, or no folder
    ├── StateBundleError              400 state_bundle_invalid   exported state that does not verify
    ├── TierError                     503 tier_failed            a tier of the state plane failed; serving goes on
    │   └── TierFullError             507 tier_full              it has no room
    ├── BusyError                     503 server_overloaded      no room now; says when to come again
    │   ├── RateLimitError            429 rate_limit_exceeded    this tenant's share is used up
    │   └── DrainingError             503 draining               shutting down, or not started yet
    ├── RemoteError                   502 remote_failed          another server is not there, refused, or sent no answer
    └── AccessError                   403 access_denied          this caller may not do that
        └── AuthenticationError       401 invalid_api_key        no key, or an unknown one
"""

from __future__ import annotations


class NanoVLLMError(Exception):
    """Base of the tree. `message` is one sentence; `param` names the field; `hint` says how to mend it."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        self.message, self.param, self.hint = message, param, hint
        super().__init__(f"{message} {hint}" if hint else message)


class InvalidRequestError(NanoVLLMError, ValueError):
    """A request's field has a value that cannot be honoured."""

    status, code = 400, "invalid_request"


class RecordingError(InvalidRequestError):
    """A recorded run cannot be read: there is no such file, or a line of it is not a record."""

    code = "recording_invalid"


class BundleError(InvalidRequestError):
    """A folder holds no bundle that can be read, or one that must not be written into."""

    code = "bundle_invalid"


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt and output together, can never fit the model or the KV pool."""

    code = "context_length_exceeded"


class UnsupportedParameterError(InvalidRequestError):
    """A request's field is unknown, or asks for what this package, installation or model cannot do."""

    code = "unsupported_parameter"


class ConfigError(NanoVLLMError, ValueError):
    """An engine setting is unknown, malformed or contradicts another one."""

    status, code = 400, "invalid_config"


class ModelNotFoundError(NanoVLLMError):
    """The named model is neither a path, an alias nor a hub id that can be reached."""

    status, code = 404, "model_not_found"


class ModelFileError(NanoVLLMError):
    """A model file is truncated, corrupt or hostile."""

    status, code = 422, "model_file_invalid"


class UnsupportedModelError(NanoVLLMError):
    """The file is sound, but uses an architecture or feature this package does not implement."""

    status, code = 422, "model_unsupported"


class OutOfMemoryError(NanoVLLMError):
    """The weights or the KV pool do not fit into the memory that is free."""

    status, code = 507, "out_of_memory"


class RequestNotFoundError(NanoVLLMError, KeyError):
    """No live request has this id."""

    status, code = 404, "request_not_found"

    def __str__(self) -> str:  # KeyError would print the repr
        return self.args[0]


class EngineClosedError(NanoVLLMError):
    """The engine was used after `close()`."""

    status, code = 503, "engine_closed"


class ExecutionError(NanoVLLMError):
    """A stage of a step failed; the requests it concerned failed with it."""

    status, code = 500, "execution_failed"


class DeadlineError(NanoVLLMError):
    """A request took longer than it, or the server, allows."""

    status, code = 504, "deadline_exceeded"


class UnhealthyError(NanoVLLMError):
    """The engine failed several times in a row, or has ended: it takes no more requests."""

    status, code = 503, "engine_unhealthy"


class RemoteError(NanoVLLMError):
    """Another server could not be reached, refused the request, or sent what is no answer.

    `status` is the one that server gave (502 where it gave none); `code` says in one word what went wrong.
    """

    status, code = 502, "remote_failed"

    def __init__(self, message: str, *, code: str, status: int = 502, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status, self.code = status, code


class StateNotFoundError(NanoVLLMError, KeyError):
    """No state object has this id or name within the caller's namespace; whether another tenant has one is not told."""

    status, code = 404, "state_not_found"

    def __str__(self) -> str:  # KeyError would print the repr
        return self.args[0]


class StateConflictError(NanoVLLMError):
    """The object changed since the caller read it."""

    status, code = 409, "state_conflict"


class StateRefusedError(NanoVLLMError):
    """State could not be kept as asked. `receipt` says why, with the candidates that had to stay."""

    status, code = 507, "state_refused"

    def __init__(
        self, message: str, *, receipt: object = None, param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, param=param, hint=hint)
        self.receipt = receipt


class SessionQuotaError(StateRefusedError):
    """A tenant keeps as many stored turns, or as much of their text, as it may."""

    code = "session_quota"


class StateFolderError(NanoVLLMError):
    """A state folder cannot be opened: another process owns it, a newer version wrote it, or it is no folder."""

    status, code = 409, "state_folder"


class StateBundleError(NanoVLLMError, ValueError):
    """Exported state is damaged, truncated or of another version; nothing of it was taken in."""

    status, code = 400, "state_bundle_invalid"


class TierError(NanoVLLMError):
    """A tier failed to read or write. The state plane turns it into a miss or a refusal and counts it."""

    status, code = 503, "tier_failed"


class TierFullError(TierError):
    """A tier has no room: its quota, the disk or the server's memory is used up."""

    status, code = 507, "tier_full"


class BusyError(NanoVLLMError):
    """The queue is full. `retry_after_s` is when there may be room."""

    status, code = 503, "server_overloaded"

    def __init__(
        self, message: str, *, retry_after_s: int = 1, param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, param=param, hint=hint)
        self.retry_after_s = retry_after_s


class RateLimitError(BusyError):
    """One tenant has as much in flight as it may."""

    status, code = 429, "rate_limit_exceeded"


class DrainingError(BusyError):
    """The server is shutting down, or has not loaded its model yet."""

    code = "draining"


class AccessError(NanoVLLMError):
    """The caller is not allowed to do this."""

    status, code = 403, "access_denied"


class AuthenticationError(AccessError):
    """The API key is missing or unknown."""

    status, code = 401, "invalid_api_key"


def shown(value: object) -> str:
    """A value for a message: short, on one line, and never an exception of its own."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
