"""A conversation with an engine here that survives the process: `nanovllm chat --session NAME`.

What it is: answers of a local engine whose history lies in its state store, as one session object. What it knows
nothing about: terminals, HTTP. Invariants: what was seen is kept before the next line is read; the object is the
one that a server's conversation of that name is; the prompt goes on in the tokens that were computed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanovllm.cli.chat_answers import LocalAnswers
from nanovllm.cli.flags import Setup
from nanovllm.cli.session import interruptible
from nanovllm.core.cache_dir import cache_dir
from nanovllm.core.sampling_params import SamplingParams
from nanovllm.errors import InvalidRequestError, StateNotFoundError
from nanovllm.serve.items import CONVERSATION, RESERVED, is_turn, message_item, text_of
from nanovllm.state.objects import DEFAULT_NAMESPACE, Session, check_name

if TYPE_CHECKING:
    from nanovllm.engine.outputs import RequestOutput, StepOutput
    from nanovllm.llm import LLM

KIND = "session"


def check_session(name: str) -> str:
    """Raise InvalidRequestError for a name that no conversation can have."""
    if name.startswith(RESERVED):
        raise InvalidRequestError(
            f"A session's name does not begin with {' or '.join(RESERVED)}.",
            param="session",
            hint="Ids do: choose another name.",
        )
    return check_name(name, "session")


def kept_setup(model: str, setup: Setup) -> Setup:
    """The setup with a folder that survives: the one that was named, else `sessions` in the cache."""
    if setup.engine_config(model).state_dir is not None:
        return setup
    return replace(setup, settings={**setup.settings, "state_dir": str(cache_dir() / "sessions")})


class KeptAnswers(LocalAnswers):
    """Answers of an engine in this process, kept under a name."""

    def __init__(self, llm: LLM, sampling: SamplingParams, knowledge: Sequence[str], name: str) -> None:
        super().__init__(llm, sampling, knowledge)
        self._name = name
        self._state_id: str | None = None
        self._items: list[Any] = []
        self._known: list[int] = []
        self._metadata: Mapping[str, str] = {}  # a server's client's
        self._prompt: list[int] = []
        self._made: list[int] = []
        self._final: RequestOutput | None = None
        self._find()

    def history(self) -> list[dict[str, Any]]:
        """What was said before."""
        return [{"role": item["role"], "content": text_of(item)} for item in self._items]

    def opening(self) -> str:
        """What was found of it, for a person."""
        folder = self._llm.config.state_dir
        if not self._items:
            return f"Session {self._name} is new; it is kept in {folder}."
        return f"Session {self._name} goes on: {len(self._items)} messages, {len(self._known)} tokens, in {folder}."

    def stream(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """As any answer; its prompt begins with the tokens of the last one, where documents do not come first."""
        self._prompt, self._made, self._final = [], [], None
        with interruptible(self._llm):
            for output in self._begun(messages):
                self._made += output.token_ids
                yield output.text
                self._final = output.final
        self._last = self._final

    def _begun(self, messages: list[dict[str, Any]]) -> Iterator[StepOutput]:
        if self._knowledge:
            return self._llm.stream(messages, self._sampling, knowledge=self._knowledge)
        self._prompt = self._llm.tokenizer.extend_chat(self._known, messages)
        return self._llm.stream(self._prompt, self._sampling)

    def keep(self, said: Sequence[dict[str, Any]]) -> str | None:
        """Store these messages behind what is there, durably; how much of the history was found."""
        self._items += [message_item(message["role"], message["content"]) for message in said]
        prompt = self._prompt if self._final is None else self._final.prompt_token_ids
        self._known = [*prompt, *self._made] if prompt else []  # of a stopped answer with documents it is not known
        session = Session(self._items, self._known, {"object": CONVERSATION, "metadata": self._metadata})
        if self._state_id is None:
            metadata = {"kind": KIND, "name": self._name}
            self._state_id = str(self._llm.state_store.put(session, metadata))
        else:
            self._llm.state_store.update(self._state_id, session)
        return None if self._final is None else found_of(self._final.prompt_len, self._final.hit_tokens_by_tier)

    def forget(self) -> None:
        """The session begins anew: what was kept is dropped."""
        super().forget()
        if self._state_id is not None:
            self._llm.state_store.drop(self._state_id)
        self._state_id, self._items, self._known, self._metadata = None, [], [], {}

    def _find(self) -> None:
        store = self._llm.state_store
        try:
            obj = store.find(self._name, DEFAULT_NAMESPACE, KIND)
        except StateNotFoundError:
            return
        session = store.get(obj.state_id)
        if not isinstance(session, Session) or not is_turn(session, CONVERSATION):
            raise InvalidRequestError(
                f"{self._name} is kept here, but is no conversation.",
                param="session",
                hint=f"Choose another name; `nanovllm state show {self._name}` tells what it is.",
            )
        if any(item["type"] != "message" for item in session.messages):
            raise InvalidRequestError(
                f"Session {self._name} has calls of functions, which chat does not know.",
                param="session",
                hint="Choose another name, or go on with it through /v1/responses of a server.",
            )
        vocabulary = self._llm.tokenizer.vocab_size  # another model's tokens may be none of this one's
        known = [*session.token_ids] if max(session.token_ids, default=0) < vocabulary else []
        self._state_id, self._items, self._known = obj.state_id, [*session.messages], known
        self._metadata = session.facts.get("metadata", {})


def found_of(prompt: int, tiers: dict[str, int]) -> str:
    """How much of a prompt was found, and where."""
    where = ", ".join(f"{tier} {tokens}" for tier, tokens in tiers.items() if tokens)
    return f"{sum(tiers.values())} of {prompt} prompt tokens were cached{f' ({where})' if where else ''}."
