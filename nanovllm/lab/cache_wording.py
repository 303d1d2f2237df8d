"""What `lab cache` says around its tables, in English and Chinese.

What it is: sentences with named places to fill. What it knows nothing about: who prints them. Invariants: both
languages have the same places; policies, terms and labels stay English in both.
"""

from __future__ import annotations

CACHE = {
    "cache_trace": (
        "{requests} requests, {tokens} prompt tokens (lengths /{scale}), {blocks} blocks of {block_tokens} tokens, "
        "{distinct} of them distinct",
        "{requests} 个请求，{tokens} 个 prompt token（长度 /{scale}），{blocks} 个块（每块 {block_tokens} token），"
        "其中 {distinct} 个互不相同",
    ),
    "cache_infinite": (
        "infinite cache: {hit_blocks} blocks found, {block_share}; {hit_tokens} tokens, {token_share} (simulated); "
        "prefill saved {saved} of {total} s (estimated)",
        "无限缓存：命中 {hit_blocks} 块，{block_share}；{hit_tokens} token，{token_share}（simulated）；"
        "节省 prefill {saved} 秒，共 {total} 秒（estimated）",
    ),
    "cache_hits": ("hit tokens, % of prompt tokens (simulated)", "命中 token 占 prompt token 的百分比（simulated）"),
    "cache_saved": ("saved prefill, seconds (estimated)", "节省的 prefill，秒（estimated）"),
    "cache_costs": (
        "T(cached, new) = {base} + {per_new} new + {per_pair} new (cached + new/2) ms (estimated). Each prompt is "
        "served the instant it comes: hits overstate what a busy server reuses.",
        "T(cached, new) = {base} + {per_new} new + {per_pair} new (cached + new/2) ms（estimated）。"
        "每个 prompt 一到即被服务：命中高于繁忙服务器能复用的量。",
    ),
}
