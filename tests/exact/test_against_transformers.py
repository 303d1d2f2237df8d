"""The same tokens and logits as transformers: SmolLM2 against its goldens, tiny models against the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_goldens
import pytest
import torch
from exact_harness import NEAR_TIE, check_against_golden, greedy, limit, prompt_logits, run, sharing_model, tokens
from golden_prompts import PROMPTS
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from nanovllm import LLM

GOLDENS = make_goldens.load()
LONG = [name for name, golden in GOLDENS.items() if len(golden["prompt_ids"]) >= 500]
LOGIT_TOLERANCE = 1e-3

# -- SmolLM2 ---------------------------------------------------------------------------------------


def test_goldens_are_what_the_issue_asks_for() -> None:
    lengths = [len(golden["prompt_ids"]) for golden in GOLDENS.values()]
    assert len(lengths) == 20 and all(len(golden["output_ids"]) == 64 for golden in GOLDENS.values())
    assert len(LONG) >= 4 and max(lengths) <= 2000 and min(lengths) == 1


@pytest.mark.model
def test_our_tokenizer_makes_the_same_prompts(smollm2: LLM) -> None:
    for name, (text, length) in PROMPTS.items():
        assert smollm2.tokenizer.encode(text)[:length] == GOLDENS[name]["prompt_ids"], name


def answers(llm: LLM, names: list[str]) -> dict[str, list[int]]:
    outputs = run(llm, [GOLDENS[name]["prompt_ids"] for name in names], [greedy(64)] * len(names))
    return dict(zip(names, tokens(outputs), strict=True))


@pytest.mark.model
@pytest.mark.parametrize("num_long", [1, pytest.param(len(LONG), marks=pytest.mark.long)])
def test_smollm2_equals_transformers_all_together_in_chunks(smollm2: LLM, capsys: Any, num_long: int) -> None:
    """All in one batch; a long prompt enters in chunks of at most 500 beside the decodes of the others."""
    names = [name for name in GOLDENS if name not in LONG[num_long:]]
    limit(smollm2, max_num_batched_tokens=512, max_prefill_chunk=500)
    report = check_against_golden(answers(smollm2, names), GOLDENS)
    limit(smollm2, max_num_batched_tokens=2048, max_prefill_chunk=None)
    with capsys.disabled():
        print(f"\nSmolLM2 float32 against transformers, batched, chunked: {report}")


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, None])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.timeout(1800)
def test_smollm2_equals_transformers_however_it_is_cut(
    smollm2: LLM, capsys: Any, chunk: int | None, block_size: int
) -> None:
    names = [name for name in GOLDENS if chunk is None or chunk >= 16 or name not in LONG[1:]]
    with sharing_model(smollm2, block_size=block_size, max_prefill_chunk=chunk) as llm:
        report = check_against_golden(answers(llm, names), GOLDENS)
    with capsys.disabled():
        print(f"\nchunk {chunk}, block size {block_size}: {report}")


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("name", list(GOLDENS))
def test_smollm2_equals_transformers_one_by_one(smollm2: LLM, name: str) -> None:
    check_against_golden(answers(smollm2, [name]), GOLDENS)


@pytest.mark.model
def test_smollm2_logits_after_the_prompt(smollm2: LLM, capsys: Any) -> None:
    worst = 0.0
    for name in [*list(GOLDENS)[:15], "long_english"]:
        ours = prompt_logits(smollm2, GOLDENS[name]["prompt_ids"])[-1, :: make_goldens.PROBE_STRIDE]
        worst = max(worst, float((ours - torch.tensor(GOLDENS[name]["probe"])).abs().max()))
    with capsys.disabled():
        print(f"\nSmolLM2 logits after 16 prompts, 64 each: at most {worst:.1e} from transformers'")
    assert worst < LOGIT_TOLERANCE


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_goldens_can_be_made_again(smollm2_path: Path, tmp_path: Path) -> None:
    make_goldens.make(smollm2_path, tmp_path)
    again = make_goldens.load(tmp_path)
    for name, golden in GOLDENS.items():
        assert again[name]["prompt_ids"] == golden["prompt_ids"], name
        check_against_golden({name: again[name]["output_ids"]}, GOLDENS)
        assert torch.allclose(torch.tensor(again[name]["probe"]), torch.tensor(golden["probe"]), atol=LOGIT_TOLERANCE)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_smollm2_logits_of_whole_prompts(smollm2_path: Path, smollm2: LLM, capsys: Any) -> None:
    reference = make_goldens.load_model(smollm2_path)
    for name in ["question", "chinese", "c", *LONG]:
        ids = GOLDENS[name]["prompt_ids"]
        with torch.no_grad():
            theirs = reference(torch.tensor([ids])).logits[0]
        for chunk in (None, 64):
            worst = float((prompt_logits(smollm2, ids, chunk) - theirs).abs().max())
            with capsys.disabled():
                print(f"\n{name}, {len(ids)} tokens, chunk {chunk}: logits at most {worst:.1e} apart")
            assert worst < LOGIT_TOLERANCE


@pytest.mark.model
def test_smollm2_in_bfloat16_is_close(smollm2: LLM, smollm2_path: Path, capsys: Any) -> None:
    """No equality is claimed in bfloat16: it runs, and its logits lie near the float32 ones."""
    names = ["question", "c", "chinese"]
    with LLM(str(smollm2_path), dtype="bfloat16", kv_memory="128MiB", progress=False) as llm:
        outputs = run(llm, [GOLDENS[name]["prompt_ids"] for name in names], [greedy(16)] * 3)
        assert all(len(token_ids) == 16 for token_ids in tokens(outputs))
        for name in names:
            wide, narrow = (prompt_logits(each, GOLDENS[name]["prompt_ids"]) for each in (smollm2, llm))
            error = float((wide - narrow).abs().mean() / wide.std())
            same = float((wide.argmax(-1) == narrow.argmax(-1)).float().mean())
            with capsys.disabled():
                print(f"\nbfloat16, {name}: mean error {error:.3f} of the spread, argmax equal at {same:.0%}")
            assert error < 0.05


# -- tiny random models ----------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 48}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN}),
    "llama-small-eps": ("llama", {"rms_norm_eps": 1e-2}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
    ),
}


def reference_model(kind: str, changes: dict[str, Any]) -> Any:
    """A random model of transformers' own. Norms and biases are random too, so that a forgotten one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    return model


def save(model: Any, directory: Path, shard: str = "1GB") -> Path:
    """config.json and safetensors as `save_pretrained` writes them, and a tokenizer of single bytes."""
    model.save_pretrained(directory, max_shard_size=shard)
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<a>", "<b>"]
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(alphabet[256:])
    backend.save(str(directory / "tokenizer.json"))
    return directory


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[(i * i * 7 + i * 13 + length) % 256 for i in range(length)] for length in lengths]


@torch.no_grad()
def their_greedy(model: Any, prompt: list[int], count: int) -> dict[str, Any]:
    ids = torch.tensor([prompt])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.cat(result.logits).topk(2).values
    return {"output_ids": result.sequences[0, len(prompt) :].tolist(), "margins": (top[:, 0] - top[:, 1]).tolist()}


@pytest.mark.parametrize("name", list(TINY))
def test_tiny_model_equals_transformers(name: str, tmp_path: Path) -> None:
    """Random models are sensitive to every term: a wrong scale, bias, norm or angle changes the first token."""
    reference = reference_model(*TINY[name])
    path = save(reference, tmp_path / "model", shard="40KB" if "tied" in name else "1GB")
    assert (path / "model.safetensors.index.json").exists() == ("tied" in name)
    prompts = prompts_of((1, 15, 16, 17, 70, 130))
    goldens = {str(i): their_greedy(reference, prompt, 24) for i, prompt in enumerate(prompts)}
    for kernels in ("compiled", "cpu", "reference"):
        with LLM(path, dtype="float32", kernels=kernels, num_blocks=64, max_num_batched_tokens=48) as llm:
            ours = dict(zip(goldens, tokens(run(llm, prompts, [greedy(24)] * 6)), strict=True))
            check_against_golden(ours, goldens)
            with torch.no_grad():
                theirs = reference(torch.tensor([prompts[-1]])).logits[0]
            for chunk in (None, 16):
                assert float((prompt_logits(llm, prompts[-1], chunk) - theirs).abs().max()) < LOGIT_TOLERANCE


def test_tiny_near_ties_are_rare(tmp_path: Path, capsys: Any) -> None:
    """What the tests above let pass: steps whose margin is under NEAR_TIE, over every tiny model."""
    margins = []
    for kind, changes in TINY.values():
        reference = reference_model(kind, changes)
        margins += [m for prompt in prompts_of((1, 17)) for m in their_greedy(reference, prompt, 24)["margins"]]
    close = sum(margin < NEAR_TIE for margin in margins)
    with capsys.disabled():
        print(f"\ntiny models: {close} of {len(margins)} reference margins under {NEAR_TIE}, least {min(margins):.5f}")
    assert close < len(margins) / 50


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tiny_model_in_bfloat16_is_close(kind: str, tmp_path: Path) -> None:
    reference = reference_model(kind, {"initializer_range": 0.05})
    path = save(reference, tmp_path / "model")
    (prompt,) = prompts_of((40,))
    with LLM(path, dtype="bfloat16", num_blocks=64) as llm, torch.no_grad():
        theirs = reference(torch.tensor([prompt])).logits[0]
        error = (prompt_logits(llm, prompt) - theirs).abs().mean() / theirs.std()
        assert float(error) < 0.05
        assert len(run(llm, [prompt], [greedy(8)])[0].token_ids) == 8
