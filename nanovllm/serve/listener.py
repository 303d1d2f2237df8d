"""The listening socket: where it may be opened, and what it is called.

What it is: bind, exposure and the process's share of open files. What it knows nothing
about: HTTP, the engine, torch. Invariants: an address that other machines reach is not
opened without a key unless that was said aloud; a failure says how to mend it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import replace

from nanovllm.errors import ConfigError
from nanovllm.serve.config import ServerConfig

BACKLOG = 2048
SPARE_FILES = 256  # for the model's files, the engine's pipe, the log and what else is open


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises ConfigError where the address is not to be had."""
    host = config.host.strip("[]")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise _not_bound(config, error) from None
    return listener


def check_exposure(config: ServerConfig, has_keys: bool) -> None:
    """Refuse to serve an address that others can reach without asking for a key. Raises ConfigError."""
    if not (config.is_loopback or has_keys or config.insecure):
        raise ConfigError(
            f"{config.host} can be reached from other machines, and there is no API key.",
            param="host",
            hint="Set one with --api-key or NANOVLLM_API_KEY, or say --insecure.",
        )


def url_of(listener: socket.socket) -> str:
    """The address as a client writes it; for all addresses, the loopback one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _not_bound(config: ServerConfig, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"Port {config.port} on {config.host} is taken.",
            param="port",
            hint="Choose another with --port; 0 takes a free one.",
        )
    if error.errno == errno.EACCES:
        hint = "Choose one above 1023."
        return ConfigError(f"Port {config.port} needs more rights than this process has.", param="port", hint=hint)
    why = error.strerror or str(error)
    return ConfigError(f"{config.host} cannot be listened on: {why}.", param="host", hint="Use 127.0.0.1.")


def with_files_for_connections(config: ServerConfig) -> ServerConfig:
    """Let this process open a file per connection; where it may not, the settings with fewer connections."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # absent on Windows

        wanted = config.max_connections + SPARE_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return replace(config, max_connections=max(1, most - SPARE_FILES))
    return config
