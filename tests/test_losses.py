"""Every loss of the table against numbers worked by hand and against what must be true of any loss.

The sweeping tests run over `LOSSES`; a new loss needs its line in `GOLDEN` here, worked on paper, and nothing else in this file.
Try it: `pytest tests/test_losses.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from math import exp, log
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from preftune import exact, losses
from preftune.losses import LOSSES, Side, arguments, batchwise, distill, lists, pairs, reward, values, verdicts

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [name for name, loss in LOSSES.items() if loss.kind == "pairs"]
RANKED = [name for name, loss in LOSSES.items() if loss.kind in ("lists", "orders")]
SOFT = [name for name, loss in LOSSES.items() if loss.soft == "swap"]
SEPARABLE = [name for name in PAIRS if LOSSES[name].separable]
BATCHWISE = [name for name in PAIRS if not LOSSES[name].separable]
ANCHORED = [name for name, loss in LOSSES.items() if loss.reference != "none"]
FREE = [name for name, loss in LOSSES.items() if loss.reference == "none" and not loss.needs]
SCALAR = [name for name, loss in LOSSES.items() if loss.scalar != "no"]
ONLY = [name for name, loss in LOSSES.items() if loss.scalar == "only"]
STARTING = [name for name in ANCHORED if LOSSES[name].start]
READ_LOG_PI = ["wpo", "alpha-dpo"]  # anchored, yet log pi stands in them outside the log-ratio
NUMBERED = [(name, argument) for name in LOSSES for argument in arguments(name)]


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def ell(z: float) -> float:
    """-log sigmoid(z), written out."""
    return log(1 + exp(-z))


def sig(z: float) -> float:
    return 1 / (1 + exp(-z))


def odds(x: float) -> float:
    """log(p/(1-p)) of log p, written out."""
    return x - log(1 - exp(x))


def kl_to_label(m: float, e: float) -> float:
    """KL((q, 1-q) || (1-e, e)), q = sigmoid(m), written out."""
    return sig(m) * log(sig(m) / (1 - e)) + sig(-m) * log(sig(-m) / e)


def kl_of(p: float, q: float) -> float:
    """KL of (s, 1-s) to (t, 1-t), s = sigmoid(p), t = sigmoid(q), written out."""
    return sig(p) * log(sig(p) / sig(q)) + sig(-p) * log(sig(-p) / sig(-q))


# Three items each, at the defaults and at other arguments. Worked in the docstring of `test_golden`.
GOLDEN: dict[str, list[tuple[dict[str, float], list[float]]]] = {
    "sigmoid": [({}, [ell(0.2), log(2), ell(-0.3)]), ({"beta": 0.5}, [ell(1), log(2), ell(-1.5)])],
    "reference-free": [({}, [ell(0.3), ell(0.5), ell(-0.4)]), ({"beta": 1.0}, [ell(3), ell(5), ell(-4)])],
    "robust": [({}, [ell(0.2) - 0.025, log(2), ell(-0.3) + 0.0375]),
               ({"beta": 1.0, "noise": 0.25}, [ell(2) - 1, log(2), ell(-3) + 1.5])],
    "ipo-sum": [({}, [9, 25, 64]), ({"tau": 0.5}, [1, 1, 16])],
    "ipo-mean": [({}, [18.0625, 25, 42.25]), ({"tau": 0.5}, [0.0625, 1, 6.25])],
    "hinge": [({}, [0.9, 1, 1.15]), ({"beta": 1.0}, [0, 1, 4])],
    "sigmoid-norm": [({}, [ell(3.75), log(2), ell(-7.5)]), ({"beta": 2.0}, [ell(1.5), log(2), ell(-3)])],
    "simpo": [({}, [ell(-0.5), ell(1), log(2)]), ({"beta": 10.0, "gamma": 0.0}, [ell(2.5), ell(10), ell(5)])],
    "nll": [({}, [1, 1, 1.5])],
    "exo": [({}, [kl_to_label(0.2, 0.001), kl_to_label(0, 0.001), kl_to_label(-0.3, 0.001)]),
            ({"beta": 1.0, "epsilon": 0.1}, [kl_to_label(2, 0.1), kl_to_label(0, 0.1), kl_to_label(-3, 0.1)])],
    "nca": [({}, [ell(0.01) + ell(-0.01) / 2 + ell(0.01) / 2, 2 * log(2), ell(-0.02) + ell(0.02) / 2 + ell(-0.01) / 2]),
            ({"beta": 1.0}, [ell(1) + ell(-1) / 2 + ell(1) / 2, 2 * log(2), ell(-2) + ell(2) / 2 + ell(-1) / 2])],
    "bco": [({}, [ell(0.07 / 6) + ell(0.05 / 6), ell(0.01 / 6) + ell(-0.01 / 6), ell(-0.11 / 6) + ell(-0.07 / 6)]),
            ({"beta": 6.0}, [ell(7) + ell(5), ell(1) + ell(-1), ell(-11) + ell(-7)])],
    "bco-biased": [({}, [2 * ell(0.01), 2 * log(2), ell(-0.02) + ell(-0.01)]),
                   ({"beta": 1.0}, [2 * ell(1), 2 * log(2), ell(-2) + ell(-1)])],
    "sppo-hard": [({}, [498002, 500000, 503005]), ({"beta": 0.5}, [0, 2, 13])],
    "apo-zero": [({}, [2 * sig(-0.1), 1, sig(0.2) + sig(0.1)]), ({"beta": 1.0}, [2 * sig(-1), 1, sig(2) + sig(1)])],
    "apo-down": [({}, [sig(0.1) + sig(-0.2), 1, sig(-0.2) + sig(0.3)]), ({"beta": 1.0}, [sig(1) + sig(-2), 1, sig(-2) + sig(3)])],
    "aot": [({}, [ell(0.02), log(2), ell(-0.03)]), ({"beta": 1.0}, [ell(2), log(2), ell(-3)])],
    "aot-unpaired": [({}, [log(2), log(2), ell(-0.01)]), ({"beta": 1.0}, [log(2), log(2), ell(-1)])],
    "discopop": [({}, [sig(-2) * ell(0.1) + sig(2) * exp(-0.1), (log(2) + 1) / 2, sig(3) * ell(-0.15) + sig(-3) * exp(0.15)]),
                 ({"beta": 1.0, "tau": 0.5}, [sig(-4) * ell(2) + sig(4) * exp(-2), (log(2) + 1) / 2, sig(6) * ell(-3) + sig(-6) * exp(3)])],
    "f-forward-kl": [({}, [ell(0.1 * (exp(1) - exp(-1))), log(2), ell(0.1 * (exp(-1) - exp(2)))]),
                     ({"beta": 1.0}, [ell(exp(1) - exp(-1)), log(2), ell(exp(-1) - exp(2))])],
    "f-js": [({}, [ell(0.1), log(2), ell(0.1 * (ell(1) - ell(-2)))]), ({"beta": 1.0}, [ell(1), log(2), ell(ell(1) - ell(-2))])],
    "f-alpha": [({}, [ell(0.2 * (exp(0.5) - exp(-0.5))), log(2), ell(0.2 * (exp(-0.5) - exp(1)))]),
                ({"beta": 1.0, "alpha": 1.0}, [ell(exp(1) - exp(-1)), log(2), ell(exp(-1) - exp(2))])],
    "chi-po": [({}, [ell(0.05 * (exp(1) - exp(-1) + 2)), log(2), ell(0.05 * (exp(-2) - exp(1) - 3))]),
               ({"beta": 1.0}, [ell(exp(1) - exp(-1) + 2), log(2), ell(exp(-2) - exp(1) - 3)])],
    "orpo": [({}, [1 + 0.1 * ell(odds(-1) - odds(-1.25)), 1 + 0.1 * ell(odds(-1) - odds(-2)), 1.5 + 0.1 * ell(odds(-1.5) - odds(-2))]),
             ({"lam": 1.0}, [1 + ell(odds(-1) - odds(-1.25)), 1 + ell(odds(-1) - odds(-2)), 1.5 + ell(odds(-1.5) - odds(-2))])],
    "slic": [({}, [0.1, 0.1, 5.15]), ({"delta": 4.0, "lam": 0.0}, [1.0, 0.0, 8.0])],
    "cpo": [({}, [ell(0.3) + 2, ell(0.5) + 3, ell(-0.4) + 6]), ({"beta": 1.0, "lam": 0.5}, [ell(3) + 1, ell(5) + 1.5, ell(-4) + 3])],
    "alphapo": [({}, [ell(8 * (exp(0.3125) - exp(0.25)) - 1), ell(8 * (exp(0.5) - exp(0.25)) - 1), ell(8 * (exp(0.5) - exp(0.375)) - 1)]),
                ({"beta": 1.0, "gamma": 0.5, "alpha": 1.0},
                 [ell(exp(1.25) - exp(1) - 0.5), ell(exp(2) - exp(1) - 0.5), ell(exp(2) - exp(1.5) - 0.5)])],
    "dpop": [({}, [ell(0.6), log(2), ell(-30.9)]), ({"beta": 1.0, "lam": 1.0}, [ell(2), log(2), ell(-5)])],
    "cal-dpo": [({}, [ell(2) + 16, log(2) + 25, ell(-3) + 42.5]), ({"beta": 0.5, "lam": 1.0}, [ell(2), log(2) + 2, ell(-3) + 13])],
    "r-dpo": [({}, [ell(0.1), ell(-0.05), ell(-0.15)]), ({"beta": 1.0, "per_token": 0.5}, [ell(1), ell(-0.5), ell(-1.5)])],
    "wpo": [({}, [exp(-0.5) * ell(0.02), log(2), ell(-0.03)]), ({"beta": 1.0, "cap": 4.0}, [exp(-0.5) * ell(2), log(2), 4 * ell(-3)])],
    "ld-dpo": [({}, [ell(0.175), log(2), ell(-0.25)]), ({"beta": 1.0, "tail": 0.0}, [ell(1.5), log(2), ell(-2)])],
    "d2po": [({}, [ell(0.20002), log(2), ell(-0.29702)]), ({"beta": 1.0, "decay": 0.5}, [ell(2.125), log(2), ell(-2.375)])],
    "alpha-dpo": [({}, [ell(2.5 * (0.25 - 0.2 / 0.875**0.5) - 1.5), ell(2.5 * (1 - 0.05 / 0.875**0.5) - 1.5),
                        ell(2.5 * (0.5 + 0.25 / 0.875**0.5) - 1.5)]),
                  ({"beta": 1.0, "gamma": 0.5, "alpha": 1.0},
                   [ell(0.25 - 1 / 0.875**0.5 - 0.5), ell(1 - 0.25 / 0.875**0.5 - 0.5), ell(0.5 + 1.25 / 0.875**0.5 - 0.5)])],
    "beta-dpo": [({}, [ell(0.164), log(2), ell(-0.246)]), ({"beta": 1.0, "scale": 2.0, "momentum": 0.5}, [ell(4 / 3), log(2), ell(-2)])],
    "kto": [({}, [1 - sig(0.05), 1 - sig(0.15), 1 - sig(-0.05)]),
            ({"beta": 1.0, "desirable_weight": 2.0, "undesirable_weight": 3.0},
             [2 * (1 - sig(0.5)), 3 * (1 - sig(1.5)), 2 * (1 - sig(-0.5))])],
    "plackett-luce": [({}, [log(21 / 8), log(77 / 4), log(7)]), ({"beta": 0.2}, [log(105 / 64), log(777 / 8), log(21)])],
    "plackett-luce-breslow": [({}, [log(21 / 8), log(49 / 2), log(7)]), ({"beta": 0.2}, [log(105 / 64), log(441 / 4), log(21)])],
    "plackett-luce-davidson": [({}, [log((11 + 3 * 2**0.5) * (3 + 2**0.5) / 8), log((11 + 3 * 2**0.5) / 2**0.5), log(11 + 3 * 2**0.5)]),
                               ({"beta": 0.2, "nu": 0.5}, [log(87 / 32), log(29), log(29)])],
    "lipo": [({}, [(2 - 2**0.5) * (1 / log(2) - 1 / log(3)) * log(1 + 0.5**0.5) + log(1.5) / log(4)
                   + (2**0.5 - 1) * (1 / log(3) - 1 / log(4)) * log(1 + 0.5**0.5),
                   (2**0.75 - 1) * ((1 / log(2) - 1 / log(3)) * log(1 + 2**0.5) + log(3) / log(4)),
                   (2 - 2**0.25) * ((1 / log(3) - 1 / log(4)) * log(1 + 2**0.5) + log(3) / log(4))]),
             ({"beta": 0.1}, [(2 - 2**0.5) * (1 / log(2) - 1 / log(3)) * log(1.5) + log(1.25) / log(4)
                              + (2**0.5 - 1) * (1 / log(3) - 1 / log(4)) * log(1.5),
                              (2**0.75 - 1) * ((1 / log(2) - 1 / log(3)) * log(3) + log(5) / log(4)),
                              (2 - 2**0.25) * ((1 / log(3) - 1 / log(4)) * log(3) + log(5) / log(4))])],
    "s-dpo": [({}, [log(7 / 4), log(15), log(7)]), ({"beta": 0.2}, [log(21 / 16), log(85), log(21)])],
    "tdpo1": [({}, [ell(0.1), ell(0.1), ell(-0.2)]), ({"beta": 1.0}, [ell(1), ell(1), ell(-2)])],
    "tdpo2": [({}, [ell(0.15), ell(0.05), ell(-0.25)]), ({"beta": 1.0, "alpha": 2.0}, [ell(0), ell(2), ell(-1)])],
    "soft": [({}, [ell(0.2) + sig(-1) * 0.2, log(2), ell(-0.3) - 0.15]),
             ({"beta": 1.0, "unit": 0.5}, [ell(2) + sig(-2) * 2, log(2), ell(-3) - 1.5])],
    "soft-square": [({}, [0.64, 1, 0.09]), ({"beta": 1.0, "unit": 0.5}, [0, 4, 9])],
    "soft-kl": [({}, [kl_of(1, 0.2), kl_of(-1, 0), kl_of(0, -0.3)]), ({"beta": 1.0, "unit": 0.5}, [0, kl_of(-2, 0), kl_of(0, -3)])],
    "soft-reverse-kl": [({}, [kl_of(0.2, 1), kl_of(0, -1), kl_of(-0.3, 0)]),
                        ({"beta": 1.0, "unit": 0.5}, [0, kl_of(0, -2), kl_of(-3, 0)])],
    "soft-pessimistic": [({}, [0.64, 0, 0.49]), ({"beta": 1.0, "unit": 0.5}, [0, 0, 1])],
    "rebel": [({}, [1, 1, 9]), ({"eta": 0.5}, [2.25, 0.25, 9])],
    "value": [({}, [(log(2) + 1) ** 2, (log(3) - log(2)) ** 2, 4]),
              ({"beta": 0.5}, [(0.5 * log(5) + 0.5) ** 2, (log(3) - 0.5 * log(5)) ** 2, 1])],
    "value-quantile": [({}, [(0.25 - 0.1 * log(0.1 * (exp(10) - 1)) - 0.1) ** 2, (0.75 - 0.1 * log(0.1 * (exp(10) - 1))) ** 2,
                             (0.5 - 0.1 * log(0.1 * (exp(10) - 1)) + 0.2) ** 2]),
                       ({"beta": 1.0}, [(-0.75 - log(exp(1) - 1)) ** 2, (0.75 - log(exp(1) - 1)) ** 2, (2.5 - log(exp(1) - 1)) ** 2])],
    "value-learned": [({}, [2, log(3) ** 2 / 2, 12.5]), ({"beta": 0.5}, [1.125, log(3) ** 2 / 2, 8])],
    "anchor": [({}, [-1, 0, 2])],
    "optimism": [({}, [1, 0, -2])],
    "bradley-terry": [({}, [ell(2), ell(-1), ell(-3)]), ({"margin": 1.0}, [ell(1), ell(-2), ell(-4)])],
    "bradley-terry-margin": [({}, [log(2), ell(-1), ell(-2)]), ({"scale": 0.5}, [ell(1), ell(-1), ell(-2.5)])],
    "centre": [({}, [0, 1, 1])],
    "davidson": [({}, [log((6 + 8**0.5) / 4 * 7 / 4 * (3 + 2**0.5) / 2), log((3 + 2**0.5) / 2**0.5 * (6 + 8**0.5) / 2 * 7),
                       log((3 + 2**0.5) * 7)]),
                 ({"nu": 0.5}, [log((6 + 2**0.5) / 4 * 6 / 4 * (3 + 0.5**0.5) / 2), log((3 + 0.5**0.5) / 0.5**0.5 * (6 + 2**0.5) / 2 * 6),
                                log((3 + 0.5**0.5) * 6)])],
    "rao-kupper": [({}, [log(6), log(150), log(45)]), ({"theta": 1.5}, [log(7 / 4 * 11 / 8 * 7 / 4), log(28 / 5 * 4 * 7), log(28)])],
    "binary": [({}, [ell(1), ell(1), log(2)])],
    "grades": [({}, [ell(1), ell(-1) - 0.75, log(2)]), ({"low": -1.0, "high": 3.0}, [ell(1) + 0.5, ell(-1) - 0.6875, log(2)])],
    "square": [({}, [0, 1.5625, 0.25])],
    "nominal": [({}, [log(2), log(5 / 3), log(3)])],
}  # fmt: skip


def worked(name: str) -> tuple:
    if name in BATCHWISE:
        return (*pairs.WORKED, batchwise.ONES, *carried(name))
    if LOSSES[name].kind == "draws" or name == "value-learned":
        return values.WORKED[:1]
    if name in ONLY:
        return reward.WORKED[LOSSES[name].kind]
    return {"pairs": pairs, "verdicts": verdicts, "scored": distill, "values": values}.get(LOSSES[name].kind, lists).WORKED


def carried(name: str) -> tuple:
    """What a loss that looks back finds before the first step."""
    return (LOSSES[name].carry,) if LOSSES[name].carry else ()


def expected(loss: losses.Loss, *judged: Tensor, **numbers: float) -> Tensor:
    """The sum over pairs, at the first step."""
    return losses.expected(loss, *judged, loss.carry, **numbers)


def soft(name: str, chosen: Side, rejected: Side, prob: Tensor | float, **numbers: float) -> Tensor:
    """P f(w, l) + (1 - P) f(l, w), written out; for losses without batch statistics."""
    function = LOSSES[name].function
    return prob * function(chosen, rejected, **numbers) + (1 - prob) * function(rejected, chosen, **numbers)


def short(policy: Tensor, reference: Tensor, length: Tensor) -> Side:
    """A side whose first token is all there is to it; the rest is forced. Its score is its place."""
    score = torch.arange(len(length), dtype=length.dtype)
    return Side(policy, reference, length, tokens=(policy - reference)[:, None], collision=torch.zeros_like(length), score=score,
                member=torch.stack([score, -score], 1), kl=torch.zeros_like(length), value=torch.zeros_like(length),
                classes=torch.stack([0 * policy, policy, -policy], 1))  # fmt: skip


def batch(size: int, *, seed: int = 0, spread: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Side, Side]:
    """Two sides of log-probs as real responses have them: -1 to -4 nats a token over 1 to 40 tokens."""
    rng, more = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def side() -> Side:
        length = rng.integers(1, 41, size=size)
        policy = -length * rng.uniform(1, 4, size=size)
        tokens = np.where(np.arange(40) < length[:, None], spread * rng.normal(size=(size, 40)), 0)
        columns = (policy, policy - tokens.sum(1), length, tokens, -length * rng.uniform(1, 4, size=size), rng.normal(size=size),
                   rng.normal(size=(size, 3)), rng.uniform(0, 3, size=size), more.normal(size=size),
                   np.stack([0 * policy, policy / 9, -policy / 9], 1))  # fmt: skip
        return Side(*(torch.tensor(x, dtype=dtype) for x in columns))

    return side(), side()


def items(name: str, chosen: Side, rejected: Side, **numbers: float) -> Tensor:
    """The loss of each item; verdicts read `chosen`, every other one desirable, at baseline .3; lists are of two; single responses are
    `chosen`, each the one sample of its prompt."""
    if name in BATCHWISE:
        return LOSSES[name].function(chosen, rejected, torch.ones_like(chosen.policy), *carried(name), **numbers)
    if LOSSES[name].kind in ("pairs", "scored"):
        return LOSSES[name].function(chosen, rejected, **numbers)
    if LOSSES[name].kind in ("values", "draws"):
        draws = (values.Draws(torch.arange(len(chosen.policy)), torch.ones_like(chosen.policy)),) if LOSSES[name].kind == "values" else ()
        return LOSSES[name].function(chosen, *draws, **numbers)
    if name in RANKED:
        place = torch.arange(2 * len(chosen.policy))
        columns = [(getattr(chosen, k), getattr(rejected, k)) for k in ("policy", "reference", "length")]
        both = Side(*(None if one is None else torch.stack([one, other], 1).flatten() for one, other in columns))
        return LOSSES[name].function(both, lists.Rankings(place // 2, place % 2), **numbers)
    if LOSSES[name].kind in ("grades", "classes"):
        chosen = replace(chosen, score=(9 * chosen.score).abs().floor() % 3) if name == "nominal" else chosen
        return LOSSES[name].function(chosen, **numbers)
    desirable = torch.arange(len(chosen.policy)) % 2 == 0
    return LOSSES[name].function(chosen, desirable, torch.tensor(0.3, dtype=chosen.policy.dtype), **numbers)


# ---- the table -------------------------------------------------------------------------------------------------------------


def test_the_sweeps_sweep():
    """Every loss has hand-worked numbers, and each sweep below has something to run over."""
    assert set(GOLDEN) == set(LOSSES)
    assert len(LOSSES) >= 35 and len(PAIRS) >= 34 and len(SOFT) >= 33 and len(BATCHWISE) >= 5
    assert len(ANCHORED) >= 29 and len(FREE) >= 6 and len(NUMBERED) >= 55 and len(STARTING) >= 26
    assert set(ANCHORED) | set(FREE) | set(ONLY) == set(LOSSES) and len(ONLY) >= 8 and len(SCALAR) >= 14


@pytest.mark.parametrize("name", LOSSES)
def test_line_of_the_table(name):
    loss = LOSSES[name]
    assert loss.kind in {"pairs", "verdicts", "lists", "orders", "scored", "values", "draws", "grades", "classes"} and loss.source
    assert loss.reference in {"none", "token", "distribution"}
    assert loss.soft in {"swap", "ignore", "refuse"}
    assert {*loss.needs} <= {"tokens", "collision", "score", "member", "kl", "value", "classes"}
    assert loss.scalar in {"no", "too", "only"} and (loss.scalar != "only" or loss.reference == "none")
    data = {"r-dpo": "lengths", "wpo": "the weights", "alpha-dpo": "log pi", "lipo": "the model's own order",
            "value": "rewards of a prompt's samples", "value-quantile": "rewards of a prompt's samples", "value-learned": "rewards"}
    free = name in {"bradley-terry-margin", "square", "nominal"} if name in ONLY else loss.reference == "none" or name in data
    assert (loss.start is None) == free, "policy = reference fixes a value where there is a reference and nothing else is read"
    assert all(isinstance(v, float) for v in arguments(name).values())
    assert not {"temperature", "divisor"} & set(arguments(name)), "beta multiplies the log-ratio; there is no second convention"
    assert loss.function.__doc__.count(">>>") >= 1


@pytest.mark.parametrize("name", LOSSES)
def test_page(name):
    """Each loss has its page with formula, defaults, call and numbers, and stands in both indexes."""
    page = (ROOT / "docs" / "losses" / f"{name}.md").read_text()
    for heading in ("## Formula", "## What it optimises", "## When to use it", "## Traps", "## Call", "## Numbers"):
        assert heading in page, heading
    for argument, default in arguments(name).items():
        assert f"| `{argument}` | {default:g} |" in page, f"{argument} with its default is missing in the table of options"
    for _, golden in GOLDEN[name]:
        assert any(all(f"| {v:.6f} " in line or f"| {v:g} " in line for v in golden) for line in page.splitlines()), golden
    assert f"[{name}]({name}.md)" in (ROOT / "docs" / "losses" / "index.md").read_text()
    assert f"| [{name}](losses/{name}.md) |" in (ROOT / "docs" / "papers.md").read_text()


def test_arguments():
    assert arguments("simpo") == {"beta": 2.0, "gamma": 1.0}
    assert list(arguments("kto")) == ["beta", "desirable_weight", "undesirable_weight"]
    assert arguments("nll") == {}
    assert list(arguments("aot")) == ["beta"], "the weights of a batch statistic are no option"


# ---- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_golden(name):
    """Numbers worked on paper from the formula. The three pairs of `pairs.WORKED`:

    |        | log pi_w, log ref_w, n_w | log pi_l, log ref_l, n_l | a_w, a_l | D  | a/n gap | log pi gap | per token |
    |--------|--------------------------|--------------------------|----------|----|---------|------------|-----------|
    | first  | -2, -3, 2                | -5, -4, 4                | 1, -1    | 2  | .75     | 3          | .25       |
    | second | -3, -3, 3                | -8, -8, 4                | 0, 0     | 0  | 0       | 5          | 1         |
    | third  | -6, -4, 4                | -2, -3, 1                | -2, 1    | -3 | -1.5    | -4         | .5        |

    sigmoid: m = .1 D = .2, 0, -.3 gives log(1+e^-m) = .598139, .693147, .854355;
    at beta .5 m = 1, 0, -1.5: .313262, .693147, 1.701413.
    robust: -ls(m) - m e/(1-2e); e = .1 gives e/(1-2e) = .1/.8 = .125; e = .25 gives .25/.5 = .5.
    ipo-sum: tau .1 aims at 5: 3^2, 5^2, 8^2; tau .5 aims at 1: 1^2, 1^2, 4^2. ipo-mean: 4.25^2, 5^2, 6.5^2; .25^2, 1^2, 2.5^2.
    hinge: 1 - .05 D = .9, 1, 1.15; 1 - D = -1 -> 0, 1, 4.
    sigmoid-norm: 5 times the gap = 3.75, 0, -7.5; twice = 1.5, 0, -3.
    simpo: 2 * (.25, 1, .5) - 1 = -.5, 1, 0; 10 * (.25, 1, .5) = 2.5, 10, 5.
    nll: 2/2, 3/3, 6/4.
    exo: KL((q, 1-q) || (1-e, e)) written out with q = sigmoid(m), m = .2, 0, -.3 and 2, 0, -3.
    nca, bco-biased: ell(z) = -ls(z) at beta a_w = .01, 0, -.02 and beta a_l = -.01, 0, .01.
    bco: the six a sum to -1, so their mean is -1/6; a_w - mean = 7/6, 1/6, -11/6 and mean - a_l = 5/6, -1/6, -7/6.
    sppo-hard: 1/(2 beta) = 500: 2 * 499^2, 2 * 500^2, 502^2 + 501^2; 1/(2 beta) = 1: (0, 0), (1, 1), (9, 4).
    apo: 1 - sig(z) = sig(-z). aot: -4, 3, 5 meet -1, 1, 5: the third pair is lowest on both sides, the first in the middle.
    aot-unpaired: a_w in order -2, 0, 1 meet a_l -1, 0, 1: gaps -1 (third pair), 0, 0.
    discopop: m = .1, 0, -.15 over tau = 2, 0, -3; m = 2, 0, -3 over tau .5 = 4, 0, -6.
    f-*: f'(u_w) - f'(u_l) for a = (1, -1), (0, 0), (-2, 1). JS: ls(1) - ls(-1) = 1 and ls(-2) - ls(1) = ell(1) - ell(-2).
    orpo, alphapo: log pi/n = -1, -1, -1.5 and -1.25, -2, -2. cpo: 3, 5, -4 and log pi_w = -2, -3, -6.
    dpop: max(0, -a_w) = 0, 0, 2: -3 - 50 * 2 = -103, times .3; -3 - 2 = -5. cal-dpo: 1/(2 beta) = 5: 4^2 + 4^2, 5^2 + 5^2, 7^2 + 6^2.
    r-dpo: n_w - n_l = -2, -1, 3. wpo: weights e^-.5, 1 and e^1.5 = 4.48, which the caps 1 and 4 cut.
    ld-dpo: the shorter sides have 2, 3, 1 tokens: 1 - (-.5 - .5/2) = 1.75, 0, (-1 - 1/2) - 1 = -2.5; without tails 1.5, 0, -2.
    d2po: .98: (1.5 - .49) - (-1 + .49 - .4802) = 2.0002, 0, (-1 - .49 - .4802) - 1; .5: 1.25 + .875, 0, -1.375 - 1.
    beta-dpo: M = -1/3, M0 = .1 M, so b = .1 (1 - .6 * .3) = .082; with momentum .5 M0 = M/2, so b = 1 - 2/6 and D = 2, 0, -3.
    alpha-dpo: .75, 0, -1.5 less their mean -.25: 1, .25, -1.25, over sqrt((1 + .0625 + 1.5625)/3) = sqrt .875.
    The lists (`lists.WORKED`) at beta .1: p = 4 > 2 > 1; 2 = 1 > 4; 1 > {2, 4}; at beta .2 the squares, at .05 the roots.
    plackett-luce: (7/4)(3/2); 7 (7 - 3/2)/2; 7; squares: (21/16)(5/4), 21 (21 - 5/2)/4, 21. breslow: 7 * 7/2, 21 * 21/4.
    davidson: sets of 4, 2, 1: 7 + (2 + 2 sqrt 2 + sqrt 2) + 2, of 2, 1: 3 + sqrt 2; squares, nu .5: 21 + .5 (8 + 4 + 2) + .25 * 4 = 29,
    5 + .5 * 2 = 6: (29/16)(6/4), 29/(.5 * 2), 29. lipo: its docstring. s-dpo: 1 + 3/4, (1 + 2)(1 + 4), 7; 1 + 5/16, 5 * 17, 21.
    kto (`verdicts.WORKED`: a = 1, -1, 0; good, bad, good; z0 = .5): beta(a - z0) = .05, beta(z0 - a) = .15, beta(a - z0) = -.05;
    at beta 1 and weights 2 and 3: .5, 1.5, -.5, so 2(1 - .622459), 3(1 - .817574), 2(1 - .377541) = .755081, .547277, 1.244919.
    tdpo: K_l - K_w = 1, -1, -1: D - 1 (1, -1, -1) = 1, 1, -2; times .5 1.5, .5, -2.5; times 2: 0, 2, -1.
    soft-*, rebel (`distill.WORKED`: the same pairs, d = 1, -1, 0, members (1, 3), (-1, 1), (-1, -3)): m = .2, 0, -.3; at beta 1, unit .5
    m = 2, 0, -3 against 2, -2, 0 and, what the members are sure of, t = 2, 0, -2. soft is -ls(m) + (1-s) m. rebel: D - eta d.
    value, value-quantile (`values.WORKED`: a = 1, 0, -2; rewards 0, ln 3 of one prompt, 2 of another): Z = (1 + 3)/2, at beta .5 (1 + 9)/2,
    the other's V is its own reward 2; quantiles .25, .75, .5 less beta ln(beta (e^(1/beta) - 1)). anchor, optimism: -a and a.
    nominal: odds 1:1:2, 3:1:1, 1:1:1 of the classes 2, 0, 1: 2/4, 3/5, 1/3.
    value-learned (a value model says 1, 0, -1): 0 - 1 - 1, ln 3, 2 + 1 + 2, squared, halved; at beta .5: -1.5, ln 3, 4.
    """
    for numbers, golden in GOLDEN[name]:
        values = LOSSES[name].function(*worked(name), **numbers)
        torch.testing.assert_close(values, f64(*golden), rtol=1e-13, atol=1e-12)
    assert any(numbers for numbers, _ in GOLDEN[name]) == bool(arguments(name)), "work a second set of arguments"


@pytest.mark.parametrize("name", STARTING)
def test_value_where_policy_is_reference(name):
    """ln 2 for the logistic losses, 1/(4 tau^2) for IPO, 1 for hinge, half the weight for KTO; at odd arguments too."""
    chosen, rejected = (replace(s, policy=s.reference, tokens=0 * s.tokens, kl=0 * s.kl) for s in batch(6))
    loss = LOSSES[name]
    for numbers in (arguments(name), {k: v if k == "keep" else 0.7 * v for k, v in arguments(name).items()}):
        if loss.kind == "scored":
            values = items(name, chosen, rejected, **numbers)
            gaps = zip((chosen.score - rejected.score).tolist(), (chosen.member - rejected.member).tolist(), strict=True)
            start = [loss.start(numbers, *gap) for gap in gaps]
        elif loss.kind != "verdicts":
            shape = ((1, 1), 0) if name in RANKED else ()
            values, start = items(name, chosen, rejected, **numbers), [loss.start(numbers, *shape)] * 6
        else:
            flags = [True, False] * 3
            zero = verdicts.baseline(chosen.ratio)
            values = loss.function(chosen, torch.tensor(flags), zero, **numbers)
            start = [loss.start(numbers, flag) for flag in flags]
        torch.testing.assert_close(values, f64(*start), rtol=1e-13, atol=1e-12)


def test_known_starts():
    """Said once in digits: DPO .693147, IPO 25 at tau .1, hinge 1, KTO .5 and half the weight."""
    starts = {name: LOSSES[name].start(arguments(name)) for name in STARTING if LOSSES[name].kind == "pairs"}
    known = {"sigmoid": log(2), "robust": log(2), "sigmoid-norm": log(2), "ipo-sum": 25, "ipo-mean": 25, "hinge": 1,
             "exo": 2.761231, "nca": 1.386294, "bco": 1.386294, "sppo-hard": 500000, "apo-zero": 1, "apo-down": 1, "discopop": 0.846574,
             "cal-dpo": 25.693147, "chi-po": log(2), "aot": log(2), "ld-dpo": log(2)}  # fmt: skip
    assert {name: starts[name] for name in known} == pytest.approx(known)
    assert LOSSES["kto"].start(arguments("kto") | {"undesirable_weight": 3.0}, False) == 1.5


@pytest.mark.parametrize(("name", "argument"), NUMBERED)
def test_every_argument_changes_the_value(name, argument):
    """An option that changes nothing is a lie."""
    before = LOSSES[name].function(*worked(name))
    after = LOSSES[name].function(*worked(name), **{argument: arguments(name)[argument] * (0.5 if argument == "keep" else 1.5) or 0.5})
    assert (before != after).any()


# ---- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name, monkeypatch):
    """Autograd through a tabular softmax equals central differences, with the labels' true probabilities and with hard labels.

    What a loss holds constant (WPO's weights, BCO's shift, the z of alpha-DPO) is held constant.
    """
    rng = np.random.default_rng(1)
    theta = torch.tensor(np.log(exact.B4.reference) + rng.normal(size=4))
    for prob in (None, [1.0] * (24 if name in RANKED else 6)):

        def value(t: Tensor, prob=prob) -> Tensor:
            return exact.population_loss(name, t.log_softmax(-1), exact.B4, lengths=[1, 2, 3, 5], prob=prob)

        gradient = torch.autograd.functional.jacobian(value, theta)
        kept: list[Tensor] = []
        with make.what_was_detached(kept, monkeypatch):
            size = max(1.0, abs(value(theta).item()))
        for k, unit in enumerate(torch.eye(4, dtype=torch.float64) * 1e-5):
            difference = []
            for moved in (theta + unit, theta - unit):
                with make.what_was_detached(kept, monkeypatch):
                    difference.append(value(moved))
            assert abs((difference[0] - difference[1]).item() / 2e-5 - gradient[k].item()) < 1e-8 * size
        assert gradient.abs().max() > 1e-4
        assert abs(gradient.sum()) < 1e-12, "a constant added to all logits of a position changes nothing"


def test_what_is_held_constant():
    """On `WORKED`. WPO: its weight times DPO's gradient. BCO: -beta (1 - sig(beta a_w - d)). alpha-DPO: -beta (1 - sig(..)) / n_w."""
    (chosen, rejected), ones = pairs.WORKED, batchwise.ONES

    def slope(function, *more: Tensor, **numbers: float) -> Tensor:
        policy = chosen.policy.clone().requires_grad_()
        return torch.autograd.grad(function(replace(chosen, policy=policy), rejected, *more, **numbers).sum(), policy)[0]

    dpo = slope(pairs.sigmoid, beta=1.0)
    torch.testing.assert_close(slope(LOSSES["wpo"].function, beta=1.0, cap=4.0), f64(exp(-0.5), 1, 4) * dpo)
    shifted = [sig(-7 / 6), sig(-1 / 6), sig(11 / 6)]  # a_w - mean = 7/6, 1/6, -11/6
    torch.testing.assert_close(slope(batchwise.bco, ones, beta=1.0), -f64(*shifted))
    z = f64(1, 0.25, -1.25) / 0.875**0.5
    inside = f64(0.25, 1, 0.5) - z - 0.5
    carry = LOSSES["beta-dpo"].carry  # D = 2, 0, -3 at b = 2/3, which carries no gradient
    found = slope(batchwise.beta_dpo, ones, carry, beta=1.0, scale=2.0, momentum=0.5)
    torch.testing.assert_close(found, -2 / 3 * torch.sigmoid(-f64(4 / 3, 0, -2)))
    torch.testing.assert_close(slope(batchwise.alpha_dpo, ones, beta=1.0, gamma=0.5, alpha=1.0), -torch.sigmoid(-inside) / chosen.length)


def test_dpo_gradient():
    """-beta sigmoid(r_l - r_w)(grad log pi_w - grad log pi_l): B4, log ref + (.2, -.1, .3, 0), 3 over 0, beta .5.

    log Z cancels in the pair, so r_w - r_l = .5 (0 - .2) = -.1: loss log(1 + e^.1) = .744397, weight sigmoid(.1) = .524979,
    and log pi_3 - log pi_0 = theta_3 - theta_0, so the gradient is .5 * .524979 = .262490 at 0, its negative at 3.
    """
    theta = torch.tensor(np.log(exact.B4.reference)) + f64(0.2, -0.1, 0.3, 0)

    def value(t: Tensor) -> Tensor:
        return exact.population_loss("sigmoid", t.log_softmax(-1), exact.B4, pairs=[(3, 0)], prob=[1.0], beta=0.5)

    assert value(theta).item() == pytest.approx(0.74439666, abs=1e-8)
    expected = f64(0.26248959, 0, 0, -0.26248959)
    torch.testing.assert_close(torch.autograd.functional.jacobian(value, theta), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probs(name):
    """Thousands of nats in either direction: value and gradient stay finite. log(sigmoid(z)) written out would not."""
    for low, high in ((-2e4, -1.0), (-1.0, -2e4)):
        policy = f64(low, high).requires_grad_()
        chosen = short(policy, f64(high, low), f64(500, 500))
        rejected = short(policy.flip(0), f64(low, high), f64(500, 500))
        values = items(name, chosen, rejected)
        values.sum().backward()
        assert values.isfinite().all() and policy.grad.isfinite().all()


# ---- symmetries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_per_item_and_order(name):
    """One value per item in the inputs' precision; items see each other only where the table says so; order and doubling change no mean."""
    chosen, rejected = batch(6, spread=2)
    values = items(name, chosen, rejected)
    assert values.shape == (6,) and values.dtype == torch.float64
    assert items(name, *batch(6, dtype=torch.float32)).dtype == torch.float32
    order = torch.tensor([4, 1, 0, 5, 2, 3])  # keeps even places even, so that verdicts keep their labels
    shuffled = items(name, chosen[order], rejected[order])
    if LOSSES[name].kind != "verdicts":
        torch.testing.assert_close(shuffled, values[order], rtol=1e-13, atol=1e-13 if name in BATCHWISE else 0)
    twice = torch.arange(12) % 6
    torch.testing.assert_close(items(name, chosen[twice], rejected[twice]).mean(), values.mean(), rtol=1e-13, atol=1e-12)
    alone = torch.cat([items(name, chosen[[k]], rejected[[k]]) for k in (0, 2, 4)])
    assert torch.equal(alone, values[::2]) == (name not in BATCHWISE)


@pytest.mark.parametrize("name", ANCHORED)
def test_what_the_prompt_adds_cancels(name):
    """A number added to log pi and log ref of the same response, as a counted prompt would add it, changes nothing."""
    chosen, rejected = batch(5)
    moved = [replace(s, policy=s.policy - 7.25, reference=s.reference - 7.25) for s in (chosen, rejected)]
    if name in READ_LOG_PI:
        assert (items(name, *moved) != items(name, chosen, rejected)).any()
        return
    torch.testing.assert_close(items(name, *moved), items(name, chosen, rejected), rtol=1e-10, atol=1e-10)
    biased = [replace(s, policy=s.policy - 7.25) for s in (chosen, rejected)]
    if LOSSES[name].kind in ("verdicts", "values", "draws", "grades"):
        assert (items(name, *biased) != items(name, chosen, rejected)).all(), "one response has no other side to cancel against"


@pytest.mark.parametrize("name", FREE)
def test_reference_free_losses_never_touch_the_reference(name):
    chosen, rejected = (Side(s.policy, None, s.length) for s in batch(4))
    assert not LOSSES[name].needs
    assert items(name, chosen, rejected).isfinite().all()


@pytest.mark.parametrize("name", ANCHORED)
def test_anchored_losses_read_the_reference(name):
    chosen, rejected = batch(4)
    other = replace(chosen, reference=chosen.reference + 0.5, tokens=chosen.tokens - f64(*[0.5] + [0] * 39))
    assert (items(name, chosen, rejected) != items(name, other, rejected)).all()


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_soft_labels(name):
    """P = 1 is the hard loss, P = 0 that of the swapped pair; swapping with P -> 1 - P changes nothing; P is votes for and against."""
    loss, (chosen, rejected), one = LOSSES[name], batch(8), torch.ones(8, dtype=torch.float64)
    same(expected(loss, chosen, rejected, one, one), items(name, chosen, rejected).sum())
    same(expected(loss, chosen, rejected, 0 * one, one), items(name, rejected, chosen).sum())
    prob, votes = torch.linspace(0, 1, 8, dtype=torch.float64), f64(1, 2, 3, 1, 2, 3, 1, 0)
    value = expected(loss, chosen, rejected, prob, votes)
    same(expected(loss, rejected, chosen, 1 - prob, votes), value)
    if loss.soft == "swap":
        for_, against = votes * prob, votes * (1 - prob)
        both = torch.arange(16) % 8
        turned = [Side(*(torch.cat([x, getattr(t, k)]) for k, x in vars(s).items() if x is not None))
                  for s, t in ((chosen, rejected), (rejected, chosen))]  # fmt: skip
        same(expected(loss, *turned, torch.ones(16, dtype=torch.float64), torch.cat([for_, against])), value)
        assert len(both) == 16 and not torch.equal(value, expected(loss, chosen, rejected, one, votes))
    if loss.soft == "swap" and loss.separable:
        same((soft(name, chosen, rejected, prob) * votes).sum(), value)


@pytest.mark.parametrize("name", PAIRS)
def test_two_votes_are_the_pair_twice(name):
    """Also inside a batch statistic: sorted masses, means and spreads count votes."""
    loss, (chosen, rejected), rows = LOSSES[name], batch(4), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    votes = f64(2, 1, 3, 1)
    once = expected(loss, chosen, rejected, torch.ones(4, dtype=torch.float64), votes)
    same(expected(loss, chosen[rows], rejected[rows], torch.ones(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)), once)


def test_labels_do_not_apply_to_an_sft_term():
    """nll trains on the likelier side and on nothing else: smoothing and doubt leave it alone.

    -log pi_w/n_w = 1, 1, 1.5; of the rejected ones 1.25, 2, 2.
    """
    one = f64(1, 1, 1)
    for prob, value in ((one, 3.5), (0.6 * one, 3.5), (f64(1, 0.9, 0.5), 3.5), (f64(1, 0.9, 0.2), 4.0), (0 * one, 5.25)):
        assert expected(LOSSES["nll"], *pairs.WORKED, prob, one).item() == pytest.approx(value)


def test_losses_odd_in_the_margin():
    """f(w, l) - f(l, w) is -m for DPO, -m/(1-2e) for robust, -2 D/tau for IPO, -2 D/beta for SPPO: swapping flips the sign of D."""
    chosen, rejected = batch(8)
    gap, mean = chosen.ratio - rejected.ratio, chosen.mean_ratio - rejected.mean_ratio
    free = chosen.policy - rejected.policy
    zero, down = 2 * (torch.sigmoid(-0.1 * chosen.ratio) - torch.sigmoid(-0.1 * rejected.ratio)), torch.nn.functional.logsigmoid
    for name, odd in {"sigmoid": -0.1 * gap, "robust": -gap / 8, "ipo-sum": -20 * gap, "ipo-mean": -20 * mean,
                           "sigmoid-norm": -5 * mean, "reference-free": -0.1 * free,
                           "r-dpo": -0.1 * gap - 0.05 * (chosen.length - rejected.length),
                           "sppo-hard": -2000 * gap, "apo-zero": zero,
                           "f-js": -0.1 * (down(chosen.ratio) - down(rejected.ratio)),
                           }.items():  # fmt: skip
        difference = LOSSES[name].function(chosen, rejected) - LOSSES[name].function(rejected, chosen)
        torch.testing.assert_close(difference, odd, rtol=1e-13, atol=1e-10)


def test_equal_lengths_make_sum_and_mean_forms_one():
    """With every length n, `ipo-mean` at n tau is `ipo-sum` at tau over n^2; `sigmoid-norm` at n beta is `sigmoid` at beta."""
    chosen, rejected = (Side(s.policy, s.reference, torch.full_like(s.length, 8)) for s in batch(5))
    torch.testing.assert_close(pairs.ipo_mean(chosen, rejected, tau=0.8), pairs.ipo_sum(chosen, rejected, tau=0.1) / 64)
    torch.testing.assert_close(pairs.sigmoid_norm(chosen, rejected, beta=0.8), pairs.sigmoid(chosen, rejected, beta=0.1))


# ---- optima in a world of two responses ------------------------------------------------------------------------------------


def margin_at_optimum(name: str, p: float, **numbers: float) -> float:
    """D = a_w - a_l where the expected loss is flat, w better with probability p; both responses one token."""

    def slope(gap: float) -> float:
        d = f64(gap).requires_grad_()
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        expected(LOSSES[name], short(d / 2, zero, one), short(-d / 2, zero, one), p * one, one, **numbers).backward()
        return d.grad.item()

    return brentq(slope, -90, 90, xtol=1e-12)


@pytest.mark.parametrize(
    ("name", "numbers", "gaps"),
    [
        ("sigmoid", {"beta": 0.1}, (4.05465, 10.98612, 21.97225)),  # logit(p)/beta
        ("sigmoid-norm", {"beta": 0.1}, (4.05465, 10.98612, 21.97225)),
        ("ipo-sum", {"tau": 0.1}, (1, 2.5, 4)),  # (2p-1)/(2 tau)
        ("ipo-mean", {"tau": 0.1}, (1, 2.5, 4)),
        ("hinge", {"beta": 0.1}, (10, 10, 10)),  # sign(2p-1)/beta: how sure the label is, is lost
        ("sppo-hard", {"beta": 0.1}, (2, 5, 8)),  # (2p-1)/beta
        ("exo", {"beta": 0.1}, (13.8135, 34.5338, 55.2540)),  # (2p-1) ln(.999/.001)/beta: not logit(p)
        ("bco", {"beta": 0.1}, (8.10930, 21.97225, 43.94449)),  # 2 logit(p)/beta
        ("bco-biased", {"beta": 0.1}, (8.10930, 21.97225, 43.94449)),
        ("aot", {"beta": 0.1}, (4.05465, 10.98612, 21.97225)),  # one pair a step: DPO
        ("d2po", {"beta": 0.1}, (4.05465, 10.98612, 21.97225)),  # one token
        ("wpo", {"beta": 0.1}, (4.05465, 10.98612, 21.97225)),  # the same weight on both orders
    ],
)
def test_two_response_optima(name, numbers, gaps):
    """p = .6, .75, .9. Worked: logit(.75) = ln 3 = 1.098612; (2 * .75 - 1)/.2 = 2.5."""
    assert [margin_at_optimum(name, p, **numbers) for p in (0.6, 0.75, 0.9)] == pytest.approx(gaps, abs=1e-4)


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
@pytest.mark.parametrize(("name", "level"), [
    ("nca", lambda p: (log(2 * p), log(2 * (1 - p)))),  # beta a = log 2p and log 2(1-p)
    ("sppo-hard", lambda p: ((2 * p - 1) / 2, -(2 * p - 1) / 2)),  # a = +-(2p-1)/(2 beta)
    ("bco-biased", lambda p: (log(p / (1 - p)), -log(p / (1 - p)))),
])  # fmt: skip
def test_levels(name, level, p):
    """Losses of the level of a, not only of the gap: with each side free, the gradient is zero at both beta a, and only there."""

    def slope(good: float, bad: float) -> Tensor:
        a = f64(good, bad).requires_grad_()
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        value = expected(LOSSES[name], short(a[:1], zero, one), short(a[1:], zero, one), p * one, one, beta=0.1)
        return torch.autograd.grad(value, a)[0]

    good, bad = (10 * x for x in level(p))
    assert slope(good, bad).abs().max() < 1e-9
    assert slope(good + 0.5, bad + 0.5).abs().max() > 1e-4, "moving both together is felt"


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9, 1.0])
def test_smoothing_moves_the_optimum(p):
    """cDPO with e = .1: m = logit((1-e)p + e(1-p)): 3.22773, 8.47298, 15.16347 for D at beta .1; m = ln 9 = 2.19722 at p = 1."""
    expected = {0.6: 3.22773, 0.75: 8.47298, 0.9: 15.16347, 1.0: 21.9722}[p]
    assert margin_at_optimum("sigmoid", 0.9 * p + 0.1 * (1 - p), beta=0.1) == pytest.approx(expected, abs=1e-4)


def test_robust_undoes_the_noise():
    """Labels right with p = .8 and flipped with e = .2: the expected robust loss is the clean DPO loss at every D.

    They are seen right with .8*.8 + .2*.2 = .68. Clean, beta .3: D = -2 gives .8 ell(-.6) + .2 ell(.6) = .917488; 0 gives ln 2;
    1.5 gives .8 ell(.45) + .2 ell(-.45) = .583249.
    """
    gap, one, zero = f64(-2, 0, 1.5), torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    chosen, rejected = Side(gap, zero, one), Side(zero, zero, one)
    noisy = soft("robust", chosen, rejected, 0.68, beta=0.3, noise=0.2)
    torch.testing.assert_close(noisy, soft("sigmoid", chosen, rejected, 0.8, beta=0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(noisy, f64(0.91748795, 0.69314718, 0.58324895), rtol=0, atol=1e-8)


def test_robust_has_no_floor():
    """m = 50, e = .1: -ls(50) - 50 * .125 = -6.25."""
    one = torch.ones(1, dtype=torch.float64)
    assert pairs.robust(Side(500 * one, 0 * one, one), Side(0 * one, 0 * one, one)).item() == pytest.approx(-6.25, abs=1e-12)


def test_distillation():
    """Soft labels from a reward model: written out, -s ls(m) - (1-s) ls(-m); flat at m = r_w - r_l."""
    chosen, rejected = batch(8)
    gap = chosen.ratio - rejected.ratio
    for s in (0.5, 0.9, 0.123):
        written = [s * ell(0.1 * d) + (1 - s) * ell(-0.1 * d) for d in gap.tolist()]
        torch.testing.assert_close(soft("sigmoid", chosen, rejected, s), f64(*written))
    assert margin_at_optimum("sigmoid", sig(1.7), beta=0.25) == pytest.approx(1.7 / 0.25, abs=1e-9)


# ---- DiscoPOP, R-DPO, AOT, f-divergences ------------------------------------------------------------------------------------


def test_discopop_has_a_hill_in_front_of_it():
    """tau .05: from m = 0 the slope is uphill, +.7843; descent ends at m = -.11857 (.78592); the top is at m = .07201 (.87829)."""

    def at(m: float) -> tuple[float, float]:
        d = f64(m / 0.05).requires_grad_()
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        value = pairs.discopop(Side(d, zero, one), Side(zero, zero, one)).sum()
        return value.item(), torch.autograd.grad(value, d)[0].item() / 0.05

    assert at(0.0)[1] == pytest.approx(0.7843, abs=1e-4)
    low, top = brentq(lambda m: at(m)[1], -0.2, -0.05), brentq(lambda m: at(m)[1], 0.01, 0.2)
    assert (low, at(low)[0]) == pytest.approx((-0.11857, 0.78592), abs=1e-5)
    assert (top, at(top)[0]) == pytest.approx((0.07201, 0.87829), abs=1e-5)


@pytest.mark.parametrize(("name", "numbers", "length"), [
    ("r-dpo", {"per_token": 0.4}, 2.000), ("sigmoid", {}, 2.380), ("r-dpo", {"per_token": -0.4}, 2.664),
])  # fmt: skip
def test_r_dpo_takes_the_bonus_for_length_out(name, numbers, length):
    """Four responses, uniform reference, 1, 1, 3, 3 tokens, quality 0, 1, 0, 1; people vote by quality + .4 tokens; beta 1.

    Right is e^q/(2 + 2e) = .134471, .365529 for each length, whose mean length is 2. The other sign makes answers longer still.
    """
    tokens, quality = np.array([1, 1, 3, 3]), np.array([0.0, 1, 0, 1])
    problem = exact.Problem(np.full(4, 0.25), quality + 0.4 * tokens)
    theta = exact.minimise(lambda t: exact.population_loss(name, t.log_softmax(-1), problem, lengths=tokens, beta=1.0, **numbers),
                           torch.zeros(4, dtype=torch.float64))  # fmt: skip
    found = theta.softmax(-1).numpy()
    assert found @ tokens == pytest.approx(length, abs=1e-3)
    if length == 2.0:
        np.testing.assert_allclose(found, [0.134471, 0.365529] * 2, atol=1e-6)


def test_aot_is_dpo_alone_and_does_not_care_who_was_paired():
    """One pair: DPO. Several, unpaired: re-pairing the same answers changes nothing; that of the paired form it does."""
    chosen, rejected = batch(6)
    one = torch.ones(1, dtype=torch.float64)
    for name in ("aot", "aot-unpaired"):
        function = LOSSES[name].function
        torch.testing.assert_close(function(chosen[:1], rejected[:1], one), pairs.sigmoid(chosen[:1], rejected[:1], beta=0.01))
    votes, order = torch.ones(6, dtype=torch.float64), torch.tensor([3, 5, 0, 1, 2, 4])
    same(batchwise.aot_unpaired(chosen, rejected[order], votes).sum(), batchwise.aot_unpaired(chosen, rejected, votes).sum())
    again, before = (batchwise.aot(chosen, r, votes, beta=1.0).sum() for r in (rejected[order], rejected))
    assert abs(again - before) > 0.1


def minimiser(name: str, **numbers: float) -> np.ndarray:
    """B4: the policy at which a population loss with Bradley-Terry labels is least."""
    theta = torch.tensor(np.log(exact.B4.reference), requires_grad=True)
    solver = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-17, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = exact.population_loss(name, theta.log_softmax(-1), exact.B4, **numbers)
        value.backward()
        return value

    solver.step(closure)
    return theta.detach().softmax(-1).numpy()


@pytest.mark.parametrize(("name", "numbers", "expected"), [
    ("f-forward-kl", {"beta": 1.0}, (0.180284, 0.246159, 0.116365, 0.457192)),
    ("f-alpha", {"beta": 1.0, "alpha": 1.0}, (0.180284, 0.246159, 0.116365, 0.457192)),  # alpha 1 is the forward KL
    ("f-alpha", {"beta": 1.0, "alpha": 1e-6}, (0.175121, 0.357021, 0.144363, 0.323495)),  # alpha -> 0 is DPO
    ("f-js", {"beta": 1.0}, (0.054266, 0.144262, 0.049052, 0.752420)),
    ("chi-po", {"beta": 0.5}, (0.174922, 0.398144, 0.162977, 0.263957)),
    ("chi-po", {"beta": 1.0}, (0.281544, 0.355165, 0.185543, 0.177748)),
])  # fmt: skip
def test_f_dpo_minimises_its_own_objective(name, numbers, expected):
    """The optimum of E[r] - beta D_f satisfies beta f'(pi/ref) = r - Z with one Z for all: checked, and the numbers with it."""
    found = minimiser(name, **numbers)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    u, alpha = found / exact.B4.reference, numbers.get("alpha", 0.5)
    slope = {"f-forward-kl": -1 / u, "f-js": np.log(2 * u / (1 + u)), "f-alpha": (1 - u**-alpha) / alpha, "chi-po": u + np.log(u)}[name]
    z = exact.B4.reward - numbers["beta"] * slope
    assert np.ptp(z) < 1e-6
    if name == "chi-po":
        assert z.mean() == pytest.approx({0.5: 0.194910, 1.0: -0.352683}[numbers["beta"]], abs=2e-6)


def test_f_alpha_counts_as_its_authors_do():
    """Ours at alpha is the convention (u^(t-1) - 1)/(t-1) at t = 1 - alpha; they meet at one half only."""
    chosen, rejected = batch(5)
    for alpha in (0.25, 0.5, 0.75):
        t = 1 - alpha
        other = [(torch.exp((t - 1) * s.ratio) - 1) / (t - 1) for s in (chosen, rejected)]
        written = -torch.nn.functional.logsigmoid(0.1 * (other[0] - other[1]))
        torch.testing.assert_close(LOSSES["f-alpha"].function(chosen, rejected, alpha=alpha), written)


@pytest.mark.parametrize(("name", "numbers", "other"), [
    ("ld-dpo", {"tail": 1.0}, "sigmoid"), ("d2po", {"decay": 1.0}, "sigmoid"), ("r-dpo", {"per_token": 0.0}, "sigmoid"),
    ("dpop", {"lam": 0.0, "beta": 0.1}, "sigmoid"), ("alphapo", {"alpha": 1e-9}, "simpo"), ("cpo", {"lam": 0.0}, "reference-free"),
    ("orpo", {"lam": 0.0}, "nll"), ("f-alpha", {"alpha": 1e-9}, "sigmoid"),
])  # fmt: skip
def test_where_one_loss_becomes_another(name, numbers, other):
    torch.testing.assert_close(items(name, *batch(6), **numbers), items(other, *batch(6)), rtol=1e-6, atol=1e-6)


def test_alpha_dpo_becomes_simpo():
    function, one = LOSSES["alpha-dpo"].function, torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(function(*batch(6), one, beta=2.0, gamma=1.0, alpha=0.0), items("simpo", *batch(6)))
    still = [replace(s, policy=s.reference) for s in batch(6)]
    noise = replace(still[0], policy=still[0].policy + f64(1, -1, 2, 0, -1, 1) * 1e-7)
    same = function(*still, one)
    torch.testing.assert_close(function(noise, still[1], one), same, rtol=0, atol=1e-3)


# ---- beta-DPO --------------------------------------------------------------------------------------------------------------


def test_beta_dpo_over_three_steps():
    """A second formulation: plain numbers, step after step, D of 4 pairs each; M0 is .9 M0 + .1 M and counts the step itself."""
    rng, carry, running = np.random.default_rng(5), LOSSES["beta-dpo"].carry, 0.0
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step in range(3):
        gaps = rng.normal(step, 3, size=4)
        chosen, rejected = Side(torch.tensor(gaps), zero, one), Side(zero, zero, one)
        running = 0.9 * running + 0.1 * gaps.mean()
        b = 0.2 * (1 + 0.6 * (gaps.mean() - running))
        found = batchwise.beta_dpo(chosen, rejected, one, carry, beta=0.2)
        torch.testing.assert_close(found, f64(*(ell(b * d) for d in gaps)), rtol=1e-13, atol=1e-13)
        carry = batchwise.beta_dpo_update(chosen, rejected, one, carry)
        assert carry["mean"] == pytest.approx(running, rel=1e-14) and carry["steps"] == step + 1
    assert b != 0.2


def test_beta_dpo_floor_and_rest():
    """Far below its running mean b stays at .001; without a step under way it is DPO at beta."""
    chosen, rejected = batch(5)
    one = torch.ones(5, dtype=torch.float64)
    low = batchwise.beta_dpo(chosen, rejected, one, {"mean": 1e4, "spread": 1.0, "steps": 9.0})
    torch.testing.assert_close(low, pairs.sigmoid(chosen, rejected, beta=1e-3))
    torch.testing.assert_close(batchwise.beta_dpo(chosen, rejected, one, None, keep=0.5), pairs.sigmoid(chosen, rejected))


def test_beta_dpo_draws_by_the_paper_s_chances():
    """Two pairs, one of them drawn: the first with probability w1/(w1 + w2), w = exp(-z^2/2); 600 steps, five standard errors.

    Kept are exactly .5 of the votes, and the step's mean over pairs is the mean over those that were kept.
    """
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    chosen, rejected, hits = Side(f64(1.0, 3.0), zero, one), Side(zero, zero, one), 0
    for step in range(600):
        carry = {"mean": 0.0, "spread": 2.0, "steps": float(step)}
        values = batchwise.beta_dpo(chosen, rejected, one, carry, momentum=1.0, keep=0.5)  # M0 stays 0, its spread 2
        assert (values == 0).sum() == 1
        first = values[0] > 0
        hits += int(first)
        b = 0.1 * (1 + 0.6 * (1.0 if first else 3.0))
        assert values.mean().item() == pytest.approx(ell(b * (1.0 if first else 3.0)))
        assert torch.equal(values, batchwise.beta_dpo(chosen, rejected, one, carry, momentum=1.0, keep=0.5)), "a step draws once"
    w1, w2 = exp(-(0.5**2) / 2), exp(-(1.5**2) / 2)
    p = w1 / (w1 + w2)
    assert abs(hits / 600 - p) < 5 * math.sqrt(p * (1 - p) / 600)


def test_beta_dpo_cuts_the_last_pair_drawn():
    """Three votes and one: .5 of the four are kept, so either two thirds of the first pair or the second whole and a third."""
    one, zero, votes = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), f64(3, 1)
    running, seen = {"mean": 0.0, "spread": 1.0}, set()
    for step in range(40):
        kept = batchwise._drawn(f64(1.0, 1.0), votes, 0.5, running | {"steps": step})
        seen.add(tuple(round(x, 9) for x in kept.tolist()))
    assert seen == {(round(2 / 3, 9), 0.0), (round(1 / 3, 9), 1.0)} and len(one) == len(zero)


def test_a_margin_far_from_the_running_mean_is_still_drawn_in_order():
    """z of hundreds: exp(-z^2/2) is 0 in any precision, yet the nearest pairs come first and nothing is NaN."""
    gap = f64(1000, 400, 700, 1500)
    kept = batchwise._drawn(gap, torch.ones(4, dtype=torch.float64), 0.5, {"mean": 0.0, "spread": 1.0, "steps": 3})
    assert kept.tolist() == [0, 1, 1, 0]


# ---- KTO -------------------------------------------------------------------------------------------------------------------


def test_kto_baseline_is_clamped_and_carries_no_gradient():
    ratio = f64(-3, 1).requires_grad_()
    assert verdicts.baseline(ratio).item() == 0.0
    assert verdicts.baseline(-ratio).item() == 1.0 and not verdicts.baseline(-ratio).requires_grad
    assert torch.equal(verdicts.baseline(f64(1, 2).repeat(2)), verdicts.baseline(f64(1, 2))), "a doubled step has the same z0"


@pytest.mark.parametrize("p", [0.4, 0.6, 0.9])
def test_kto_has_no_finite_optimum(p):
    """Expected loss p(1 - sig(x)) + (1-p)(1 - sig(-x)) = p + (1-2p) sig(x), x = b(a - z0): monotone in a."""
    zero = torch.zeros((), dtype=torch.float64)
    for a in np.linspace(-60, 60, 13):
        x = f64(a, a).requires_grad_()
        values = verdicts.kto(Side(x, torch.zeros_like(x), torch.ones_like(x)), torch.tensor([True, False]), zero)
        (p * values[0] + (1 - p) * values[1]).backward()
        assert math.copysign(1, x.grad.sum().item()) == math.copysign(1, 0.5 - p)
