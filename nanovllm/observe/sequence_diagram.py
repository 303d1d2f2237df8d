"""A request's sequence diagram: who handed control to whom, and when, as Mermaid and as SVG.

What it is: the messages between client, queue, scheduler, prefill, decode and block pool,
with the five control transfers numbered: request entered, prefill start, decode start,
output complete, state released; beside them the life of its KV, in blocks: creation,
residency, extension, release. A block table has as many blocks as the known tokens need, so
the lengths and the block size of the recording tell its size; a shared block counts for each
that holds it. What it knows nothing about: files, other requests.
Invariants: every message stands for a record of the run and shows its time; both forms
draw the same messages; names that a caller chose cannot end a label, a tag or the document.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from nanovllm.core.events import RequestEvent
from nanovllm.observe.paths import Replay, RequestPath
from nanovllm.observe.wording import Lang, say

PARTICIPANTS = ("client", "queue", "scheduler", "prefill", "decode", "block_pool")
SHOWN_EXTENSIONS = 4
_COLUMN, _ROW, _LEFT, _TOP, _RIGHT = 150, 44, 130, 92, 210
_STYLE = (
    "text{font:13px system-ui,'Noto Sans CJK SC',sans-serif;fill:#1b1f24}.t{font-size:12px;fill:#57606a}"
    ".s{paint-order:stroke;stroke:#fff;stroke-width:4px}"
    ".h{font-weight:600}.l{stroke:#8c959f;stroke-dasharray:3 4}.m{stroke:#57606a;stroke-width:1.4;fill:none}"
    ".k{stroke:#0969da;stroke-width:2.2}.b{fill:#f6f8fa;stroke:#8c959f}.n{fill:#0969da}.w{fill:#fff;font-weight:600}"
)


@dataclass(frozen=True)
class Message:
    """Control goes from `source` to `target` at `at_ns`. `transfer` numbers the five; 0 for the others."""

    at_ns: int
    source: str
    target: str
    text: str
    seq: int
    transfer: int = 0


def messages(run: Replay, path: RequestPath, lang: Lang = "en") -> list[Message]:
    """The messages of one path, in the order of its records."""
    return _Drawer(run, path, lang).messages()


def mermaid(run: Replay, path: RequestPath, lang: Lang = "en") -> str:
    """As a Mermaid `sequenceDiagram`, which GitHub and many editors draw."""
    lines = ["sequenceDiagram", f"    title {_plain(_title(run, path, lang))}"]
    lines += [f"    participant {name} as {say(lang, name)}" for name in PARTICIPANTS]
    for message in messages(run, path, lang):
        arrow = "->>" if message.transfer else "-->>"
        number = f"({message.transfer}) " if message.transfer else ""
        text = _plain(f"{number}{message.text}, {_ms(path, message.at_ns)} ms")
        lines.append(f"    {message.source}{arrow}{message.target}: {text}")
    return "\n".join(lines) + "\n"


def svg(run: Replay, path: RequestPath, lang: Lang = "en") -> str:
    """As a picture that needs nothing but itself. Rows are in order and not to scale; their times stand at the left."""
    found = messages(run, path, lang)
    width, height = _LEFT + _COLUMN * len(PARTICIPANTS) + _RIGHT, _TOP + _ROW * len(found) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="a" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0L9 4L0 8z" fill="#57606a"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="h" x="16" y="26">{_xml(_title(run, path, lang))}</text>',
    ]
    for index, name in enumerate(PARTICIPANTS):
        parts += _lifeline(index, say(lang, name), height)
    for row, message in enumerate(found):
        parts += _arrow(path, message, _TOP + _ROW * row + 30)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lifeline(index: int, title: str, height: int) -> list[str]:
    x = _LEFT + _COLUMN * index + _COLUMN // 2
    return [
        f'<line class="l" x1="{x}" y1="72" x2="{x}" y2="{height - 12}"/>',
        f'<rect class="b" x="{x - 56}" y="44" width="112" height="28" rx="6"/>',
        f'<text class="h" x="{x}" y="63" text-anchor="middle">{_xml(title)}</text>',
    ]


def _arrow(path: RequestPath, message: Message, y: int) -> list[str]:
    start, end = (
        _LEFT + _COLUMN * PARTICIPANTS.index(name) + _COLUMN // 2 for name in (message.source, message.target)
    )
    kind = "m k" if message.transfer else "m"
    left = min(start, end)
    badge = [
        f'<circle class="n" cx="{left + 14}" cy="{y - 12}" r="9"/>',
        f'<text class="w" x="{left + 14}" y="{y - 8}" text-anchor="middle" style="fill:#fff">{message.transfer}</text>',
    ]
    text_x = left + (28 if message.transfer else 8)
    return [
        f'<text class="t" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{_ms(path, message.at_ns)} ms</text>',
        f'<line class="{kind}" x1="{start}" y1="{y}" x2="{end}" y2="{y}" marker-end="url(#a)"/>',
        f'<text class="s" x="{text_x}" y="{y - 7}">{_xml(message.text)}</text>',
        *(badge if message.transfer else []),
    ]


class _Drawer:
    """Collects the messages of one path. `held`: the blocks of its table now."""

    def __init__(self, run: Replay, path: RequestPath, lang: Lang) -> None:
        self.run, self.path, self.lang = run, path, lang
        self.found: list[Message] = []
        self.decodes: list[RequestEvent] = []  # steps in a row, not told yet
        self.decoding = False
        self.held = 0

    def messages(self) -> list[Message]:
        for event in self.path.events:
            if event.stage == "decode_step":
                self.decodes.append(event)
                continue
            self._tell_decodes()
            getattr(self, f"_on_{event.stage}", self._nothing)(event)
        self._tell_decodes()
        return self.found

    def _tell(self, event: RequestEvent, arrow: str, key: str, transfer: int = 0, **places: object) -> None:
        source, _, target = arrow.partition(">")
        text = say(self.lang, key, **places)
        self.found.append(Message(event.ts_ns, source, target, text, event.seq, transfer))

    def _nothing(self, event: RequestEvent) -> None:
        """This stage hands control to nobody."""

    def _on_entered(self, event: RequestEvent) -> None:
        self._tell(event, "client>queue", "entered", 1, prompt_len=self.path.prompt_len)

    def _blocks_of(self, event: RequestEvent) -> int:
        """Blocks of the tokens that are known at this record."""
        return -(-_tokens(event) // self.run.recording.header.block_size)

    def _on_scheduled(self, event: RequestEvent) -> None:
        self.held = self._blocks_of(event)
        key = "readmitted" if event.epoch else "admitted"
        self._tell(event, "queue>scheduler", key, ms=_in_ms(self.path.timeline.t_queue_ns))
        self._tell(event, "scheduler>block_pool", "allocate", blocks=self.held, tokens=_tokens(event))

    def _on_prefill_begin(self, event: RequestEvent) -> None:
        self._tell(event, "scheduler>prefill", "prefill_start", 2 if event.epoch == 0 else 0)

    def _on_prefill_end(self, event: RequestEvent) -> None:
        self._tell(event, "prefill>block_pool", "resident", tokens=_tokens(event), blocks=self._blocks_of(event))

    def _on_first_handover(self, event: RequestEvent) -> None:
        self._tell(event, "prefill>client", "first_token", ms=_in_ms(self.path.timeline.ttft_ns))

    def _tell_decodes(self) -> None:
        """The decode steps in a row: what they read and append, and where the table grew."""
        if not self.decodes:
            return
        steps, self.decodes = self.decodes, []
        first = self._launched(steps[0])
        if not self.decoding:
            self._tell(first, "prefill>decode", "decode_start", 3)
            self.decoding = True
        low, high = _tokens(steps[0]) - 1, _tokens(steps[-1]) - 1
        self._tell(first, "block_pool>decode", "read", steps=len(steps), low=low, high=high)
        self._tell_growth([event for before, event in zip([None, *steps], steps) if self._grows(before, event)])
        self.held = self._blocks_of(steps[-1])

    def _grows(self, before: RequestEvent | None, event: RequestEvent) -> bool:
        return self._blocks_of(event) > (self._blocks_of(before) if before else self.held)

    def _tell_growth(self, grown: list[RequestEvent]) -> None:
        """Every extension; of many the first, the last, and how many lie between."""
        is_long = len(grown) > SHOWN_EXTENSIONS
        for event in grown[:1] if is_long else grown:
            self._extend(event, "extend", tokens=_tokens(event))
        if is_long:
            self._extend(grown[-2], "extend_more", count=len(grown) - 2)
            self._extend(grown[-1], "extend", tokens=_tokens(grown[-1]))

    def _extend(self, event: RequestEvent, key: str, **places: int) -> None:
        self._tell(self._launched(event), "decode>block_pool", key, blocks=self._blocks_of(event), **places)

    def _launched(self, event: RequestEvent) -> RequestEvent:
        """A decode step's record at the launch of its step: then the table is extended."""
        step = next((s for s in self.run.steps if s.end_ns == event.ts_ns and self.path.name in s.members), None)
        return event._replace(ts_ns=step.start_ns) if step else event

    def _on_preempted(self, event: RequestEvent) -> None:
        self._tell(event, "decode>queue" if self.decoding else "prefill>queue", "preempted", blocks=self.held)
        self.held = 0

    def _on_output_complete(self, event: RequestEvent) -> None:
        source = "decode" if self.decoding else "prefill"
        self._tell(event, f"{source}>client", "output_complete", 4, generated_len=event.generated_len)

    def _on_state_released(self, event: RequestEvent) -> None:
        self._tell(
            event, f"{'decode' if self.decoding else 'prefill'}>block_pool", "state_released", 5, blocks=self.held
        )

    def _on_end(self, event: RequestEvent) -> None:
        self._tell(event, "scheduler>client", "ended", end=event.stage)

    _on_aborted = _on_failed = _on_rejected = _on_end


def _tokens(event: RequestEvent) -> int:
    """Tokens that are known at this record: in a decode step, those whose KV stands when it ends."""
    return event.prompt_len + event.generated_len


def _title(run: Replay, path: RequestPath, lang: Lang) -> str:
    return "; ".join([say(lang, "title", name=path.name, label=run.recording.label), *run.recording.remarks])


def _ms(path: RequestPath, at_ns: int) -> str:
    return _in_ms(at_ns - path.timeline.arrival_ns)


def _in_ms(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:,.2f}"


def _xml(text: str) -> str:
    """As character data; XML has no way to write a control character."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def _plain(text: str) -> str:
    """One line without what Mermaid reads as its own."""
    return "".join(" " if c in ";#\n\r" or not c.isprintable() else c for c in text)
