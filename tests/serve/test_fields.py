"""What fields mean: honoured, refused, or taken from the model's own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.errors import InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from nanovllm.models.chat_tokenizer import ChatTokenizer
from nanovllm.serve.config import Limits
from nanovllm.serve.conversation import conversation, template_variables
from nanovllm.serve.decode import decode
from nanovllm.serve.defaults import generation_defaults
from nanovllm.serve.fields import check_model, priority_of, sampling_params, streaming_of
from nanovllm.serve.logprobs import token_bytes
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.tools import ToolStyle
from tests.serve.surface import Live

HONOURED = {
    "min_tokens": 2,
    "ignore_eos": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "n": 2,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.1,
    "logit_bias": {1: 2.0},
    "stop_token_ids": (5,),
    "stop": ("a",),
    "seed": 9,
}


def services(defaults: dict | None = None, policy: str = "fcfs", names: tuple[str, ...] = ()) -> Any:
    engine = SimpleNamespace(config=SimpleNamespace(policy=policy, model="m"))
    config = SimpleNamespace(served_model_name=names)
    return SimpleNamespace(engine=engine, config=config, limits=Limits(), generation_defaults=defaults or {})


def body(**fields: object) -> ChatRequest:
    return decode(json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode(), ChatRequest, 64)


def params_of(request: ChatRequest, parts: Any) -> Any:
    return sampling_params(request, parts, max_tokens=request.max_tokens, logprobs=None, grammar=None)


@pytest.mark.parametrize("name", HONOURED)
def test_each_field_reaches_the_engine(name: str) -> None:
    params = params_of(body(**{name: HONOURED[name]}), services())
    assert getattr(params, name) == HONOURED[name]
    assert getattr(params, name) != getattr(params_of(body(), services()), name)


def test_defaults_are_the_requests_then_the_models_then_openais() -> None:
    model = {"temperature": 0.6, "top_k": 20}
    assert params_of(body(), services()).temperature == 1.0
    assert params_of(body(), services()).max_tokens is None
    assert params_of(body(), services(model)).temperature == 0.6
    mixed = params_of(body(temperature=0.1), services(model))
    assert (mixed.temperature, mixed.top_k) == (0.1, 20)


@pytest.mark.parametrize(("seed", "taken"), [(0, 0), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1)])
def test_seeds(seed: int, taken: int) -> None:
    assert params_of(body(seed=seed), services()).seed == taken


@pytest.mark.parametrize("fields", [{"seed": 2**64}, {"min_tokens": 5, "max_tokens": 4}, {"stop": "x" * 257}])
def test_what_only_the_whole_tells(fields: dict) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params_of(body(**fields), services())
    assert caught.value.param == next(iter(fields))


def test_limits_may_be_tighter_than_the_protocol() -> None:
    parts = services()
    parts.limits = Limits(n=2, stop=1)
    for fields in ({"n": 3}, {"stop": ["a", "b"]}):
        with pytest.raises(InvalidRequestError, match="limit"):
            params_of(body(**fields), parts)


def test_models_have_names_and_aliases() -> None:
    assert check_model(None, services()) == "m"
    parts = services(names=("a", "b"))
    assert [check_model(name, parts) for name in (None, "a", "b")] == ["a", "a", "b"]
    for name in ("m", "", "A"):
        with pytest.raises(ModelNotFoundError):
            check_model(name, parts)


def test_priority_needs_its_policy() -> None:
    assert priority_of(body(priority=-3), services(policy="priority")) == -3
    assert priority_of(body(priority=0), services()) == 0
    with pytest.raises(UnsupportedParameterError):
        priority_of(body(priority=1), services())


def test_stream_options_need_a_stream() -> None:
    assert streaming_of(body(stream=True, stream_options={"include_usage": True})).has_usage
    with pytest.raises(InvalidRequestError, match="stream_options"):
        streaming_of(body(stream_options={"include_usage": True}))


def test_only_listed_variables_that_the_template_uses() -> None:
    template = "{% if enable_thinking %}{{ documents }}{% endif %}{{ tokenize }}{{ messages }}"
    assert template_variables({"enable_thinking": False}, None, template) == {"enable_thinking": False}
    for name, value in {"tokenize": True, "chat_template": "x", "messages": [], "thinking": True, "tools": []}.items():
        with pytest.raises(UnsupportedParameterError) as caught:
            template_variables({name: value}, None, template)
        assert caught.value.param == f"chat_template_kwargs.{name}"
    with pytest.raises(InvalidRequestError):
        template_variables({"enable_thinking": [1]}, None, template)
    with pytest.raises(UnsupportedParameterError, match="reasoning_effort"):
        template_variables(None, "high", template)
    assert template_variables(None, "high", "{{ reasoning_effort }}") == {"reasoning_effort": "high"}


def test_developers_speak_as_the_system_unless_the_template_knows_them() -> None:
    messages = body(messages=[{"role": "developer", "content": "x"}]).messages
    style = ToolStyle("hermes", is_native=False)
    assert conversation(messages, (), style, "", {}).messages[0]["role"] == "system"
    assert conversation(messages, (), style, "{{ 'developer' }}", {}).messages[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"top_p": 0.9, "top_k": 20, "eos_token_id": 2}', {"top_p": 0.9, "top_k": 20}),
        ('{"temperature": null}', {}),
        ('{"temperature": "hot"}', {}),
        ("not json", {}),
    ],
)
def test_generation_config(tmp_path: Path, text: str, taken: dict) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert generation_defaults(str(tmp_path), "auto") == taken
    assert generation_defaults(str(tmp_path), "none") == {}


def test_generation_config_is_absent_from_most(tmp_path: Path) -> None:
    assert generation_defaults(str(tmp_path), "auto") == {} == generation_defaults("tiny:random", "auto")


def test_token_bytes_join_to_the_text(smollm2: Live) -> None:
    tokenizer: ChatTokenizer = smollm2.services.engine.tokenizer
    text = "naïve café — 日本語 🎉"
    ids = tokenizer.encode(text)
    assert bytes(byte for i in ids for byte in token_bytes(tokenizer, i)).decode() == text
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # so it is not the texts that join


def test_names_over_http(smollm2: Live) -> None:
    assert [one["id"] for one in smollm2.http.get("/v1/models").json()["data"]] == ["smollm2", "smol"]
    assert smollm2.http.get("/v1/models/smol").json()["max_model_len"] == 2048
    missing = smollm2.http.get("/v1/models/some/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    wrong = smollm2.chat(model="gpt-4")
    assert wrong.status_code == 404 and wrong.json()["error"]["param"] == "model"
    assert smollm2.chat(model="smol", max_tokens=1).json()["model"] == "smol"
