"""Grammars: compiled off the engine's thread, followed token by token, told to the sampler as bitmasks.

What it is: the seam to llguidance. What it knows nothing about: schedules, HTTP, logits.
How a caller uses it, from the thread that drives the engine or any other:

    future = engine.parts.grammars.prepare(params.grammar, namespace)   # at once; done already where it is known
    future.add_done_callback(...)  or  future.done()         # a compilation takes about 0.2 s, 2 CPU seconds at most
    future.exception()                                       # None, or the NanoVLLMError to refuse the request with
    engine.add_request(prompt, params)                       # finds it compiled; where it is not, compiles and waits

The future cannot be cancelled: others may wait for the same one. `CompiledGrammar.start` gives
a sequence its own `Constraint`. Invariants: a grammar that came through `prepare` was built in a
disposable process first (grammar_check.py says why); at most two of one namespace are compiled at once, and
nobody waits behind all of another's; 64 are kept, each for its own namespace, so that how long a compilation
takes tells nothing about others.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanovllm.core.grammar import Grammar
from nanovllm.engine.grammar_check import ByteVocabulary, build, check
from nanovllm.engine.turns import Turns
from nanovllm.errors import BusyError, ExecutionError, InvalidRequestError, NanoVLLMError, UnsupportedParameterError

MAX_AT_ONCE, MAX_EACH = 3, 2  # compilations, of all and of one namespace
MAX_WAITING, MAX_KEPT, MAX_SHOWN = 64, 64, 300
Key = tuple[str, Grammar]  # the namespace first
Mask = NDArray[np.uint32]


class Vocabulary(Protocol):
    """The part of a tokenizer this module needs."""

    eos_token_id: int | None
    special_ids: frozenset[int]

    def vocabulary(self) -> str | list[bytes]:
        """The JSON of a `tokenizers.Tokenizer`, or the bytes of each token."""
        ...


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """True where nothing can follow."""
        return self._matcher.is_stopped()

    def mask(self) -> Mask:
        """One bit for each token of the vocabulary, set where the token may come next: bit i % 32 of word i // 32."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InvalidRequestError("The grammar became too complex at this text.", param="grammar")
        return np.frombuffer(bits, np.uint32)

    def allows(self, token_id: int) -> bool:
        """Whether `accept` would take this token."""
        return not self.is_complete and self._matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """The sequence goes on with this token. Raises ExecutionError where the grammar does not allow it."""
        if not self._matcher.consume_token(token_id):
            raise ExecutionError("A token was chosen that the grammar does not allow.")


class CompiledGrammar:
    """A grammar for one tokenizer, at its beginning."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Constraint:
        """A sequence's own constraint; a copy takes microseconds."""
        return Constraint(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles for one engine's tokenizer, and keeps what was used last."""

    def __init__(self, tokenizer: Vocabulary, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._tokenizer, self._eos_token_ids, self._vocab_size = tokenizer, eos_token_ids, vocab_size
        self._kept: OrderedDict[Key, Future[CompiledGrammar]] = OrderedDict()
        self._turns = Turns(MAX_AT_ONCE, MAX_EACH, "grammar")
        self._lock, self._tokenizer_lock = threading.Lock(), threading.Lock()
        self._ll_tokenizer: Any = None

    def prepare(self, grammar: Grammar, namespace: str = "") -> Future[CompiledGrammar]:
        """The compiled grammar, or the NanoVLLMError that it deserves, when there is one. Any thread may call this.

        Raises BusyError where too many of this namespace wait.
        """
        key = namespace, grammar
        with self._lock:
            future = self._kept.get(key)
            if future is None:
                if self._turns.num_waiting(namespace) >= MAX_WAITING:  # of clients that left, perhaps
                    raise BusyError("Too many grammars wait to be compiled.", hint="Try again later.")
                future = Future()
                future.set_running_or_notify_cancel()
                self._turns.submit(namespace, partial(self._compile_into, future, key))  # once closed: nothing is kept
                self._kept[key] = future
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return future

    def compiled(self, grammar: Grammar, namespace: str = "") -> CompiledGrammar:
        """The same, waited for. Raises what is wrong with the grammar."""
        return self.prepare(grammar, namespace).result()

    def close(self) -> None:
        """No more compilations; those under way end by themselves."""
        self._turns.close()

    def _compile_into(self, future: Future[CompiledGrammar], key: Key) -> None:
        try:
            future.set_result(self._compile(key[1]))
        except BaseException as error:  # noqa: BLE001  whatever it is, a panic of llguidance too: somebody waits for it
            with self._lock:
                if self._kept.get(key) is future:  # the next request may find the machine less busy
                    del self._kept[key]
            failure = error if isinstance(error, NanoVLLMError) else ExecutionError("The grammar's compiler failed.")
            failure.__cause__ = None if failure is error else error
            future.set_exception(failure)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        if importlib.util.find_spec("llguidance") is None:
            raise UnsupportedParameterError(
                "Grammars need a package that is not installed.",
                param="grammar",
                hint="Run: pip install 'nano-vllm-hust[grammar]'",
            )
        wrong = check(grammar.kind, grammar.text)
        if wrong is not None:
            raise _refusal(wrong)
        with self._tokenizer_lock:
            self._ll_tokenizer = self._ll_tokenizer or self._built_tokenizer()
        try:
            return CompiledGrammar(build(self._ll_tokenizer, grammar.kind, grammar.text))
        except ValueError as wrong_here:  # fine for bytes, too much for this vocabulary
            raise _refusal(str(wrong_here)) from wrong_here

    def _built_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        vocabulary, eos = self._tokenizer.vocabulary(), list(self._eos_token_ids)
        if not eos and self._tokenizer.eos_token_id is not None:
            eos = [self._tokenizer.eos_token_id]
        if isinstance(vocabulary, list):
            tokens = vocabulary + [b""] * (self._vocab_size - len(vocabulary))
            return LLTokenizer(ByteVocabulary(tokens, sorted(self._tokenizer.special_ids), eos[0]), eos_token=eos)
        try:
            return LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=eos)
        except ValueError as error:
            raise UnsupportedParameterError("This model's tokenizer allows no grammars.", param="grammar") from error


def _refusal(wrong: str) -> InvalidRequestError:
    return InvalidRequestError(f"The grammar is refused: {' '.join(wrong.split())[:MAX_SHOWN]}", param="grammar")
