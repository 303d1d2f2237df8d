"""The error tree: every failure that a user, an operator or a file can cause.

What it is: the only exceptions this package raises on purpose. What it knows
nothing about: HTTP frameworks, torch, the engine. Each class carries an HTTP
status and a stable code, so that a server maps it without a table of its own;
each instance may name the parameter at fault and says how to mend it.

    NanoVLLMError                     500 internal_error
    ├── InvalidRequestError           400 invalid_request        a request's field is off
    │   └── ContextLengthError        400 context_length_exceeded  it can never fit
    ├── ConfigError                   400 invalid_config         an engine setting is off
    ├── ModelNotFoundError            404 model_not_found        no such model, or no network
    ├── ModelFileError                422 model_file_invalid     truncated, hostile or foreign bytes
    ├── UnsupportedModelError         422 model_unsupported      well-formed, but not ours (names the feature)
    ├── OutOfMemoryError              507 out_of_memory          the machine cannot hold it
    ├── RequestNotFoundError          404 request_not_found      unknown or finished request id
    ├── EngineClosedError             503 engine_closed          used after close()
    └── ExecutionError                500 execution_failed       a step's forward pass failed
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


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt and output together, can never fit the model or the KV pool."""

    code = "context_length_exceeded"


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
    """The forward pass of one step failed; the requests of that step failed with it."""

    status, code = 500, "execution_failed"


def shown(value: object) -> str:
    """A value for a message: short, on one line, and never an exception of its own."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
