"""From the name a user types to a path on this machine.

What it is: name resolution and the way to Hugging Face. What it knows nothing about:
what is inside the files. Invariant: every failure is a ModelNotFoundError that says
what to do; nothing half-downloaded is ever returned.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from nanovllm.errors import ModelNotFoundError
from nanovllm.models import wheel_model

ALIASES = {"smollm2": wheel_model.SMOLLM2}
TINY_MODELS = ("tiny:random", "tiny:random-qwen2", "tiny:random-qwen3")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+\.gguf)?", re.ASCII)
# Sub-folders hold other formats of the same weights; they are left on the hub.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


def resolve(model: str, progress: bool = True) -> Path:
    """The directory or .gguf file that `model` names, downloaded first if need be.

    Accepts, in this order: an alias (`smollm2`), an existing directory or .gguf file, a
    Hugging Face id `org/name` (safetensors) or `org/name/FILE.gguf`. `progress` shows a
    bar on stderr while downloading. Raises ModelNotFoundError.
    """
    if model in ALIASES:
        return wheel_model.fetch(ALIASES[model], progress)
    if not model:
        raise _unknown(model)
    path = os.path.expanduser(model)  # os.path: pathlib raises for names too long or users unknown
    if os.path.isdir(path) or (os.path.isfile(path) and path.endswith(".gguf")):
        return Path(path)
    if os.path.exists(path):
        raise _not_found(f"{model!r} is neither a directory nor a .gguf file.", "Point to one of these.")
    if _HUB_ID.fullmatch(model) and ".." not in model and not model.startswith("."):
        return _from_hub(model, progress)
    raise _unknown(model)


def pull(name: str, progress: bool = True) -> Path:
    """Download what `name` (alias or Hugging Face id) names, unless it is here; returns its path."""
    return resolve(name, progress)


def _from_hub(model: str, progress: bool) -> Path:
    # Imported here: it takes a quarter second, and local models never need it.
    import huggingface_hub
    from tqdm import tqdm

    organisation, name, *rest = model.split("/")
    file = "/".join(rest)
    try:
        folder = huggingface_hub.snapshot_download(
            f"{organisation}/{name}",
            allow_patterns=[file] if file else _PATTERNS,
            ignore_patterns=None if file else ["*/*"],
            tqdm_class=None if progress else _quiet(tqdm),
        )
    except Exception as error:  # network, DNS, HTTP and cache errors have no common base
        raise _not_found(
            f"{model} cannot be fetched from the Hugging Face hub ({type(error).__name__}).",
            "Check its spelling and the network, or point to a directory or .gguf file.",
        ) from error
    path = Path(folder, file)
    if path.is_file() or (not file and any(path.glob("*.safetensors"))):
        return path
    raise _not_found(
        f"{model} was not found among that repository's files, or has no safetensors weights.",
        "For a GGUF repository, name one of its files: org/name/FILE.gguf.",
    )


def _quiet(base: type) -> type:
    """A progress bar that shows nothing."""

    class Quiet(base):  # type: ignore[misc]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Quiet


def _unknown(model: str) -> ModelNotFoundError:
    known = [*ALIASES, *TINY_MODELS]
    shown = model if len(model) <= 80 else model[:80] + "…"
    near = difflib.get_close_matches(model.lower(), known, n=1, cutoff=0.6)
    looks_like_path = "/" in model or model.endswith(".gguf")
    what = "There is no file or directory" if looks_like_path else "There is no model"
    hint = f"Did you mean {near[0]}?" if near else f"Known names are {', '.join(known)}; or give a path or a hub id."
    return _not_found(f"{what} {shown!r}.", hint)


def _not_found(message: str, hint: str) -> ModelNotFoundError:
    return ModelNotFoundError(message, param="model", hint=hint)
