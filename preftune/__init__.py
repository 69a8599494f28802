"""preftune: a language model and preferences in, a better model and the evidence that it is better out.

    import preftune

    run = preftune.dpo(model="path/to/model", data="pairs.jsonl", output="runs/first")

The functions are those of `api`, loaded when first asked for: importing the package costs nothing.
"""

import os
from typing import Any

__version__ = "0.1.0"

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # huggingface_hub reads it once, when it is imported: so here, before anything is

__all__ = ["Run", "__version__", "compare", "data_check", "data_convert", "dpo", "evaluation", "export", "load_run", "logprobs",
           "pair", "rate", "reward", "sample", "score", "sft"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'preftune' has no attribute {name!r}")
    from . import api

    return api.FUNCTIONS[name] if name in api.FUNCTIONS else getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
