"""Attacks 31 and 32: what one tenant asked, another can neither measure nor name.

The exact side channel is work: how many prompt tokens the engine computed. Its shadow is time, which is
measured in the long test, by the two-sample Kolmogorov-Smirnov statistic.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_right
from collections.abc import Callable

import pytest

from tests.serve.servers import LiveServer, assert_alive, until

Factory = Callable[..., LiveServer]
KEYS = {"api_key": ("alice:key-a", "bob:key-b")}
KS_PROMPTS = 200
KS_AT_1_PERCENT = 1.628  # sqrt(-ln(0.01 / 2) / 2): critical distance times sqrt(n m / (n + m))


def computed(live: LiveServer, key: str, prompt: list[int], **more: object) -> int:
    """Prompt tokens that the engine computed for one request."""
    engine = live.services.engine
    until(lambda: engine.num_live == 0, "something else runs")
    before = engine.stats.prefill_tokens
    answer = live.complete(prompt, {"Authorization": f"Bearer {key}"}, max_tokens=1, **more)
    assert answer.status == 200, answer.body
    return engine.stats.prefill_tokens - before


def prompt_of(number: int, length: int = 200) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(1, 200) for _ in range(length)]


def test_another_tenants_prompt_costs_as_much_as_a_new_one(server: Factory) -> None:
    live = server(**KEYS)
    for number in range(20):
        prompt = prompt_of(number)
        assert computed(live, "key-a", prompt) == 200
        assert computed(live, "key-b", prompt) == 200, "Bob can tell what Alice asked"
        assert computed(live, "key-a", prompt) < 20 and computed(live, "key-b", prompt) < 20
    assert_alive(live)


def test_a_salt_is_as_good_as_a_tenant(server: Factory) -> None:
    live = server(**KEYS)
    prompt = prompt_of(1000)
    assert [computed(live, "key-a", prompt, cache_salt=salt) for salt in "xyx"][:2] == [200, 200]
    assert computed(live, "key-a", prompt, cache_salt="x") < 20
    assert computed(live, "key-b", prompt, cache_salt="x") == 200


def test_an_eviction_by_one_tenant_tells_no_prompt_of_another(fresh_server: Factory) -> None:
    """With the pool full of Alice's blocks Bob pays in full for hers and for new ones alike."""
    live = fresh_server(**KEYS, num_blocks=40)
    for number in range(10):
        computed(live, "key-a", prompt_of(number))
    costs = {computed(live, "key-b", prompt_of(number)) for number in (*range(10), *range(100, 110))}
    assert costs == {200}
    assert_alive(live)


@pytest.mark.long
def test_time_to_first_token_tells_no_more_than_a_new_prompt(fresh_server: Factory) -> None:
    """Cross-tenant and new prompts: one distribution (p > 0.01; of two tries, as one in a hundred fails by chance)."""
    live = fresh_server(**KEYS, kv_memory="64MiB")
    seconds_of(live, 0, KS_PROMPTS // 10)  # warm
    for attempt in (1, 2):
        new, foreign, own = seconds_of(live, attempt * 10**6, KS_PROMPTS)
        assert distance(new, own) > critical(KS_PROMPTS), "a hit does not show: the test would see nothing"
        if distance(new, foreign) <= critical(KS_PROMPTS):
            return
    raise AssertionError(f"distance {distance(new, foreign):.3f}, critical {critical(KS_PROMPTS):.3f}")


def seconds_of(live: LiveServer, first: int, count: int) -> tuple[list[float], list[float], list[float]]:
    """Bob's times for new prompts and for Alice's, in random order, and Alice's for her own once more."""
    rng = random.Random(first)
    new, foreign, own = [], [], []
    for number in range(first, first + 2 * count, 2):
        hers = prompt_of(number, 1000)
        seconds(live, "key-a", hers)
        asked = [(new, prompt_of(number + 1, 1000)), (foreign, hers)]
        rng.shuffle(asked)
        for times, prompt in asked:
            times.append(seconds(live, "key-b", prompt))
        own.append(seconds(live, "key-a", hers))
    return new, foreign, own


def seconds(live: LiveServer, key: str, prompt: list[int]) -> float:
    start_s = time.perf_counter()
    assert live.complete(prompt, {"Authorization": f"Bearer {key}"}, max_tokens=1).status == 200
    return time.perf_counter() - start_s


def distance(first: list[float], second: list[float]) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two empirical distribution functions."""
    one, two = sorted(first), sorted(second)
    return max(abs(bisect_right(one, x) / len(one) - bisect_right(two, x) / len(two)) for x in one + two)


def critical(count: int) -> float:
    """The distance that two samples of `count` from one distribution exceed once in a hundred times."""
    return KS_AT_1_PERCENT * math.sqrt(2 / count)


def test_the_statistic_itself() -> None:
    rng = random.Random(5)
    sample = [[rng.gauss(mean, 1) for _ in range(KS_PROMPTS)] for mean in (0, 0, 1)]
    assert distance(sample[0], sample[1]) < critical(KS_PROMPTS) < distance(sample[0], sample[2])
    assert distance([1, 2], [3, 4]) == 1 and distance([1, 2], [1, 2]) == 0
    assert math.isclose(KS_AT_1_PERCENT, math.sqrt(-math.log(0.01 / 2) / 2), rel_tol=1e-3)


# -- attack 32: nothing is looked up by a name that could be guessed ---------------------------------


def test_no_id_of_an_answer_opens_anything(server: Factory) -> None:
    """An id is for logs: with the owner's key, another's or none, there is nothing at it."""
    live = server(**KEYS)
    answer = live.complete(headers={"Authorization": "Bearer key-a", "X-Request-Id": "mine"})
    ids = [answer.json["id"], "mine", "req-1", "../metrics"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/state/sessions", "/v1/files"):
        for one in ids:
            for key in ("key-a", "key-b"):
                status = live.get(f"{path}/{one}", Authorization=f"Bearer {key}").status
                assert status == (403 if path.startswith("/state") else 404)  # state is the admin's, whatever is there
            assert live.get(f"{path}/{one}", Authorization="Bearer none").status == 401


def test_ids_of_answers_cannot_be_guessed(server: Factory) -> None:
    live = server()
    ids = [live.complete().json["id"].partition("-")[2] for _ in range(20)]
    assert len(set(ids)) == 20 and all(len(bytes.fromhex(one)) == 16 for one in ids)
