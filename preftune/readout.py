"""From a batch to numbers: the only room that touches hidden states and vocabulary-sized logits.

The head is the model's own module with its own scale and soft-cap, run over a few targets at a time, so that logits for all tokens
never exist. Log-softmax is taken in fp32 (or in the model's precision where that is higher).

    hidden = hidden_states(model, batch)             # (T, D)
    logps = token_logps(model, hidden, batch)        # (N,) log pi(target | prefix)
    scores = scalars(reward_model, hidden, batch)    # (R,) the reward of each response
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batches import Batch

GIVEN = "given"  # the name of the frozen copy of an adapter that goes on training
LOGITS = 1 << 24  # logits that may exist at once: 64 MB in fp32
WIDE = 1 << 20  # those that a processor goes over at once in fp32
SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # Granite divides, Cohere multiplies, Gemma soft-caps


def packs(model: Any) -> bool:
    """Whether the model reads a segment table (set by `models.load`; otherwise it is run one row at a time)."""
    return bool(getattr(model, "reads_segments", False))


def decoder_of(model: Any) -> Any:
    """The part of a model below its head, inside a LoRA wrapper or not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model if scores(inner) else inner.get_decoder()


def scores(model: Any) -> bool:
    """Whether the model has a scalar head in the place of a vocabulary: a reward model."""
    return hasattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "score")


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Last hidden state of every token of a batch, (T, D): packed, or row by row where the model cannot read a table.

    A batch for row-by-row must have been made with `share=False`.
    """
    decoder = decoder_of(model)
    if packs(model):
        # A ready-made 4D mask keeps transformers from building its own; segment_attention does not read it.
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.tokens.device)
        out = decoder(input_ids=batch.tokens[None], position_ids=batch.positions[None], attention_mask=nothing, use_cache=False,
                      segments=batch.segments)  # fmt: skip
        return out.last_hidden_state[0]
    if any(p >= 0 for p in batch.segments.prefix):
        raise AssertionError("a model without a segment table was given a shared-prompt batch")
    rows = [decoder(input_ids=batch.tokens[None, a:b], use_cache=False).last_hidden_state[0] for a, b in batch.segments.trees]
    return torch.cat(rows)


def head_of(model: Any, *, temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """hidden (n, D) -> logits (n, V) as the model itself makes them: its head module, its scale, its soft-cap; then over `temperature`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, module = inner.config, inner.get_output_embeddings()
    divide, multiply, cap = (getattr(config, name, None) for name in SCALES)

    def head(hidden: Tensor) -> Tensor:
        logits = module(hidden)
        if divide is not None:
            logits = logits / divide
        if multiply is not None:
            logits = logits * multiply
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return logits if temperature == 1 else logits / temperature

    return head


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logps(head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    logits = _wide(head(hidden))
    return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)


def _collisions(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    logits = _wide(head(hidden))
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def _chunk(vocabulary: int) -> int:
    return max(1, LOGITS // vocabulary)


def _pieces(logits: Tensor, first: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a chunk to go over at once in fp32, in the chunk and in all (it begins at `first`): few on a processor, where their copy
    stays in its cache; on a GPU all."""
    size = len(logits) if logits.device.type == "cuda" else max(1, WIDE // logits.shape[1])
    for a in range(0, len(logits), size):
        b = min(a + size, len(logits))
        yield slice(a, b), slice(first + a, first + b)


class _LinearLogps(torch.autograd.Function):
    """log softmax(states W^T + b)[target] without keeping it: logits are made a chunk at a time, again in the backward pass.

    d logp / d logits = onehot(target) - softmax, so one pass over the chunks gives the gradients of states, W and b. Logits of a
    single chunk are kept instead of made twice.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, size: int) -> Tensor:
        out = torch.empty(len(states), dtype=_wide(states[:0]).dtype, device=states.device)
        lse, kept = torch.empty_like(out), None
        for a in range(0, len(states), size):
            logits = F.linear(states[a : a + size], weight, bias)
            kept = logits if size >= len(states) else None
            for rows, piece in _pieces(logits, a):
                wide = _wide(logits[rows])
                lse[piece] = wide.logsumexp(-1)
                out[piece] = wide.gather(-1, target[piece, None])[:, 0] - lse[piece]
        ctx.save_for_backward(states, weight, bias, target, lse, kept)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        states, weight, bias, target, lse, kept = ctx.saved_tensors
        wants = ctx.needs_input_grad
        several = ctx.size < len(states)
        d_states = torch.empty_like(states) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype if several else weight.dtype) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if wants[2] else None
        for a in range(0, len(states), ctx.size):
            chunk = slice(a, a + ctx.size)
            # The gradient takes the place of the logits; autograd refuses to read them again.
            grad = kept if kept is not None else F.linear(states[chunk], weight, bias)
            for rows, piece in _pieces(grad, a):
                wide = _wide(grad[rows])
                wide.sub_(lse[piece, None]).exp_().mul_(-slope[piece, None])
                wide.scatter_add_(1, target[piece, None], slope[piece, None])
                if d_bias is not None:
                    d_bias += wide.sum(0)
                if wide.dtype != grad.dtype:
                    grad[rows] = wide
            if d_states is not None:
                d_states[chunk] = grad @ weight
            if d_weight is not None and d_weight.dtype == grad.dtype:
                d_weight.addmm_(grad.t(), states[chunk])
            elif d_weight is not None:
                d_weight += grad.t() @ states[chunk]
        return (d_states, None if d_weight is None else d_weight.to(weight.dtype), None if d_bias is None else d_bias.to(bias.dtype),
                None, None)  # fmt: skip


def _plain_linear(model: Any) -> torch.nn.Linear | None:
    """The head where it is a linear map and nothing else: no adapter, scale, soft-cap or hook."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = inner.get_output_embeddings()
    scaled = any(getattr(inner.config, name, None) is not None for name in SCALES)
    return module if type(module) is torch.nn.Linear and not scaled and not module._forward_hooks else None


def token_logps(model: Any, hidden: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """log pi(target | prefix) of every target, (N,) fp32. More than one chunk of logits is recomputed in the backward pass.

    Args:
        temperature: divides the logits, so that these are the log-probs of what was sampled at it.
    """
    size, states = _chunk(vocabulary_of(model)), hidden[batch.hidden]
    if linear := _plain_linear(model):
        bias = linear.bias
        if temperature != 1:  # of a linear map the logits are divided before they are made
            states, bias = states / temperature, None if bias is None else bias / temperature
        return _LinearLogps.apply(states, linear.weight, bias, batch.target, size)
    head = head_of(model, temperature=temperature)
    if len(states) <= size:
        return _logps(head, states, batch.target)
    parts = []
    for a in range(0, len(states), size):
        piece, target = states[a : a + size], batch.target[a : a + size]
        kept = torch.is_grad_enabled()
        parts.append(checkpoint(_logps, head, piece, target, use_reentrant=False) if kept else _logps(head, piece, target))
    return torch.cat(parts)


def scalar_head(module: Any) -> torch.nn.Linear:
    """The scalar head: of a reward model, inside a LoRA wrapper or not (then its trained copy), or a linear map itself."""
    if isinstance(module, torch.nn.Linear):
        return module
    head = (module.get_base_model() if hasattr(module, "get_base_model") else module).score
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def head_outputs(module: Any, states: Tensor) -> Tensor:
    """(n, D) -> (n, C) float64: what the head says, C = 1 or classes. The map is taken in fp32 at least: eight bits of a reward would tie
    answers that differ."""
    head = scalar_head(module)
    bias = None if head.bias is None else _wide(head.bias)
    return F.linear(_wide(states), _wide(head.weight), bias).double()


def log_odds(said: Tensor) -> Tensor:
    """(n, C) -> (n,): the one output itself; of several the log-odds of the last class against all others."""
    return said[:, 0] if said.shape[1] == 1 else said[:, -1] - said[:, :-1].logsumexp(1)


def scalars(module: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """What the scalar head says at the last token of each response, (R,) float64. By position: no token is searched for."""
    return log_odds(head_outputs(module, hidden[batch.last]))


def token_scalars(module: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """What the scalar head says at the prefix of every target, before it is taken, (N,) float64: a value function."""
    return log_odds(head_outputs(module, hidden[batch.hidden]))


class Value(nn.Module):
    """Reward to come at every prefix: a head on the policy's states or on those of a trunk of its own. It starts at zero, or as a reward
    model (`begun`)."""

    def __init__(self, width: int, *, decoder: Any | None = None, segments: bool = False, dtype: torch.dtype = torch.float32):
        """width: of a hidden state. decoder: a trunk that trains with the head. segments: whether it reads a segment table."""
        super().__init__()
        self.decoder, self.reads_segments = decoder, segments
        self.head = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def begun(cls, model: Any, *, shift: float, scale: float) -> Value:
        """What a reward model says at every prefix, as its scores are normalised: (scalar - shift) / scale. Its trunk is copied."""
        head, trunk = scalar_head(model), copy.deepcopy(decoder_of(model)).requires_grad_(True)
        out = cls(head.in_features, decoder=trunk, segments=packs(model))
        with torch.no_grad():
            out.head.weight.copy_(head.weight.float() / scale)
            out.head.bias.copy_(((0 if head.bias is None else head.bias) - torch.tensor(shift)) / scale)
        return out

    def get_decoder(self) -> Any:
        """The trunk."""
        return self.decoder


class Learner(nn.Module):
    """A policy and its value model, so that one optimiser and one checkpoint hold both."""

    def __init__(self, policy: Any, value: Value | None):
        super().__init__()
        self.policy, self.value, self.reads_segments = policy, value, packs(policy)


def with_value(policy: Any, how: str, *, device: str) -> Learner:
    """The policy beside a value model: 'head', on its own states; 'copy', on those of a copy of its trunk, which trains too."""
    trunk = copy.deepcopy(decoder_of(policy)).requires_grad_(True) if how == "copy" else None
    width = next(p for p in policy.get_output_embeddings().parameters()).shape[-1]
    return Learner(policy, Value(width, decoder=trunk, segments=packs(policy)).to(device))


def values_of(value: Value, hidden: Tensor, batch: Batch) -> Tensor:
    """The value at the prefix of every target, (N,). hidden: the policy's states, which do not learn from it."""
    return token_scalars(value.head, hidden.detach() if value.decoder is None else hidden_states(value, batch), batch)


def prompt_values(value: Value, hidden: Tensor, batch: Batch) -> Tensor:
    """The value at the end of each response's prompt, from where its first token is read: (R,). hidden: as `values_of`."""
    count = torch.bincount(batch.response, minlength=batch.responses)  # targets stand in order
    return values_of(value, hidden, batch)[count.cumsum(0) - count]


def token_collisions(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """log sum_v pi(v | prefix)^2 at the prefix of every target, (N,), without gradient: how sure the policy is of its next token."""
    head, states = head_of(model), hidden[batch.hidden]
    with torch.no_grad():
        return torch.cat([_collisions(head, piece) for piece in states.split(_chunk(vocabulary_of(model)))])


def vocabulary_of(model: Any) -> int:
    """Width of the head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return int(inner.get_output_embeddings().weight.shape[0])


@contextmanager
def as_reference(model: Any, reference: Any | None) -> Iterator[Any]:
    """The frozen model: `reference` itself, or, where it is None, the same model with the adapter of this run switched off, or with
    the frozen copy of the adapter that it was given (GIVEN) in its place."""
    if reference is not None:
        yield reference
    elif GIVEN in getattr(model, "peft_config", {}):
        model.set_adapter(GIVEN, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter("default")
    else:
        with model.disable_adapter():
            yield model


def prefix_kl(policy: Any, policy_hidden: Tensor, reference: Any | None, reference_hidden: Tensor, batch: Batch) -> Tensor:
    """KL(pi(.|s_t) || ref(.|s_t)) at the prefix of every target, (N,) fp32, nats; without gradient.

    Summed over a response that pi sampled at temperature 1 it is the Rao-Blackwell estimate of the sequence KL (arXiv:2504.10637).
    """
    parts, size = [], max(1, _chunk(vocabulary_of(policy)) // 2)
    with torch.no_grad():
        for a in range(0, len(batch.hidden), size):
            index = batch.hidden[a : a + size]
            log_pi = _wide(head_of(policy)(policy_hidden[index])).log_softmax(-1)
            with as_reference(policy, reference) as frozen:
                log_ref = _wide(head_of(frozen)(reference_hidden[index])).log_softmax(-1)
            # 0 log 0 = 0: a token that pi never takes contributes nothing, whatever the reference says of it.
            parts.append(torch.where(log_pi == -torch.inf, 0, log_pi.exp() * (log_pi - log_ref)).sum(-1))
    return torch.cat(parts)


def forward_kl(policy: Any, policy_hidden: Tensor, reference: Any | None, reference_hidden: Tensor, batch: Batch) -> Tensor:
    """KL(ref(.|s_t) || pi(.|s_t)) at the prefix of every target, (N,) fp32, nats; its gradient flows into pi.

    More than one chunk of logits, of either model, is made again in the backward pass.
    """

    def piece(states: Tensor, frozen_states: Tensor) -> Tensor:
        with torch.no_grad(), as_reference(policy, reference) as frozen:
            log_ref = _wide(head_of(frozen)(frozen_states)).log_softmax(-1)
        log_pi = _wide(head_of(policy)(states)).log_softmax(-1)
        return torch.where(log_ref == -torch.inf, 0, log_ref.exp() * (log_ref - log_pi)).sum(-1)

    size, parts = max(1, _chunk(vocabulary_of(policy)) // 2), []
    for a in range(0, len(batch.hidden), size):
        index = batch.hidden[a : a + size]
        both = policy_hidden[index], reference_hidden[index]
        again = torch.is_grad_enabled() and size < len(batch.hidden)
        parts.append(checkpoint(piece, *both, use_reentrant=False) if again else piece(*both))
    return torch.cat(parts)


def prefix_entropy(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """H(pi(.|s_t)) at the prefix of every target, (N,) fp32, nats; without gradient."""
    head, parts = head_of(model), []
    with torch.no_grad():
        for piece in hidden[batch.hidden].split(_chunk(vocabulary_of(model))):
            log_pi = _wide(head(piece)).log_softmax(-1)
            parts.append(-torch.where(log_pi == -torch.inf, 0, log_pi.exp() * log_pi).sum(-1))
    return torch.cat(parts)


def response_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum per-target values (N,) into responses (R,), in float64."""
    out = torch.zeros(batch.responses, dtype=torch.float64, device=values.device)
    return out.index_add(0, batch.response, values.double())


def response_rows(values: Tensor, batch: Batch) -> Tensor:
    """Per-target values (N,) as one row per response, zero after its end: (R, T), T the longest response, in float64."""
    count = torch.bincount(batch.response, minlength=batch.responses)
    place = torch.arange(len(values), device=values.device) - (count.cumsum(0) - count)[batch.response]  # targets stand in order
    out = torch.zeros(batch.responses, int(count.max()), dtype=torch.float64, device=values.device)
    return out.index_put((batch.response, place), values.double())
