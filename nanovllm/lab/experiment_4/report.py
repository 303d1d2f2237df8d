"""The files of a bundle that people read, made from its tables.

What it is: README.md, results.csv, notes.md, submission.md and the diagrams. What it knows
nothing about: engines, how figures come about. Invariants: a figure is never written without
its label; the approximation bound and the probe's statement stand where the figures stand; a
chain that failed is reported as refuted; `check` makes the same texts again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.lab.bundle import DIAGRAMS, NOTES, README, RESULTS, SUBMISSION, Bundle
from nanovllm.lab.experiment_4 import plots, prose
from nanovllm.lab.experiment_4.cells import as_csv, as_markdown
from nanovllm.lab.experiment_4.tables import RecordedRun
from nanovllm.lab.experiment_4.template import Filled, draft, render
from nanovllm.lab.wording import say
from nanovllm.observe import sequence_diagram
from nanovllm.observe.paths import RequestPath
from nanovllm.observe.probe import LABEL, STATEMENT
from nanovllm.observe.wording import Lang

LIFECYCLE = "kv_lifecycle"


def write(bundle: Bundle, tables: dict[str, Any], recorded: list[RecordedRun], lang: Lang) -> None:
    """All of them."""
    for name, text in texts(tables, recorded, bundle.facts, lang).items():
        bundle.write(name, text)
    plots.draw(bundle.path(DIAGRAMS), tables, recorded)


def texts(tables: dict[str, Any], recorded: list[RecordedRun], facts: Mapping[str, Any], lang: Lang) -> dict[str, str]:
    """Every text that the tables and the manifest's facts give, by its name in the bundle: same in, same out."""
    shown = next(run for run in recorded if (run.planned.arm, run.planned.case) == ("base", "long_ctx"))
    path = _waited_most(shown)
    explanations = [draft(lang, prose.explanation(lang, tables, row)) for row in tables["capacity_table"]]
    filled = Filled(
        date=str(facts["started"])[:10],
        environment=_environment(facts, shown),
        basis=prose.basis(lang, shown, path),
        rows=tables["capacity_table"],
        explanations=explanations,
        chain=prose.chain_line(lang, tables),
        statement=_statement(lang, tables["label"]),
    )
    return {
        f"{DIAGRAMS}/{LIFECYCLE}.mmd": sequence_diagram.mermaid(shown.replay, path, lang),
        f"{DIAGRAMS}/{LIFECYCLE}.svg": sequence_diagram.svg(shown.replay, path),  # no Chinese font, no boxes
        RESULTS: as_csv(tables["capacity_table"], explanations),
        NOTES: _notes(lang, tables, facts),
        README: _readme(lang, tables, facts, explanations, shown, path),
        SUBMISSION: render(lang, filled),
    }


def _waited_most(run: RecordedRun) -> RequestPath:
    """The request whose life shows the most: it waited, and lived to its end."""
    return max(run.replay.paths.values(), key=lambda path: path.timeline.t_queue_ns or 0)


def _environment(facts: Mapping[str, Any], run: RecordedRun) -> str:
    header, machine = run.replay.recording.header, facts["environment"]
    return (
        f"{header.model}, {header.dtype}, {header.label}; {machine['processor']}, {machine['logical_cpus']} CPUs, "
        f"{machine['num_threads']} threads, Python {machine['python']}, torch {machine['packages']['torch']}, "
        f"nanovllm {facts['version']}"
    )


def _statement(lang: Lang, label: str) -> dict[str, str]:
    real = "statement_real_measured" if label == "measured" else "statement_real_simulated"
    keys = {"observation": "statement_observation_text", "real": real, "not_yet": "statement_not_yet_text"}
    return {name: say(lang, key) for name, key in keys.items()}


def _notes(lang: Lang, tables: dict[str, Any], facts: Mapping[str, Any]) -> str:
    lines = [f"# {say(lang, 'notes_title')}", "", f"## {say(lang, 'notes_anomalies')}", ""]
    lines += [f"- {text}" for text in prose.anomalies(lang, tables, facts)]
    lines += ["", f"## {say(lang, 'notes_overturn')}", "", f"- {say(lang, 'overturn_chain')}"]
    lines += [f"- {say(lang, 'overturn_size')}", "", f"## {say(lang, 'notes_uncontrolled')}", ""]
    return "\n".join([*lines, f"- {say(lang, 'uncontrolled')}", "", f"## {say(lang, 'notes_own')}", ""]) + "\n"


def _readme(
    lang: Lang,
    tables: dict[str, Any],
    facts: Mapping[str, Any],
    explanations: list[str],
    run: RecordedRun,
    path: RequestPath,
) -> str:
    sections = [
        ("", say(lang, "readme_question")),
        ("readme_run", _how_it_ran(lang, facts, run)),
        ("readme_table", _table(lang, tables, explanations)),
        ("readme_blocks", _blocks(lang, tables)),
        ("readme_chain", _chain(lang, tables)),
        ("readme_probe", _probe(lang, tables)),
        ("readme_statement", "\n".join(f"- {text}" for text in _statement(lang, tables["label"]).values())),
        ("readme_diagrams", say(lang, "readme_diagrams_text", run=run.planned.name, request=path.request_id)),
        ("readme_again", say(lang, "readme_again_text")),
    ]
    body = "\n".join((f"## {say(lang, title)}\n\n" if title else "") + text + "\n" for title, text in sections)
    return f"# {say(lang, 'readme_title')}\n\n{body}"


def _how_it_ran(lang: Lang, facts: Mapping[str, Any], run: RecordedRun) -> str:
    header = run.replay.recording.header
    commit = f"{facts['commit']}{' (dirty)' if facts['dirty'] else ''}"
    lines = [
        f"    {facts['command']}",
        "",
        f"- {say(lang, 'ran_on', environment=_environment(facts, run), commit=commit)}",
        f"- policy {header.policy}, schedule_mode {header.schedule_mode}, prefix_mode {header.prefix_mode}, "
        f"block_size {header.block_size}, prior state {header.prior_state}, seed {facts['seed']}",
        f"- {say(lang, 'ran_pools', **facts['pools'], repeats=facts['repeats'], runs=len(facts['order']))}",
        f"- {say(lang, 'ran_kv', formula=facts['environment']['kv_shape'])}",
    ]
    return "\n".join(lines)


def _table(lang: Lang, tables: dict[str, Any], explanations: list[str]) -> str:
    table = as_markdown(tables["capacity_table"], explanations)
    error = max(row["estimated_kv"]["counted_error_blocks"] for row in tables["capacity_table"])
    bounds = [size["bound_bytes"] for row in tables["capacity_table"] for size in row["estimated_kv"]["per_request"]]
    legend = say(lang, "table_legend", label=tables["label"])
    return f"{table}\n{legend}\n\n{say(lang, 'table_bound', bytes=f'{max(bounds):,}', error=error)}"


def _blocks(lang: Lang, tables: dict[str, Any]) -> str:
    blocks = tables["total_blocks"]
    used = [
        say(lang, "blocks_used", case=case, mean=f"{one['mean']:.1f}", most=f"{one['max']:.0f}")
        for case, one in blocks["used"].items()
    ]
    first = say(lang, "blocks_pool", pool=blocks["pool"], label=blocks["label"])
    return "\n".join([first, "", *(f"- {line}" for line in used)])


def _chain(lang: Lang, tables: dict[str, Any]) -> str:
    chain = tables["chain"]
    tried = [*chain["interventions"], chain["reverse"]]
    lines = [f"- {prose.change_line(lang, one)}" for one in tried]
    rule = say(lang, "chain_rule", share=f"{chain['prefill_share']:.0%}", own=f"{chain['self_share']:.0%}")
    return "\n".join([prose.chain_line(lang, tables), "", rule, "", *lines])


def _probe(lang: Lang, tables: dict[str, Any]) -> str:
    lines = [
        f"- {case}: {figure['overlap_tokens']:,} / {figure['tokens']:,} tokens [{LABEL}: {STATEMENT}]"
        for case, figure in tables["probe"].items()
    ]
    return "\n".join([say(lang, "probe_text"), "", *lines])
