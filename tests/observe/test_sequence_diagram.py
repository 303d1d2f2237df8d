"""The sequence diagram: the five transfers of control once each and in order, in both forms, whatever names came."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from nanovllm.observe.paths import Replay, replay
from nanovllm.observe.sequence_diagram import PARTICIPANTS, mermaid, messages, svg
from nanovllm.observe.wording import PROSE
from tests.engine.helpers import greedy, make_bench
from tests.observe.causes import MS, ONE_CAUSE, request
from tests.observe.recorded import recorded

FIVE = ["request entered: 8 prompt tokens", "prefill start", "decode start", "output complete: 5 tokens"]
ARROW = re.compile(r"    (\w+)(-->>|->>)(\w+): ([^;#\n]*)")
SVG = "{http://www.w3.org/2000/svg}"


def run_of(tmp_path: Path, name: str = "r", tokens: int = 5, **knobs: Any) -> Replay:
    bench = make_bench(simulated=True, **knobs)
    one = {"prompt": [1] * 8, "sampling_params": greedy(tokens), "request_id": name}
    return replay(recorded(bench, [(0, one)], tmp_path))


def test_control_is_handed_over_five_times(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    found = [message for message in messages(run, run.paths["r"]) if message.transfer]
    assert [message.transfer for message in found] == [1, 2, 3, 4, 5]
    assert [message.text for message in found] == [*FIVE, "release: state released, 3 blocks"]
    hands = [(message.source, message.target) for message in found]
    assert hands[0] == ("client", "queue") and hands[-1] == ("decode", "block_pool")
    timeline = run.paths["r"].timeline
    entered, prefill, decode, complete, released = (message.at_ns for message in found)
    assert (entered, prefill, complete) == (timeline.arrival_ns, timeline.launch_ns, timeline.last_handover_ns)
    assert timeline.token_ns[0] <= decode < timeline.token_ns[1] and released >= complete
    records = {event.seq: event.stage for event in run.paths["r"].events}
    stages = ["entered", "prefill_begin", "decode_step", "output_complete", "state_released"]
    assert [records[message.seq] for message in found] == stages


def test_an_answer_of_one_token_never_decodes(tmp_path: Path) -> None:
    run = run_of(tmp_path, tokens=1)
    found = [message for message in messages(run, run.paths["r"]) if message.transfer]
    assert [(message.transfer, message.source) for message in found][2:] == [(4, "prefill"), (5, "prefill")]


@pytest.mark.parametrize(("tokens", "extensions"), [(1, []), (5, [3]), (12, [3, 4, 5]), (40, [3, 12])])
def test_the_blocks_of_its_life_are_the_pools(tmp_path: Path, tokens: int, extensions: list[int]) -> None:
    """Creation, residency, extension, release: at each of them as many blocks as the pool itself has in use."""
    run = run_of(tmp_path, tokens=tokens)
    found = messages(run, run.paths["r"])
    in_use = {step.start_ns: 64 - step.event.free_blocks for step in run.steps}
    texts = [message.text for message in found]
    assert "creation: allocate 2 blocks for 8 tokens" in texts and "residency: KV of 8 tokens in 2 blocks" in texts
    grown = [m for m in found if m.text.startswith("extension: block")]
    told = [(m.at_ns, int(m.text.split()[2].strip(","))) for m in grown]
    assert [blocks for _, blocks in told] == extensions
    assert all(in_use[at_ns] == blocks for at_ns, blocks in told)
    assert ("extension: 8 times more, to 11 blocks" in texts) == (tokens == 40)
    assert found[-1].text == f"release: state released, {max([*in_use.values()])} blocks"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_both_forms_draw_the_same_messages(tmp_path: Path, lang: Any) -> None:
    run = run_of(tmp_path)
    wanted = messages(run, run.paths["r"], lang)
    text = mermaid(run, run.paths["r"], lang)
    arrows = ARROW.findall(text)
    assert [(source, target) for source, _, target, _ in arrows] == [(m.source, m.target) for m in wanted]
    assert [arrow == "->>" for _, arrow, _, _ in arrows] == [m.transfer > 0 for m in wanted]
    assert text.splitlines()[0] == "sequenceDiagram" and "simulated" in text.splitlines()[1]
    picture = ET.fromstring(svg(run, run.paths["r"], lang))  # noqa: S314  our own text
    drawn = [node.text for node in picture.iter(SVG + "text")]
    assert all(message.text in drawn for message in wanted)
    assert [node.text for node in picture.iter(SVG + "text") if node.get("class") == "w"] == list("12345")
    assert len(wanted) == 11 and {name for m in wanted for name in (m.source, m.target)} == set(PARTICIPANTS)


def test_every_text_lies_inside_the_picture(tmp_path: Path) -> None:
    run = ONE_CAUSE["preemption"].run(tmp_path)
    picture = ET.fromstring(svg(run, run.paths["r1"]))  # noqa: S314  our own text
    width, height = (float(picture.get(side, 0)) for side in ("width", "height"))
    for node in picture.iter(SVG + "text"):
        x, y, length = float(node.get("x", 0)), float(node.get("y", 0)), 7.5 * len(node.text or "")
        left = x - length * {"middle": 0.5, "end": 1.0}.get(node.get("text-anchor", ""), 0.0)
        assert left >= 0 and left + length <= width and 0 < y < height, node.text


def test_a_preempted_request_goes_back_to_the_queue(tmp_path: Path) -> None:
    run = ONE_CAUSE["preemption"].run(tmp_path)
    found = messages(run, run.paths["r1"])
    assert [message.transfer for message in found if message.transfer] == [1, 2, 3, 4, 5]
    texts = [message.text for message in found]
    taken = texts.index("release: preempted, 11 blocks; tokens kept")
    assert texts[taken - 1] == "extension: block 11, for token 41"
    again = texts[taken + 1 :]
    assert again[:2] == [PROSE["readmitted"][0], "creation: allocate 12 blocks for 45 tokens"]
    assert again[3:5] == [
        "residency: KV of 45 tokens in 12 blocks",
        "residency: 33 steps read 44 to 76 tokens' KV, add 1 each",
    ]
    assert again[-1] == "release: state released, 20 blocks"


def test_an_aborted_request_ends_without_an_answer(tmp_path: Path) -> None:
    bench = make_bench(simulated=True)
    step = bench.engine.step

    def aborting() -> Any:
        outputs = step()
        if bench.engine.marks.num_steps == 3:
            bench.engine.abort("r0")
        return outputs

    bench.engine.step = aborting  # type: ignore[method-assign]
    run = replay(recorded(bench, [(0, request(0, 8, 50)), (40 * MS, request(1, 4, 2))], tmp_path))
    texts = [(message.transfer, message.text) for message in messages(run, run.paths["r0"])]
    assert (0, "ended: aborted") in texts and (5, "release: state released, 3 blocks") in texts
    assert 4 not in [transfer for transfer, _ in texts]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a;b#c\nend", "x]]>&amp;", "\x00\x1b[2J"])
def test_a_hostile_name_is_text(tmp_path: Path, name: str) -> None:
    run = run_of(tmp_path, name)
    picture = ET.fromstring(svg(run, run.paths[name]))  # noqa: S314  our own text
    tags = {node.tag.removeprefix(SVG) for node in picture.iter()}
    assert tags == {"svg", "style", "defs", "marker", "path", "rect", "text", "line", "circle"}
    text = mermaid(run, run.paths[name])
    assert len(text.splitlines()) == 2 + len(PARTICIPANTS) + 11
    assert all(character.isprintable() and character not in ";#" for line in text.splitlines() for character in line)
