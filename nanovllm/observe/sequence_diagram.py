"""A request's sequence diagram: who handed control to whom, and when, as Mermaid and as SVG.

What it is: the messages between client, queue, scheduler, prefill, decode and block pool,
with the five control transfers numbered: request entered, prefill start, decode start,
output complete, state released. What it knows nothing about: files, other requests.
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
_COLUMN, _ROW, _LEFT, _TOP = 150, 44, 130, 92
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
    width, height = _LEFT + _COLUMN * len(PARTICIPANTS), _TOP + _ROW * len(found) + 30
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
    """Collects the messages of one path."""

    def __init__(self, run: Replay, path: RequestPath, lang: Lang) -> None:
        self.run, self.path, self.lang = run, path, lang
        self.found: list[Message] = []
        self.decoding = False

    def messages(self) -> list[Message]:
        for event in self.path.events:
            getattr(self, f"_on_{event.stage}", self._nothing)(event)
        return self.found

    def _tell(self, event: RequestEvent, arrow: str, key: str, transfer: int = 0, **places: object) -> None:
        source, _, target = arrow.partition(">")
        text = say(self.lang, key, **places)
        self.found.append(Message(event.ts_ns, source, target, text, event.seq, transfer))

    def _nothing(self, event: RequestEvent) -> None:
        """This stage hands control to nobody."""

    def _on_entered(self, event: RequestEvent) -> None:
        self._tell(event, "client>queue", "entered", 1, prompt_len=self.path.prompt_len)

    def _on_scheduled(self, event: RequestEvent) -> None:
        size = self.run.recording.header.block_size
        blocks = -(-(event.prompt_len + event.generated_len) // size)
        key = "readmitted" if event.epoch else "admitted"
        self._tell(event, "queue>scheduler", key, ms=_in_ms(self.path.timeline.t_queue_ns))
        self._tell(event, "scheduler>block_pool", "allocate", blocks=blocks)

    def _on_prefill_begin(self, event: RequestEvent) -> None:
        self._tell(event, "scheduler>prefill", "prefill_start", 2 if event.epoch == 0 else 0)

    def _on_first_handover(self, event: RequestEvent) -> None:
        self._tell(event, "prefill>client", "first_token", ms=_in_ms(self.path.timeline.ttft_ns))

    def _on_decode_step(self, event: RequestEvent) -> None:
        if not self.decoding:  # told at the launch of the first step that decodes
            first = next((s for s in self.run.steps if s.end_ns == event.ts_ns and self.path.name in s.members), None)
            at_ns = first.start_ns if first else event.ts_ns
            self._tell(event._replace(ts_ns=at_ns), "prefill>decode", "decode_start", 3)
            self.decoding = True

    def _on_preempted(self, event: RequestEvent) -> None:
        self._tell(event, "decode>queue" if self.decoding else "prefill>queue", "preempted")

    def _on_output_complete(self, event: RequestEvent) -> None:
        source = "decode" if self.decoding else "prefill"
        self._tell(event, f"{source}>client", "output_complete", 4, generated_len=event.generated_len)

    def _on_state_released(self, event: RequestEvent) -> None:
        self._tell(event, f"{'decode' if self.decoding else 'prefill'}>block_pool", "state_released", 5)

    def _on_end(self, event: RequestEvent) -> None:
        self._tell(event, "scheduler>client", "ended", end=event.stage)

    _on_aborted = _on_failed = _on_rejected = _on_end


def _title(run: Replay, path: RequestPath, lang: Lang) -> str:
    return say(lang, "title", name=path.name, label=run.recording.label)


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
