"""Keys that share their KV: texts, sessions and room stay each key's own, and a deletion takes its KV along."""

from __future__ import annotations

import pytest
from openai import APIStatusError

from tests.serve.openai_clients import Clients, ask, clients
from tests.serve.servers import running, thread_only, until
from tests.serve.test_turn_store import lies_anywhere, store_of

__all__ = ["clients"]  # a fixture
KEYS = ("alice:key-a", "bob:key-b")
OPENING = "the blue heron nests behind the old mill, and nobody knows since when. "


@thread_only("it looks into the engine's store")
def test_a_key_deletes_its_own_of_what_all_share(clients: Clients) -> None:
    with running(num_blocks=256, api_key=KEYS, share_prefix=True, state_host_memory="8MiB") as live:
        alice, bob = clients(live, "key-a"), clients(live, "key-b")
        talk = alice.conversations.create()
        mine = [ask(alice, OPENING + "Alice asks."), ask(alice, "Alice goes on.", conversation=talk.id)]
        yours = ask(bob, OPENING + "Bob asks.")
        objects = {obj.name: obj for obj in store_of(live).ls(kind="session")}
        chains = [objects[response.id].chain for response in mine]
        shared = set(chains[0]) & set(objects[yours.id].chain)
        assert shared and all(lies_anywhere(live, chain[-1:]) for chain in chains), "one namespace for all KV"
        for response in mine:
            alice.responses.delete(response.id)
        alice.conversations.delete(talk.id)
        for chain in chains:
            alone = tuple(digest for digest in chain if digest not in shared)
            assert alone
            until(lambda alone=alone: not lies_anywhere(live, alone), "what only it owned goes")
        assert all(lies_anywhere(live, (digest,)) for digest in shared), "bob's conversation begins with it, too"
        for ai in (alice, bob):
            said = {"messages": [{"role": "user", "content": OPENING}], "extra_body": {"session_id": "talk"}}
            ai.chat.completions.create(model="tiny:random", max_tokens=2, **said)
        hints = [obj for obj in store_of(live).ls(kind="session") if obj.is_hint]
        assert len({obj.namespace for obj in hints}) == 2 and {obj.name for obj in hints} == {"talk"}


def test_one_key_fills_its_share_and_no_more(clients: Clients) -> None:
    """Without a folder: the others find room, and a turn that would find none is refused before it is computed."""
    with running(num_blocks=256, api_key=KEYS, state_host_memory="1MiB") as live:
        alice, bob = clients(live, "key-a"), clients(live, "key-b")
        item = {"type": "message", "role": "user", "content": "x" * 20_000}
        with pytest.raises(APIStatusError) as full:
            for _ in range(100):
                alice.conversations.create(items=[item])
        assert full.value.status_code == 507
        before = live.services.engine.stats.prefill_tokens
        with pytest.raises(APIStatusError) as refused:
            ask(alice, "x" * 400)
        assert (refused.value.status_code, refused.value.code) == (507, "session_quota")
        assert "room for" in str(refused.value)
        assert live.services.engine.stats.prefill_tokens == before
        kept = ask(bob, "And me?")
        assert bob.responses.retrieve(kept.id).id == kept.id and ask(alice, "Not kept.", store=False).id


@thread_only("it looks into the engine's store")
def test_a_quota_flag_has_no_ceiling_beneath_it() -> None:
    with running(num_blocks=64, max_tenant_sessions=20_000, max_tenant_session_bytes=2 << 30) as live:
        settings = store_of(live).plane.settings
        assert (settings.objects_per_namespace, settings.text_bytes_per_namespace) == (20_000, 2 << 30)
