"""What students might hand in: a state counter and a probe, from the documented events alone."""

from __future__ import annotations

COUNTER = '''
class Counter:
    """Live requests and blocks in use, from request and step records."""

    def __init__(self):
        self.live, self.most, self.used, self.requests, self.area = set(), 0, 0, 0, 0
        self.first = self.last = None

    def on_event(self, event):
        if event.get("record") == "header":
            self.header = event
        if event.get("record") == "step":
            self.used = max(self.used, self.header["num_blocks"] - event["free_blocks"])
        at = event.get("ts_ns") if event.get("record") in (None, "step") else None
        if at is not None:
            if self.first is None:
                self.first = self.last = at
            self.area += len(self.live) * (at - self.last)
            self.last = at
        stage = event.get("stage")
        self.requests += stage == "entered"
        if stage == "scheduled":
            self.live.add(event["request_id"])
        elif stage in ("preempted", "output_complete", "state_released"):
            self.live.discard(event["request_id"])
        self.most = max(self.most, len(self.live))

    def report(self):
        return {
            "kind": "state_counter",
            "live_requests_max": self.most,
            "live_requests_mean": self.area / (self.last - self.first),
            "used_blocks_max": self.used,
            "requests": self.requests,
        }
'''

PROBE = '''
class Probe:
    """Prompt tokens whose blocks had been seen as a prefix. It changes nothing."""

    def __init__(self):
        self.seen, self.tokens, self.overlap, self.size = set(), 0, 0, 16

    def on_event(self, event):
        if event.get("record") == "header":
            self.size = event["block_size"]
        if event.get("record") == "prompt":
            tokens = event["token_ids"]
            chain = [tuple(tokens[:end]) for end in range(self.size, len(tokens) + 1, self.size)]
            matchable = chain[: (len(tokens) - 1) // self.size]
            hits = next((i for i, block in enumerate(matchable) if block not in self.seen), len(matchable))
            self.tokens, self.overlap = self.tokens + len(tokens), self.overlap + hits * self.size
            self.seen.update(chain)

    def report(self):
        return {
            "kind": "prefix_probe",
            "label": "observe-only",
            "prompt_tokens": self.tokens,
            "overlap_tokens": self.overlap,
        }
'''
