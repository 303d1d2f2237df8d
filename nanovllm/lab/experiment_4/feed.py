"""What a student's observer is shown of one run: its recording, and the prompts' tokens where they entered.

What it is: the lines of raw/RUN.jsonl as dicts, with a `prompt` record after each `entered`.
What it knows nothing about: observers. Invariant: prompts are made again from case, size and seed, so the
feed can be repeated from a bundle alone, with no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm.lab.experiment_4.cases import PlannedRun, Size


def feed(raw: Path, planned: PlannedRun, size: Size, seed: int, vocab: int) -> Iterator[dict[str, Any]]:
    """Every record in order, from the header to `end`."""
    prompts = {
        request.request_id: [token for part in request.parts for token in part.token_ids]
        for request in size.workload(planned.case, seed, vocab).requests
    }
    with (raw / f"{planned.name}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            yield record
            if record.get("stage") == "entered":
                request_id = record["request_id"]
                place = {"request_id": request_id, "ts_ns": record["ts_ns"]}
                yield {"record": "prompt", **place, "token_ids": prompts[request_id]}
