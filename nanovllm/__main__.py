"""`python -m nanovllm`: the same as the `nanovllm` command.

What it is: the module Python runs. What it knows nothing about: everything else.
Invariant: importing it does nothing.
"""

from __future__ import annotations

from nanovllm.cli.main import main

if __name__ == "__main__":
    main()
