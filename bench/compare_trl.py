"""Our losses against TRL's: value and gradient on the same numbers, and why they differ where they do.

TRL's own loss code runs (`DPOTrainer._compute_loss`, `CPOTrainer.cpo_loss`, `ORPOTrainer.odds_ratio_loss`); only the model is replaced,
by one that returns given token log-probs. No text, no weights, no download. Needs the extra `[bench]`:

    python bench/compare_trl.py > bench/results/trl-losses.txt

A line says "same" where the mean loss and its gradient with respect to every token's log-prob agree to 1e-6 (of the largest). Where a
difference is expected its reason stands beside it, and then a second line shows that with the reason removed they agree. The
exit status is 1 if a line says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import trl
from torch import Tensor
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from preftune.losses import LOSSES, Side, expected

LENGTHS = ((5, 9), (7, 3), (12, 12), (1, 6), (8, 2), (4, 10))  # tokens of chosen and rejected
PROMPT = 3
AGREE = 1e-6


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token log-probs of policy and reference, log sum_v pi(v)^2, and the mask: (2B, T), chosen first, as TRL lays them out."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([w for w, _ in LENGTHS] + [x for _, x in LENGTHS])
    mask = (torch.arange(int(length.max())) < length[:, None]).double()
    policy = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    reference = policy + 0.5 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    collision = -4 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    return policy * mask, reference * mask, collision * mask, mask


def sides(policy: Tensor, reference: Tensor, collision: Tensor, mask: Tensor) -> tuple[Side, Side]:
    """The same as our two sides."""
    whole = Side(policy.sum(1), reference.sum(1), mask.sum(1), tokens=policy - reference, collision=collision.sum(1))
    chosen = torch.arange(len(LENGTHS))
    return whole[chosen], whole[chosen + len(LENGTHS)]


def padded(x: Tensor) -> Tensor:
    """Prompt positions in front, as in a row of TRL's."""
    return F.pad(x, (PROMPT, 0))


def theirs(**options: Any) -> Callable[..., Tensor]:
    """TRL's DPO loss as a function of our numbers."""

    def loss(policy: Tensor, reference: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
        dtype = options.get("dtype", torch.float64)

        def model(**_: Any) -> SimpleNamespace:
            # A row predicts every token but its first: T + PROMPT - 1 positions.
            outs = [padded(x)[:, 1:].to(dtype) for x in (policy, collision, policy.detach())]
            return SimpleNamespace(log_probs=outs[0], log_sum_sq_probs=outs[1], entropy=outs[2], mean_logits=outs[2],
                                   is_top1=outs[2] > 0, aux_loss=None)  # fmt: skip

        plain = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None,
                 "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False}  # fmt: skip
        given = plain | {k: v for k, v in options.items() if k != "dtype"}
        ready = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        ids = torch.zeros(len(mask), mask.shape[1] + PROMPT, dtype=torch.long)
        ref = padded(reference)[:, 1:].to(dtype)
        frozen, held = SimpleNamespace(log_probs=ref), torch.nn.Identity()  # accelerate unwraps only what is a module
        held.is_gradient_checkpointing = False
        trainer = SimpleNamespace(
            **given, model=held, ref_model=lambda **_: frozen,
            accelerator=ready, aux_loss_enabled=False, precompute_ref_logps=False, _metrics={"train": defaultdict(list)},
            _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None))  # fmt: skip
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": padded(mask).long()}
        return DPOTrainer._compute_loss(trainer, model, inputs, False).double()

    return loss


def theirs_cpo(**options: Any) -> Callable[..., Tensor]:
    """TRL's CPO family; the mean over pairs, and where `cpo_alpha` is given the likelihood per token of all chosen tokens."""

    def loss(policy: Tensor, reference: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
        given = {"alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "beta": 0.1, "cpo_alpha": 0.0} | options
        trainer = SimpleNamespace(**given, accelerator=SimpleNamespace(device="cpu"))
        logps = policy.sum(1) / (mask.sum(1) if given["loss_type"] == "simpo" else 1)
        value = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))[0].mean()
        half = len(LENGTHS)
        return value - given["cpo_alpha"] * policy[:half].sum() / mask[:half].sum()

    return loss


def theirs_orpo(beta: float) -> Callable[..., Tensor]:
    """TRL's ORPO: the odds-ratio term, and the likelihood per token of all chosen tokens (here without a prompt)."""

    def loss(policy: Tensor, reference: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
        trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
        ratio = ORPOTrainer.odds_ratio_loss(trainer, *(policy.sum(1) / mask.sum(1)).chunk(2))[0].mean()
        half = len(LENGTHS)
        return -policy[:half].sum() / mask[:half].sum() - ratio

    return loss


def ours(name: str, *, smoothing: float = 0.0, weight: float = 1.0, **given: float) -> Callable[..., Tensor]:
    """One of our losses, mean over pairs."""

    def loss(*columns: Tensor) -> Tensor:
        chosen, rejected = sides(*columns)
        one = torch.ones(len(LENGTHS), dtype=torch.float64)
        return weight * expected(LOSSES[name], chosen, rejected, (1 - smoothing) * one, one, **given) / len(LENGTHS)

    return loss


def both(*parts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *columns: torch.stack([part(*columns) for part in parts]).sum()


def tokens_nll(weight: float) -> Callable[..., Tensor]:
    """-log pi of the chosen answers over all their tokens together, as a term of TRL's sums."""
    half = len(LENGTHS)
    return lambda policy, reference, collision, mask: -weight * policy[:half].sum() / mask[:half].sum()


def smoothed_aot(name: str, smoothing: float, beta: float) -> Callable[..., Tensor]:
    """Hard labels sorted first, the loss smoothed afterwards: what TRL does."""
    turned = ours(name, beta=-beta)
    return both(ours(name, beta=beta, weight=1 - smoothing), lambda *columns: smoothing * turned(*columns))


def policy_only(tail: float) -> Callable[..., Tensor]:
    """LD-DPO with the policy's tail weighted and the reference whole: TRL up to 0.28."""

    def loss(policy: Tensor, reference: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
        length = mask.sum(1).view(2, -1)
        shared = length.min(0).values.repeat(2)[:, None]
        kept = torch.where(torch.arange(mask.shape[1]) < shared, 1.0, tail)
        good, bad = ((policy * kept).sum(1) - reference.sum(1)).chunk(2)
        return -F.logsigmoid(0.1 * (good - bad)).mean()

    return loss


# (ours, theirs, our loss, TRL's, 'same' or why not). A line after a reason shows the same two without it.
D = theirs
CASES: tuple[tuple[str, str, Callable[..., Tensor], Callable[..., Tensor], str], ...] = (
    ("sigmoid", "sigmoid", ours("sigmoid"), D(), "same"),
    ("sigmoid, smoothing .1", "sigmoid, label_smoothing .1", ours("sigmoid", smoothing=0.1),
     D(label_smoothing=0.1), "TRL >= 0.29 ignores the option here"),
    ("sigmoid, no smoothing", "sigmoid, label_smoothing .1", ours("sigmoid"), D(label_smoothing=0.1), "same"),
    ("robust, noise .1", "robust, label_smoothing .1", ours("robust"), D(loss_types=["robust"], label_smoothing=0.1), "same"),
    ("hinge", "hinge, beta .05", ours("hinge"), D(loss_types=["hinge"], beta=0.05), "same"),
    ("ipo-mean", "ipo", ours("ipo-mean"), D(loss_types=["ipo"]), "same"),
    ("ipo-sum", "ipo", ours("ipo-sum"), D(loss_types=["ipo"]), "TRL's ipo is on means per token"),
    ("sigmoid-norm", "sigmoid_norm, beta 5", ours("sigmoid-norm"), D(loss_types=["sigmoid_norm"], beta=5.0), "same"),
    ("exo, epsilon .001", "exo_pair, label_smoothing .001", ours("exo"), D(loss_types=["exo_pair"], label_smoothing=0.001), "same"),
    ("nca", "nca_pair, beta .01", ours("nca"), D(loss_types=["nca_pair"], beta=0.01), "same"),
    ("bco", "bco_pair, beta .01", ours("bco"), D(loss_types=["bco_pair"], beta=0.01), "TRL >= 0.29 has no shift d"),
    ("bco-biased", "bco_pair, beta .01", ours("bco-biased"), D(loss_types=["bco_pair"], beta=0.01), "same"),
    ("sppo-hard", "sppo_hard, beta .001", ours("sppo-hard"), D(loss_types=["sppo_hard"], beta=0.001), "same"),
    ("apo-zero", "apo_zero", ours("apo-zero"), D(loss_types=["apo_zero"]), "same"),
    ("apo-down", "apo_down", ours("apo-down"), D(loss_types=["apo_down"]), "same"),
    ("aot", "aot, beta .01", ours("aot"), D(loss_types=["aot"], beta=0.01), "same"),
    ("aot-unpaired", "aot_unpaired, beta .01", ours("aot-unpaired"), D(loss_types=["aot_unpaired"], beta=0.01), "same"),
    ("aot, smoothing .2", "aot, label_smoothing .2", ours("aot", smoothing=0.2, beta=1.0),
     D(loss_types=["aot"], beta=1.0, label_smoothing=0.2),
     "ours sorts the smoothed labels, TRL smooths the sorted"),
    ("aot, smoothed after sorting", "aot, label_smoothing .2", smoothed_aot("aot", 0.2, 1.0),
     D(loss_types=["aot"], beta=1.0, label_smoothing=0.2), "same"),
    ("discopop", "discopop, beta .05", ours("discopop"), D(loss_types=["discopop"], beta=0.05), "same"),
    ("f-forward-kl", "forward_kl", ours("f-forward-kl"), D(f_divergence_type="forward_kl"), "same"),
    ("f-js", "js_divergence", ours("f-js"), D(f_divergence_type="js_divergence"), "same"),
    ("f-alpha, alpha .5", "alpha_divergence .5 (fp32)", ours("f-alpha"),
     D(f_divergence_type="alpha_divergence", dtype=torch.float32), "same"),
    ("f-alpha, alpha .2", "alpha_divergence .2 (fp32)", ours("f-alpha", alpha=0.2),
     D(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.2, dtype=torch.float32), "TRL's coefficient is 1 - alpha"),
    ("f-alpha, alpha .2", "alpha_divergence .8 (fp32)", ours("f-alpha", alpha=0.2),
     D(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.8, dtype=torch.float32), "same"),
    ("wpo, cap 1", "use_weighting, beta .01", ours("wpo"),
     D(use_weighting=True, beta=0.01), "TRL >= 0.29 does not cap the weights"),
    ("wpo, cap 1000", "use_weighting, beta .01", ours("wpo", cap=1000.0), D(use_weighting=True, beta=0.01), "same"),
    ("ld-dpo, tail .5", "ld_alpha .5", ours("ld-dpo"), D(ld_alpha=0.5), "same"),
    ("(policy only, TRL < 0.29)", "ld_alpha .5", policy_only(0.5),
     D(ld_alpha=0.5), "TRL >= 0.29 weighs the reference too, as we do"),
    ("nll", "sft", ours("nll"),
     D(loss_types=["sft"]), "TRL's mean is over the tokens of a micro-batch, ours of an answer, then over answers"),
    ("(over all tokens)", "sft", tokens_nll(1.0), D(loss_types=["sft"]), "same"),
    ("0.8*sigmoid+0.2*bco-biased", "the same two, loss_weights",
     both(ours("sigmoid", weight=0.8), ours("bco-biased", beta=0.1, weight=0.2)),
     D(loss_types=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2]), "same"),
    ("reference-free", "CPO sigmoid, cpo_alpha 0", ours("reference-free"), theirs_cpo(loss_type="sigmoid"), "same"),
    ("cpo", "CPO sigmoid, cpo_alpha 1", ours("cpo"),
     theirs_cpo(loss_type="sigmoid", cpo_alpha=1.0), "TRL's likelihood term is per token, the paper's a sum"),
    ("reference-free + per token", "CPO sigmoid, cpo_alpha 1", both(ours("reference-free"), tokens_nll(1.0)),
     theirs_cpo(loss_type="sigmoid", cpo_alpha=1.0), "same"),
    ("simpo", "CPO simpo, beta 2, simpo_gamma 1", ours("simpo"), theirs_cpo(loss_type="simpo", beta=2.0, simpo_gamma=1.0), "same"),
    ("alphapo", "CPO simpo, alpha .25", ours("alphapo"),
     theirs_cpo(loss_type="simpo", beta=2.0, simpo_gamma=1.0, alpha=0.25), "same"),
    ("orpo", "ORPO, beta .1 (fp32)", ours("orpo"),
     theirs_orpo(0.1), "TRL's likelihood is over all tokens of a micro-batch (and its prompts)"),
    ("orpo, likelihood as there", "ORPO, beta .1 (fp32)", both(ours("orpo"), ours("nll", weight=-1.0), tokens_nll(1.0)),
     theirs_orpo(0.1), "same"),
)  # fmt: skip


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> tuple[float, float, float]:
    """(our value, their value, largest difference of value and gradient, relative to the larger of 1 and the largest of each)."""
    values, gradients = [], []
    for function in (ours, theirs):
        policy, reference, collision, mask = numbers()
        policy.requires_grad_()
        value = function(policy, reference, collision, mask)
        gradients.append(torch.autograd.grad(value, policy)[0] * mask)  # what stands behind an answer's end is nobody's
        values.append(value.item())
    off = float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())
    return values[0], values[1], max(off, abs(values[0] - values[1]) / max(1.0, abs(values[1])))


def main() -> int:
    """Print the table; 1 if a line says what is not so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to call today")
    date = parser.parse_args().date
    versions = f"TRL {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{date}  {versions}, Python {sys.version.split()[0]}")
    print(f"{len(LENGTHS)} pairs, 1 to 12 tokens; difference: the larger of value and gradient, relative; same: below {AGREE:g}\n")
    print(f"{'ours':<28} {'TRL':<33} {'our value':>14} {'TRL value':>14} {'difference':>11}  verdict")
    wrong = 0
    for name, other, mine, its, verdict in CASES:
        a, b, off = compare(mine, its)
        held = (off < AGREE) == (verdict == "same")
        wrong += not held
        print(f"{name:<28} {other:<33} {a:>14.6f} {b:>14.6f} {off:>11.1e}  {verdict}{'' if held else '   <-- NOT SO'}")
    compared = {name.partition(",")[0] for name, *_ in CASES} & set(LOSSES)
    print(f"\n{len(CASES)} lines, {len(compared)} of our {len(LOSSES)} losses, {wrong} not as said.")
    alone = ", ".join(sorted({*LOSSES} - compared - {"kto"}))
    print(f"Not in TRL: {alone}. Its KTO pairs answers inside a micro-batch for z0, ours over the step;")
    print("the formula behind z0 is the same and stands in tests/test_losses.py. TR-DPO is `sync_ref_model` there: no other loss, only")
    print("another reference; ours is tested against its closed form in tests/test_moving.py.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
