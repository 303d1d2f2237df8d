"""Generated requests, sound and unsound, from our own OpenAPI document: no 5xx, nothing undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from nanovllm.serve.openapi import document
from nanovllm.serve.state_api import KNOWLEDGE_PATH
from nanovllm.serve.state_paths import PATHS
from tests.serve.servers import assert_alive
from tests.serve.surface import Live, live_server

SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {f"{found.ok().method} {found.ok().path}": found.ok() for found in SCHEMA.get_all_operations()}
ADMIN = {"Authorization": "Bearer admin-key"}
MODES = list(schemathesis.GenerationMode)
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
COUNT, LONG_COUNT = 40, 2_500  # per operation with a body, and mode
FEW = 8  # of an operation on one thing of many: nearly all of them name what is not there
LONG = (pytest.mark.long, pytest.mark.timeout(900))
FEW_TOKENS = 2
load_all_checks()


def of(count: int) -> settings:
    """Generate only: what fails is short enough without shrinking, which would cost minutes."""
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= COUNT,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def shorten(body: Any, usual: str = "max_tokens") -> None:
    """Ask for few tokens, so that the cases and not the model take the time; wrong values stay as they are."""
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(name)
        if (value is None and name == usual) or (type(value) is int and value > FEW_TOKENS):
            body[name] = FEW_TOKENS
    if type(body.get("n")) is int and FEW_TOKENS < body["n"] <= 16:
        body["n"] = FEW_TOKENS


def sound(body: dict) -> None:
    """Undo what types cannot say and would refuse nearly every case: names, and fields that need each other."""
    for name in ("model", "priority", "stream_options", "structured_outputs", "top_logprobs", "tool_choice", "echo"):
        body.pop(name, None)
    for name in (
        "knowledge",
        "best_of",
        "min_tokens",
        "logit_bias",
        "stop_token_ids",
        "reasoning_effort",
        "chat_template_kwargs",
    ):
        body.pop(name, None)
    for name, value in body.items():
        if type(value) is float and value.is_integer():  # JSON schema's integers; ours have no point
            body[name] = int(value)
    if body.get("max_completion_tokens") is not None:
        body["max_tokens"] = body["max_completion_tokens"] = FEW_TOKENS
    if "prompt" in body:
        body["prompt"] = "x"
    if "input" in body:
        body["input"] = "x"
        for name in ("previous_response_id", "conversation", "knowledge", "background", "reasoning", "tools", "text"):
            body.pop(name, None)


def try_many(name: str, mode: Any, live: Live, count: int, headers: dict[str, str] | None = None) -> None:
    statuses: set[int] = set()

    @of(count)
    @given(OPERATIONS[name].as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        if case.path in PATHS:
            aim(case, live, is_sound=mode is schemathesis.GenerationMode.POSITIVE)
        statuses.add(try_case(case, live, is_sound=mode is schemathesis.GenerationMode.POSITIVE, headers=headers))

    try:
        each()
    except Unsatisfiable:  # an operation without a body has no unsound case
        assert not name.startswith("post")
    if name.startswith("post") and "{" not in name and OPERATIONS[name].path not in PATHS - {"/state/objects"}:
        assert (200 if mode is schemathesis.GenerationMode.POSITIVE else 400) in statuses


def aim(case: Any, live: Live, *, is_sound: bool) -> None:
    """Half of the cases on one object are on one that is there; a sound put has one content."""
    if "state_id" in case.path_parameters and len(repr(case.body)) % 2:
        case.path_parameters["state_id"] = live.ask("/state/objects", {"token_ids": [1, 2, 3]}).json()["state_id"]
        case.query = {}
    if is_sound and case.path == "/state/objects" and case.method == "POST":
        case.body = {"text": "x"}


def try_case(case: Any, live: Live, *, is_sound: bool, headers: dict[str, str] | None = None) -> int:
    if case.path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        shorten(case.body, "max_output_tokens" if case.path == "/v1/responses" else "max_tokens")
        if is_sound and len(repr(case.body)) % 3:
            sound(case.body)
    if case.path == KNOWLEDGE_PATH and isinstance(case.body, dict):
        case.body.pop("pin", None)  # it would hold the blocks of the server that other tests use
        if is_sound:
            case.body |= {"name": "x", "text": "x", "version": None, "template": None, "scope": "own"}
    response = case.call(base_url=live.url, timeout=60, headers=headers)
    is_refused = case.path in PATHS and response.status_code == 507  # no room, or nothing to let go
    assert response.status_code < 500 or is_refused, response.text
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        case.validate_response(response, checks=CHECKS)
    return response.status_code


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].path not in PATHS])
def test_no_case_breaks_it(name: str, mode: Any, tiny: Live) -> None:
    try_many(name, mode, tiny, FEW if "{" in name else COUNT)


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a state folder and an admin; its client is the admin."""
    folder = tmp_path_factory.mktemp("state")
    with live_server(num_blocks=64, state_dir=str(folder), api_key=("alice:user-key",), admin_key="admin-key") as live:
        live.http.headers.update(ADMIN)
        yield live


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].path in PATHS])
@pytest.mark.parametrize("count", [FEW, pytest.param(LONG_COUNT // 10, marks=LONG)])
def test_no_case_breaks_the_operators_calls(name: str, mode: Any, operated: Live, count: int) -> None:
    try_many(name, mode, operated, count, ADMIN)


def test_the_state_plane_is_well_afterwards(operated: Live) -> None:
    assert_alive(operated.server)
    assert operated.ask("/state/verify", {}).json()["ok"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name.startswith("post") and OPERATIONS[name].path not in PATHS]
)
def test_no_case_of_many_breaks_it(name: str, mode: Any, tiny: Live) -> None:
    try_many(name, mode, tiny, LONG_COUNT)
    assert_alive(tiny.server)


def test_it_is_well_afterwards(tiny: Live) -> None:
    assert_alive(tiny.server)
