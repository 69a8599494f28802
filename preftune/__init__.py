"""preftune: a language model and preferences in, a better model and the evidence that it is better out."""

__version__ = "0.1.0"
