"""Kind `kv`: a prefix, known by its tokens.

What it is: token ids whose KV is worth a name. What it knows nothing about: what the tokens mean.
Naming: the digest chain of its blocks; the name is an alias. Value: what prefill costs less what loading
costs. Consistency: contents name themselves, so nothing is ever out of date. Isolation: the chain's root
binds the namespace.
"""

from __future__ import annotations

from typing import ClassVar

from nanovllm.state.kinds.kind import Kind
from nanovllm.state.objects import Storable


class KV(Kind):
    """Derived, exact, disposable."""

    name: ClassVar = "kv"
    generation: ClassVar = "prefill and decode of any request"
    residency: ClassVar = "seconds to minutes; hot prefixes for hours"
    reuse: ClassVar = "the very same tokens from the prompt's start, same weights, same namespace"
    correctness: ClassVar = (
        "exact in float32 up to the rounding of differently shaped kernels; verified bytes or a miss"
    )
    transfer: ClassVar = "bytes per block over the tier's bandwidth, against T(cached, new)"
    lost: ClassVar = "T(cached, new) once"

    def accepts(self, obj: Storable) -> bool:
        """Token ids; text would need a tokenizer."""
        return isinstance(obj, list | tuple) and all(type(token) is int for token in obj)
