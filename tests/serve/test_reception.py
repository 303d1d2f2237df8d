"""What happens off the loop: rendering has its own deadline, texts are measured before they are tokenized."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.models.byte_tokenizer import ByteTokenizer
from nanovllm.serve.reception import check_length, check_size, longest_token, within
from tests.serve.surface import Live


def services(**parts: object) -> SimpleNamespace:
    return SimpleNamespace(engine=SimpleNamespace(info=SimpleNamespace(max_model_len=10)), longest_token=4, **parts)


def test_work_that_takes_too_long_is_the_requests_failure() -> None:
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InvalidRequestError) as caught:
            asyncio.run(within(pool, release.wait, 0.05, "messages"))
        release.set()
    assert caught.value.param == "messages" and caught.value.status == 400


def test_waiting_for_a_thread_is_not_counted() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 0.5)
        assert asyncio.run(within(pool, lambda: "done", 0.2, "messages")) == "done"


def test_what_the_work_raises_is_raised() -> None:
    def refuse() -> None:
        raise InvalidRequestError("no", param="x")

    with ThreadPoolExecutor(1) as pool, pytest.raises(InvalidRequestError, match="no"):
        asyncio.run(within(pool, refuse, 10, "messages"))


@pytest.mark.parametrize(("characters", "fits"), [(40, True), (41, False)])
def test_a_text_is_measured_before_it_is_tokenized(characters: int, fits: bool) -> None:
    if fits:
        return check_size(characters, services(), "prompt")
    with pytest.raises(ContextLengthError):
        check_size(characters, services(), "prompt")
    return None


def test_a_prompt_leaves_room_for_a_token() -> None:
    check_length(9, services(), "prompt")
    with pytest.raises(ContextLengthError):
        check_length(10, services(), "prompt")


def test_the_longest_token_is_known_once_the_model_is(tiny: Live, smollm2: Live) -> None:
    assert longest_token(ByteTokenizer()) == len("<|im_start|>") == tiny.services.longest_token
    assert 30 < smollm2.services.longest_token < 256
