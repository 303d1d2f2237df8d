"""`lab check 4`: a fresh bundle passes; each mutated one is refused for its own reason and for no other."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import BundleError
from nanovllm.lab.experiment_4.check import RULES, check_bundle
from nanovllm.lab.findings import differences
from nanovllm.lab.wording import PROSE
from tests.lab.mending import edit_json, edit_lines, edit_text, rebuild, reseal

LONG = "02-base-long_ctx-1"


def table(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(folder / "tables.json", change)
    reseal(folder)


def changed_cell(folder: Path) -> None:
    table(folder, lambda t: t["capacity_table"][1]["live_requests"].update(mean=3.5))


def changed_result(folder: Path) -> None:
    edit_text(folder / "results.csv", "mean 1.9", "mean 5.9")
    reseal(folder)


def dropped_raw_line(folder: Path) -> None:
    dropped: list[int] = []

    def drop(record: dict[str, Any]) -> dict[str, Any] | None:
        is_it = not dropped and record.get("stage") == "decode_step"
        dropped.extend([1] if is_it else [])
        return None if is_it else record

    edit_lines(folder / "raw" / f"{LONG}.jsonl", drop)
    rebuild(folder)


def dropped_step(folder: Path) -> None:
    edit_lines(folder / "raw" / f"{LONG}.jsonl", lambda r: None if r.get("step") == 5 else r)
    rebuild(folder)


def cut_off(folder: Path) -> None:
    edit_lines(folder / "raw" / f"{LONG}.jsonl", lambda r: None if r.get("record") == "end" else r)
    rebuild(folder)


def swapped_label(folder: Path) -> None:
    def swap(tables: dict[str, Any]) -> None:
        row = tables["capacity_table"][0]
        row["estimated_kv"]["label"], row["TTFT"]["label"] = row["TTFT"]["label"], row["estimated_kv"]["label"]

    table(folder, swap)


def no_bound(folder: Path) -> None:
    def drop(tables: dict[str, Any]) -> None:
        for row in tables["capacity_table"]:
            del row["estimated_kv"]["bound"]

    table(folder, drop)


def probe_as_an_effect(folder: Path) -> None:
    table(folder, lambda t: t["statement"]["real_effect"].append("probe.overlap_tokens"))


def probe_without_its_statement(folder: Path) -> None:
    table(folder, lambda t: t["probe"]["long_ctx"].update(label="measured", statement="saved tokens"))


def probe_praised_in_prose(folder: Path) -> None:
    with (folder / "notes.md").open("a", encoding="utf-8") as notes:
        notes.write("\n前缀命中率达到 61%，带来明显加速。\n")


def probe_praised_in_the_table(folder: Path) -> None:
    edit_text(folder / "results.csv", "无人等待块", "探针命中 61%，节省了等待")
    reseal(folder)


def two_repeats(folder: Path) -> None:
    for path in (folder / "raw").glob("*-3*.jsonl"):
        path.unlink()
    rebuild(folder, lambda m: m.update(order=[one for one in m["order"] if one["repeat"] < 3], repeats=2))


def ttft_under_queue_wait(folder: Path) -> None:
    table(folder, lambda t: t["capacity_table"][1]["TTFT"].update(p50=t["capacity_table"][1]["queue_wait"]["p50"] - 1))


def edited_manifest(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda m: m.update(dirty=not m["dirty"]))


def warm_called_cold(folder: Path) -> None:
    for path in (folder / "raw").glob("*-?.jsonl"):
        edit_lines(path, lambda r: r | {"prior_state": "warm"} if r.get("record") == "header" else r)
    reseal(folder)


def another_model(folder: Path) -> None:
    reseal(folder, lambda m: m["run"].update(model="gpt"))


def missing_raw_file(folder: Path) -> None:
    (folder / "raw" / f"{LONG}.jsonl").unlink()
    reseal(folder)


def not_alternating(folder: Path) -> None:
    """Repeat 2 goes forwards like the others: the files renamed, the tables computed again."""
    runs = ["base-short_ctx", "base-long_ctx", "base-mixed_ctx", "roomy-short_ctx", "roomy-long_ctx", "roomy-mixed_ctx"]
    new = {f"{run}-2": position for position, run in enumerate([*runs, "tight-short_ctx"], 8)}
    for path in sorted((folder / "raw").glob("*-2.*")):
        rest = path.name.split("-", 1)[1]
        path.rename(path.with_name(f"new-{new[rest.split('.')[0]]:02d}-{rest}"))
    for path in (folder / "raw").glob("new-*"):
        path.rename(path.with_name(path.name.removeprefix("new-")))

    def renumber(manifest: dict[str, Any]) -> None:
        for one in manifest["order"]:
            one["position"] = new.get(f"{one['arm']}-{one['case']}-{one['repeat']}", one["position"])
            one["run"] = f"{one['position']:02d}-{one['arm']}-{one['case']}-{one['repeat']}"
        manifest["order"].sort(key=lambda one: one["position"])

    rebuild(folder, renumber)


def another_pool(folder: Path) -> None:
    for path in (folder / "raw").glob("*-base-long_ctx-?.jsonl"):
        edit_lines(path, lambda r: r | {"num_blocks": 64} if r.get("record") == "header" else r)
    rebuild(folder)


def no_wall(folder: Path) -> None:
    for path in (folder / "raw").glob("*-?.jsonl"):
        edit_lines(path, lambda r: r | {"reason": "batch_cap"} if r.get("record") == "wait" else r)
    rebuild(folder)


def time_goes_back(folder: Path) -> None:
    def back(record: dict[str, Any]) -> dict[str, Any]:
        is_it = record.get("stage") == "prefill_begin" and record["request_id"] == "s0-t0"
        return record | {"ts_ns": 10**12} if is_it else record

    edit_lines(folder / "raw" / f"{LONG}.jsonl", back)
    rebuild(folder)


def other_requests(folder: Path) -> None:
    """A prompt shorter than the seed's, in every record of its request."""

    def shorter(record: dict[str, Any]) -> dict[str, Any]:
        if record.get("request_id") != "s3-t0" or "stage" not in record:
            return record
        tokens = {"tokens": 128} if record["stage"] == "prefill_end" else {}
        return record | {"prompt_len": min(record["prompt_len"], 128)} | tokens

    edit_lines(folder / "raw" / f"{LONG}.jsonl", shorter)
    rebuild(folder)


def chain_made_to_hold(folder: Path) -> None:
    table(folder, lambda t: t["chain"]["interventions"][0].update(verdict="holds"))


def no_statement(folder: Path) -> None:
    table(folder, lambda t: t.pop("statement"))


def failed_run(folder: Path) -> None:
    reseal(folder, lambda m: m.update(status="failed", error="OutOfMemoryError"))


def another_column(folder: Path) -> None:
    edit_text(folder / "results.csv", "queue_wait", "queueing")
    reseal(folder)


def no_diagram(folder: Path) -> None:
    (folder / "diagrams" / "kv_lifecycle.svg").unlink()
    reseal(folder)


def wrong_observer(folder: Path) -> None:
    table(folder, lambda t: t["observer"]["reports"][LONG].update(used_blocks_max=1))


def mute_observer(folder: Path) -> None:
    table(folder, lambda t: t["observer"]["reports"][LONG].pop("live_requests_max"))


def edited_readme(folder: Path) -> None:
    edit_text(folder / "README.md", "28", "29")


def resealed_readme(folder: Path) -> None:
    """The chain's verdict turned round, and the label."""
    edit_text(folder / "README.md", "holds", "refuted")
    reseal(folder)


def readme_without_its_bound(folder: Path) -> None:
    path = folder / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "近似边界" not in line), encoding="utf-8")
    reseal(folder)


def empty_readme(folder: Path) -> None:
    (folder / "README.md").write_text("")
    reseal(folder)


def results_without_explanations(folder: Path) -> None:
    path = folder / "results.csv"
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *([*row[:-1], ""] for row in rows)])
    reseal(folder)


def foreign_diagram(folder: Path) -> None:
    (folder / "diagrams/kv_lifecycle.svg").write_text("<svg/>")
    reseal(folder)


def foreign_picture(folder: Path) -> None:
    edit_text(folder / "diagrams/residency.svg", "02-base-long_ctx-1", "02-base-long_ctx-2")
    reseal(folder)


def no_pictures(folder: Path) -> None:
    for name in ("residency.svg", "intervention.svg", "kv_lifecycle.mmd"):
        (folder / "diagrams" / name).unlink()
    reseal(folder)


def lifecycle_not_listed(folder: Path) -> None:
    (folder / "diagrams/kv_lifecycle.mmd").unlink()
    reseal(folder, lambda m: m["diagrams"].remove("kv_lifecycle.mmd"))


def edited_prefixes(folder: Path) -> None:
    path = folder / "raw" / f"{LONG}.prefixes.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{lines[0]}\n" for _ in lines), encoding="utf-8")
    rebuild(folder)


def prefixes_of_another_repeat(folder: Path) -> None:
    """A run no figure is read from: its trace has to be the seed's all the same."""
    edit_lines(folder / "raw" / "14-base-short_ctx-2.prefixes.jsonl", lambda r: r | {"hash_ids": r["hash_ids"][::-1]})
    rebuild(folder)


def another_step_limit(folder: Path) -> None:
    """In all headers and the manifest: at odds with the experiment itself."""
    for path in (folder / "raw").glob("*-?.jsonl"):
        edit_lines(path, lambda r: r | {"knobs": r["knobs"] | {"max_num_seqs": 1}} if "knobs" in r else r)
    rebuild(folder, lambda m: m["run"]["knobs"].update(max_num_seqs=1))


def simulated_called_measured(folder: Path) -> None:
    for path in (folder / "raw").glob("*-?.jsonl"):
        edit_lines(path, lambda r: r | {"label": "measured"} if r.get("record") == "header" else r)
    rebuild(folder, lambda m: m["run"].update(label="measured"))


def hidden_observer(folder: Path) -> None:
    (folder / "raw/observer.py").unlink()
    reseal(folder)


def typed_observer(folder: Path) -> None:
    table(folder, lambda t: t.update(observer={"reports": t["observer"]["reports"]}))


def praising_observer(folder: Path) -> None:
    table(folder, lambda t: t["observer"]["reports"][LONG].update(saved_by_reuse_percent=40))


def observer_of_another_run(folder: Path) -> None:
    table(folder, lambda t: t["observer"]["reports"].update(better=t["observer"]["reports"][LONG]))


def smuggled_file(folder: Path) -> None:
    (folder / "raw" / "better.jsonl").write_text("{}\n")


MUTATIONS: list[tuple[Callable[[Path], None], set[str]]] = [
    (changed_cell, {"cell"}),
    (changed_result, {"cell"}),
    (dropped_raw_line, {"raw"}),
    (dropped_step, {"raw"}),
    (cut_off, {"raw"}),
    (swapped_label, {"label"}),
    (no_bound, {"bound"}),
    (probe_as_an_effect, {"probe"}),
    (probe_without_its_statement, {"probe"}),
    (probe_praised_in_prose, {"probe"}),
    (probe_praised_in_the_table, {"probe", "generated"}),
    (two_repeats, {"repeats"}),
    (ttft_under_queue_wait, {"relation", "cell"}),
    (edited_manifest, {"manifest", "generated"}),
    (warm_called_cold, {"manifest", "generated"}),
    (another_model, {"manifest"}),
    (missing_raw_file, {"raw"}),
    (not_alternating, {"order"}),
    (another_pool, {"pool"}),
    (no_wall, {"wall"}),
    (time_goes_back, {"raw"}),
    (other_requests, {"raw"}),
    (chain_made_to_hold, {"chain"}),
    (no_statement, {"statement"}),
    (failed_run, {"status"}),
    (another_column, {"columns"}),
    (no_diagram, {"diagram"}),
    (wrong_observer, {"observer"}),
    (mute_observer, {"observer"}),
    (edited_readme, {"file", "generated"}),
    (resealed_readme, {"generated"}),
    (readme_without_its_bound, {"generated"}),
    (empty_readme, {"generated"}),
    (results_without_explanations, {"generated"}),
    (foreign_diagram, {"diagram"}),
    (foreign_picture, {"diagram"}),
    (no_pictures, {"diagram"}),
    (lifecycle_not_listed, {"diagram"}),
    (edited_prefixes, {"raw"}),
    (prefixes_of_another_repeat, {"raw"}),
    (another_step_limit, {"manifest"}),
    (simulated_called_measured, {"manifest", "order"}),
    (hidden_observer, {"observer"}),
    (typed_observer, {"observer"}),
    (praising_observer, {"observer"}),
    (observer_of_another_run, {"observer"}),
    (smuggled_file, {"file"}),
]


def test_a_fresh_bundle_passes(whole_bundle: Path) -> None:
    verdict = check_bundle(whole_bundle)
    assert verdict.is_pass, [finding.text("en") for finding in verdict.findings]
    assert all(verdict.as_dict("en")["rules"].values())


@pytest.mark.parametrize(("mutate", "rules"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_a_mutated_bundle_is_refused_for_its_reason(
    bundle: Path, mutate: Callable[[Path], None], rules: set[str]
) -> None:
    mutate(bundle)
    verdict = check_bundle(bundle)
    assert verdict.broken() == rules, [finding.text("en") for finding in verdict.findings]
    for finding in verdict.findings:
        assert finding.where and finding.text("en") != finding.text("zh")


FIELDS = ["commit", "dirty", "environment", "engine", "started", "finished", "lang", "quick", "version", "warmup"]
FACTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *((f"no {name}", lambda m, name=name: m.pop(name)) for name in FIELDS),
    ("quick", lambda m: m.update(quick=False)),
    ("repeats", lambda m: m.update(repeats=7)),
    ("lab_version", lambda m: m.update(lab_version=99)),
    ("schema", lambda m: m.update(schema=7)),
    ("version", lambda m: m.update(version="9")),
    ("a commit of zeros", lambda m: m.update(commit="0" * 40)),
    ("half a commit", lambda m: m.update(commit="abc")),
    ("dirty of nothing", lambda m: m.update(commit=None, dirty=False)),
    ("started", lambda m: m.update(started="x")),
    ("ended before it began", lambda m: m.update(finished="2020-01-01T00:00:00+00:00")),
    ("another policy", lambda m: m["engine"].update(policy="sjf")),
    ("another processor's", lambda m: m.update(environment={"processor": "H100"})),
    ("no load", lambda m: m["environment"].pop("load_average_after")),
    ("another shape", lambda m: m["environment"].update(kv_shape="2 x 1 layers = 4 B")),
    ("measured on something", lambda m: m["environment"].update(device="cpu")),
    ("a size of one's own", lambda m: m["size"].update(requests=9)),
    ("a language there is not", lambda m: m.update(lang="fr")),
    ("a flag not given", lambda m: m["order"][0].update(run="01")),
    ("a field nobody writes", lambda m: m.update(approved=True)),
]


@pytest.mark.parametrize("change", [row[1] for row in FACTS], ids=[row[0] for row in FACTS])
def test_a_manifest_without_its_facts_or_with_invented_ones_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    reseal(bundle, change)
    verdict = check_bundle(bundle)
    assert "manifest" in verdict.broken(), [finding.text("en") for finding in verdict.findings]


def test_what_was_not_evaluated_is_neither_broken_nor_held(bundle: Path) -> None:
    table(bundle, lambda t: t.update(observer=None))
    verdict = check_bundle(bundle)
    assert verdict.is_pass and verdict.outcomes()["observer"] is None
    failed_run(bundle)
    rules = check_bundle(bundle, handed_in=True).as_dict("en")["rules"]
    told = {"status": False, "file": True}
    assert {rule: holds for rule, holds in rules.items() if holds is not None} == told and "draft" in rules


def test_every_rule_is_broken_by_some_mutation_and_has_its_words() -> None:
    assert {rule for _, rules in MUTATIONS for rule in rules} == set(RULES)
    assert all(f"rule_{rule}" in PROSE and f"list_{rule}" in PROSE for rule in RULES)


def test_a_change_without_a_new_seal_is_found_by_its_digest_too(bundle: Path) -> None:
    edit_json(bundle / "tables.json", lambda t: t["total_blocks"].update(pool=4096))
    assert check_bundle(bundle).broken() == {"file", "cell"}


def test_what_is_no_bundle_is_refused(tmp_path: Path, whole_bundle: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        check_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="no JSON"):
        check_bundle(tmp_path)
    shutil.copy(whole_bundle / "manifest.json", tmp_path)
    edit_json(tmp_path / "manifest.json", lambda m: m.update(experiment=5))
    with pytest.raises(BundleError, match="experiment 4"):
        check_bundle(tmp_path)


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"capacity_table": 3}', '{"capacity_table": [{"TTFT": 1}]}'])
def test_tables_of_any_shape_are_findings_and_never_a_traceback(bundle: Path, damage: str) -> None:
    (bundle / "tables.json").write_text(damage)
    reseal(bundle)
    assert "cell" in check_bundle(bundle).broken()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(order=[]),
        lambda m: m.update(order=[{"position": 1}]),
        lambda m: m.update(order="x", size=None, seed="x", run=3),
        lambda m: m["order"][0].update(case="../../etc"),
        lambda m: m["order"].pop(),
    ],
)
def test_manifests_of_any_shape_are_findings(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    reseal(bundle, change)
    assert check_bundle(bundle).broken() & {"repeats", "order", "raw"}


def test_documents_are_compared_leaf_by_leaf() -> None:
    a, b = {"x": [1, {"y": 2}], "z": True}, {"x": [1, {"y": 3}, 4], "z": 1}
    assert [path for path, _, _ in differences(a, b)] == ["x[1].y", "x[2]", "z"]
    assert not list(differences(a, a))
