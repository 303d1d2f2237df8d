"""What a program can say about a run of experiment 4: drafts of explanations, the chain, the notes.

What it is: sentences chosen by figures. What it knows nothing about: files, layout.
Invariants: a sentence says no more than the figures it names; every one that stands for a
person's judgement is marked as a draft where it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.lab.experiment_4.chain import HOLDS
from nanovllm.lab.experiment_4.tables import RecordedRun
from nanovllm.lab.wording import say
from nanovllm.observe.paths import RequestPath
from nanovllm.observe.wording import Lang


def explanation(lang: Lang, tables: dict[str, Any], row: dict[str, Any]) -> str:
    """Why this row is as it is: whether its requests waited for blocks, and how many a request holds."""
    waited = sum(run["pool_waits"] for run in tables["runs"] if run["run"] in row["runs"])
    sizes = row["estimated_kv"]["per_request"]
    return say(
        lang,
        "explain_waited" if waited else "explain_free",
        blocks=" + ".join(str(size["blocks"]) for size in sizes),
        pool=tables["total_blocks"]["pool"],
        most=f"{row['live_requests']['max']:.0f}",
        concurrency=row["concurrency"]["value"],
        queue=f"{row['queue_wait']['p50']:.1f}",
        ttft=f"{row['TTFT']['p50']:.1f}",
    )


def chain_line(lang: Lang, tables: dict[str, Any]) -> str:
    """The chain with its figures, short_ctx to long_ctx."""
    links = {link["link"]: link for link in tables["chain"]["links"]}
    shown = {name: f"{link['short_ctx']:,.6g} -> {link['long_ctx']:,.6g}" for name, link in links.items()}
    residency = links["residency"]
    shown["residency"] = " -> ".join(f"{residency[case] / 2**20:.2f}" for case in ("short_ctx", "long_ctx"))
    return say(lang, "chain_line", verdict=tables["chain"]["verdict"], **shown)


def change_line(lang: Lang, one: dict[str, Any]) -> str:
    """One intervention in a sentence."""
    return say(
        lang,
        "change_line",
        case=one["case"],
        small=one["small_pool"]["num_blocks"],
        large=one["large_pool"]["num_blocks"],
        queue=f"{one['T_queue']['change']:+.1f}",
        noise=f"{one['T_queue']['same_arm']:.1f}",
        prefill=f"{one['T_prefill']['change']:+.1f}",
        bound=f"{one['prefill_bound']['ms']:.1f}",
        of=one["prefill_bound"]["of"],
        ttft=f"{one['TTFT']['change']:+.1f}",
        label=one["TTFT"]["label"],
        verdict=one["verdict"],
    )


def basis(lang: Lang, run: RecordedRun, path: RequestPath) -> dict[str, str]:
    """For each lifecycle event the records of one request that tell of it."""
    seqs = {
        stage: [event.seq for event in path.events if event.stage == stage] for stage in {e.stage for e in path.events}
    }
    file, request = f"raw/{run.planned.name}.jsonl", path.request_id
    block_size = run.replay.recording.header.block_size
    places = {"file": file, "request": request}
    decodes = seqs.get("decode_step", [])
    return {
        "prefill": say(
            lang,
            "basis_prefill",
            **places,
            scheduled=seqs["scheduled"][0],
            end=seqs["prefill_end"][0],
            blocks=-(-path.prompt_len // block_size),
        ),
        "decode": say(lang, "basis_decode", **places, first=decodes[0], last=decodes[-1], count=len(decodes)),
        "release": say(lang, "basis_release", **places, released=seqs["state_released"][0]),
        "binding": say(lang, "basis_binding", **places, count=len(path.events)),
    }


def anomalies(lang: Lang, tables: dict[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    machine, found = facts["environment"], []
    loads = [machine["load_average_before"][0], machine["load_average_after"][0]]
    if tables["label"] == "measured" and max(loads) > machine["logical_cpus"]:
        found.append(say(lang, "note_load", loads=f"{loads[0]}, {loads[1]}", cpus=machine["logical_cpus"]))
    if facts["dirty"]:
        found.append(say(lang, "note_dirty"))
    if tables["label"] == "simulated":
        found.append(say(lang, "note_simulated"))
    preemptions = sum(run["preemptions"] for run in tables["runs"])
    if preemptions:
        found.append(say(lang, "note_preemptions", count=preemptions))
    for one in (*tables["chain"]["interventions"], tables["chain"]["reverse"]):
        failed = [name for name, holds in one["tests"].items() if not holds]
        if one["is_wall"] and one["verdict"] != HOLDS:
            arms = f"{one['small_pool']['arm']}/{one['large_pool']['arm']}"
            found.append(say(lang, "note_refuted", case=one["case"], arms=arms, tests=", ".join(failed)))
    return found or [say(lang, "note_none")]
