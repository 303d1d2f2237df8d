"""Start reading here: two questions, answered by the whole engine.

    .venv/bin/python example.py

`LLM.generate` wraps the engine: `LLMEngine.add_request` takes each prompt in, and
`LLMEngine.step`, called until all are answered, moves them. Read these two next
(nanovllm/engine/llm_engine.py).
"""

from __future__ import annotations

from nanovllm import LLM, SamplingParams
from nanovllm.observe.timeline_view import render


def main() -> None:
    """Ask, answer, and show where the time of the first request went."""
    llm = LLM("smollm2", enforce_eager=True)
    questions = ["Introduce yourself in one sentence.", "List the prime numbers below 20."]
    prompts = [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64))
    for question, output in zip(questions, outputs, strict=True):
        print(f"\n> {question}\n{output['text']}")
    print(f"\n{render(outputs[0].timeline)}")


if __name__ == "__main__":
    main()
