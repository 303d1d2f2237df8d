"""Two keys and an operator upload, ask and remove in any order: each sees its own documents and the public ones."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.serve.servers import assert_at_rest, running
from tests.serve.test_knowledge import ADMIN, ALICE, BOB, KEYS, PATH, ask

BASE = 40
WHO = {"alice": ALICE, "bob": BOB, "public": ADMIN}
Versions = dict[str | None, int]  # version -> length of its text, the newest last


class Tenants(RuleBasedStateMachine):
    """Every text has a length of its own, and the tokenizer is one of bytes: a prompt's length says what is in it."""

    names = st.sampled_from(["x", "y"])
    versions = st.sampled_from([None, "1", "2"])
    share_prefix = False

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.live = self.stack.enter_context(running(num_blocks=512, share_prefix=self.share_prefix, **KEYS))
        self.live.headers = {}
        self.kept: dict[tuple[str, str], Versions] = {}
        self.count = 0
        self.empty = self.ask_for("alice", []) + len("\n\n")

    def ask_for(self, who: str, names: list[str]) -> int:
        """Tokens of the prompt."""
        body = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "?"}], "max_tokens": 1}
        answer = ask(self.live, *names, headers=WHO[who], **body)
        assert answer.status == 200, answer.body
        tokens: int = answer.json["usage"]["prompt_tokens"]
        return tokens

    @rule(where=st.sampled_from(list(WHO)), name=names, version=versions, wait=st.booleans())
    def upload(self, where: str, name: str, version: str | None, wait: bool) -> None:
        self.count += 1
        text = where[0] * (BASE + self.count)
        scope = "public" if where == "public" else "own"
        body = {"text": text, "name": name, "version": version, "scope": scope, "wait": wait}
        answer = self.live.ask("POST", PATH, body, WHO[where])
        assert answer.status == 200, answer.body
        versions = self.kept.setdefault((where, name), {})
        versions.pop(version, None)
        versions[version] = len(text)

    @rule(who=st.sampled_from(["alice", "bob"]), name=names, version=st.none() | versions)
    def ask(self, who: str, name: str, version: str | None) -> None:
        """One's own goes before a public one, by the name that was asked for."""
        asked = name if version is None else f"{name}@{version}"
        found = [
            versions if version is None else {version: versions[version]}
            for where in (who, "public")
            if (versions := self.kept.get((where, name), {})) and (version is None or version in versions)
        ]
        if not found:
            assert ask(self.live, asked, headers=WHO[who]).status == 404
            return
        assert self.ask_for(who, [asked]) - self.empty == list(found[0].values())[-1]

    @rule(who=st.sampled_from(["alice", "bob"]), names=st.lists(names, min_size=2, max_size=3))
    def ask_for_several(self, who: str, names: list[str]) -> None:
        newest = {name: self.kept.get((who, name)) or self.kept.get(("public", name)) for name in names}
        if all(newest.values()):
            expected = sum(list(versions.values())[-1] + len("\n\n") for versions in newest.values() if versions)
            assert self.ask_for(who, names) - self.empty == expected - len("\n\n")

    @rule(where=st.sampled_from(list(WHO)), name=names, version=st.none() | versions)
    def remove(self, where: str, name: str, version: str | None) -> None:
        query = "?scope=public" if where == "public" else ""
        asked = name if version is None else f"{name}@{version}"
        status = self.live.ask("DELETE", f"{PATH}/{asked}{query}", headers=WHO[where]).status
        versions = self.kept.get((where, name), {})
        gone = list(versions) if version is None else [v for v in versions if v == version]
        assert status == (200 if gone else 404)
        for each in gone:
            del versions[each]

    @invariant()
    def each_lists_its_own_and_the_public_ones(self) -> None:
        for who in ("alice", "bob") if hasattr(self, "live") else ():
            listed = self.live.ask("GET", f"{PATH}?limit=100", headers=WHO[who]).json["documents"]
            seen = {(doc["scope"], doc["name"], doc["version"]) for doc in listed}
            kept = {
                ("own" if where == who else "public", name, version)
                for (where, name), versions in self.kept.items()
                for version in versions
                if where in (who, "public")
            }
            assert seen == kept and len(listed) == len(kept)

    def teardown(self) -> None:
        if hasattr(self, "live"):
            assert_at_rest(self.live)
            self.stack.close()


class SharingTenants(Tenants):
    """The same where prompts of public documents have one namespace."""

    share_prefix = True


for machine in (Tenants, SharingTenants):
    machine.TestCase.settings = settings(max_examples=4, stateful_step_count=16, deadline=None)
TestTenants, TestSharingTenants = Tenants.TestCase, SharingTenants.TestCase
