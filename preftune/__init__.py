"""preftune: a language model and preferences in, a better model and the evidence that it is better out."""

import os

__version__ = "0.1.0"

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # huggingface_hub reads it once, when it is imported: so here, before anything is
