"""The twenty prompts of the goldens: English, Chinese and code, 1 to 1,950 tokens.

All of it was written for this file. Long prompts are put together from small parts by
plain index arithmetic, so that they are the same on every machine and Python.
"""

from __future__ import annotations

SHORT = {
    "one_word": "The",
    "question": "<|im_start|>user\nWhat is the capital of France, and which river runs through it?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "poem": "<|im_start|>user\nWrite four lines about a lighthouse keeper who counts ships.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "story": "On the morning the bridge was finished, the ferryman rowed across once more. Nobody waited",
    "recipe": "Ingredients for a simple bread:\n- flour\n- water\n- salt\n- yeast\n\nSteps:\n1.",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233,",
    "chinese": "今天天气很好，我和朋友一起去公园散步。我们看见了",
    "chinese_question": "<|im_start|>user\n请用一句话解释什么是操作系统。<|im_end|>\n<|im_start|>assistant\n",
    "mixed": "The word 学习 means to learn, and the word 老师 means",
    "python": 'def is_prime(n: int) -> bool:\n    """True if n is prime."""\n    if n < 2:\n        return False\n',
    "c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "sql": "SELECT name, COUNT(*) AS orders\nFROM customers JOIN purchases ON",
    "json": '{"users": [{"id": 1, "name": "Ada", "tags": ["math", "code"]}, {"id": 2, "name":',
    "table": "| city | country |\n|---|---|\n| Paris | France |\n| Rome | Italy |\n| Berlin |",
    "symbols": "α + β = γ; 🙂 + 🙂 = ",
}

SUBJECTS = ("The harbour office", "A young surveyor", "The night train", "Our small library", "The village baker")
VERBS = ("kept a record of", "quietly measured", "carried home", "explained to visitors", "set aside")
OBJECTS = ("every storm of the year", "the old stone wall", "three boxes of letters", "how the clock was repaired")
ENDINGS = ("before the winter came.", "and said nothing of it.", "because somebody had asked.", "for the second time.")
CHINESE = (
    "图书馆每天早上八点开门，学生们安静地走进去。",
    "老师在黑板上写下一个公式，然后解释每个符号的意思。",
    "这台机器先读取数据，再把结果保存到文件里。",
    "河边的小镇有一座旧桥，桥上常常有人钓鱼。",
    "如果内存不够，程序就会把不常用的页面写到磁盘。",
)
CODE = (
    "class Queue{n}:\n    def __init__(self) -> None:\n        self.items: list[int] = []\n\n",
    "    def push(self, value: int) -> None:\n        self.items.append(value + {n})\n\n",
    "    def pop(self) -> int:\n        if not self.items:\n            raise IndexError('empty')\n",
    "        return self.items.pop(0)\n\n\ndef total_{n}(queue: Queue{n}) -> int:\n    return sum(queue.items)\n\n\n",
)


def english(sentences: int) -> str:
    """Plain prose; the parts turn at different rates, so that no long stretch repeats soon."""
    parts = (
        f"{SUBJECTS[i % 5]} {VERBS[(i * 2 + i // 5) % 5]} {OBJECTS[(i * 3 + i // 4) % 4]} {ENDINGS[(i + i // 3) % 4]}"
        for i in range(sentences)
    )
    return " ".join(parts)


def chinese(sentences: int) -> str:
    """Chinese prose, numbered."""
    return "".join(f"（{i + 1}）{CHINESE[(i * 2 + i // 5) % 5]}" for i in range(sentences))


def code(parts: int) -> str:
    """Python source."""
    return "".join(CODE[i % 4].format(n=i // 4) for i in range(parts))


def document_question() -> str:
    """A chat about a document."""
    return f"<|im_start|>user\nSummarise this text.\n\n{english(60)}<|im_end|>\n<|im_start|>assistant\n"


# name -> (text, tokens kept of it; None: all)
PROMPTS: dict[str, tuple[str, int | None]] = {
    **{name: (text, None) for name, text in SHORT.items()},
    "long_english": (english(60), 513),
    "long_chat": (document_question(), None),
    "long_chinese": (chinese(60), 960),
    "long_code": (code(120), 1250),
    "long_mixed": (english(40) + "\n\n" + code(40) + chinese(60), 1950),
}
