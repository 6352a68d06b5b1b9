"""The WKV recurrence of RWKV-4 (arXiv 2305.13048): a decaying weighted mean, in three forms.

Every channel for itself: a token counts with weight exp(k), fading by exp(w) a step, and with
exp(u + k) when it is read at once. The state is a fraction whose common factor exp(max) is kept
apart, so that no key overflows (appendix D of the paper).

Shape legend: B batch, T time, D width, N chunks, C chunk length. `w` is `log_decay`, `u` is
`bonus`; a logit is the log of a weight. Logits are float64 inside a call: a running sum of small
decays loses float32's digits. Only their differences are exponentiated, in the state's dtype.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.decay import Chunks, check_reset, state_dtype

EMPTY = -1e38
"""The largest logit of a state that nothing has been written to."""

WIPED = -1e30
"""Log-decays below this, -inf included, are raised to it: no key makes up for it, and unlike -inf
it can be multiplied with 0. (The other recurrences stop at -1000, which keys could make up for.)"""


class WKV4State(NamedTuple):
    """All that was written: values `num / den`, with weights `den exp(max)`.

    `max` is the largest logit that counts: one state has one such form, whoever computed it.
    """

    num: Tensor
    """`[B, D]`, sum of values, each weighted by exp(logit - max)."""
    den: Tensor
    """`[B, D]`, sum of the weights."""
    max: Tensor
    """`[B, D]`, the largest logit."""

    @classmethod
    def empty(
        cls,
        batch_size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "WKV4State":
        """The state before the first token."""
        zeros = torch.zeros(batch_size, width, dtype=dtype, device=device)
        return cls(zeros, zeros.clone(), torch.full_like(zeros, EMPTY))


def recurrent_wkv4(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None = None,
    initial_state: WKV4State | None = None,
) -> tuple[Tensor, WKV4State]:
    """The definition: one token after the other, read before it is written.

    Args:
        k: `[B, T, D]`, logits: a token's weight is exp(k). Of any size.
        v: `[B, T, D]`, what is averaged.
        log_decay: `[D]`, natural log of what a step leaves of a weight, <= 0, -inf allowed;
            `-exp(time_decay)` of RWKV-4.
        bonus: `[D]`, added to a token's own logit when it is read; `time_first` of RWKV-4.
        reset: `[B, T]` bool, True where a token starts a document: the state is empty before it.
        initial_state: each part `[B, D]`; None for an empty one.

    Returns:
        o `[B, T, D]` in the dtype of v, and the final state in at least float32. Where logits tie
        for `max`, its gradient goes to the latest.

    Raises:
        ValueError: if shapes do not fit together.
    """
    output_dtype = v.dtype
    k, v, w, u, (num, den, top) = prepare(k, v, log_decay, bonus, reset, initial_state)
    outputs = []
    for t in range(v.shape[1]):
        if reset is not None:
            start = reset[:, t, None]
            num, den = num.masked_fill(start, 0.0), den.masked_fill(start, 0.0)
            top = top.masked_fill(start, EMPTY)
        k_t, v_t = k[:, t], v[:, t]

        p = torch.maximum(top, u + k_t).detach()  # o does not depend on it
        old, new = _exp(top - p, v.dtype), _exp(u + k_t - p, v.dtype)
        outputs.append((old * num + new * v_t) / (old * den + new))

        p = torch.where(k_t >= top + w, k_t, top + w)
        old, new = _exp(top + w - p, v.dtype), _exp(k_t - p, v.dtype)
        num, den, top = old * num + new * v_t, old * den + new, p
    return torch.stack(outputs, dim=1).to(output_dtype), WKV4State(num, den, top.to(v.dtype))


def parallel_wkv4(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None = None,
    initial_state: WKV4State | None = None,
) -> tuple[Tensor, WKV4State]:
    """All tokens at once: for every channel a softmax over the logits of what a token sees.

    These are `k_i + (t - 1 - i) w` for i < t, `k_t + u`, and `max + t w` of the initial state.
    Work and memory grow with T squared. Arguments, results and errors as `recurrent_wkv4`.
    """
    output_dtype = v.dtype
    k, v, w, u, state = prepare(k, v, log_decay, bonus, reset, initial_state)
    index = torch.arange(k.shape[1], device=k.device)
    from_state = state.max[:, None] + index[:, None] * w
    if reset is not None:
        from_state = from_state.masked_fill((reset.cumsum(dim=1) > 0)[..., None], -torch.inf)
    logits = torch.cat([from_state[:, :, None], _logits(k, w, u, reset)], dim=2)
    weights = _exp(logits - logits.detach().amax(dim=2, keepdim=True), v.dtype)
    num = torch.cat([state.num[:, None], v], dim=1)
    den = torch.cat([state.den[:, None], torch.ones_like(v)], dim=1)
    o = (weights * num[:, None]).sum(dim=2) / (weights * den[:, None]).sum(dim=2)
    return o.to(output_dtype), _final_state(k, v, w, reset, state)


def wkv4_weights(
    k: Tensor, *, log_decay: Tensor, bonus: Tensor, reset: Tensor | None = None
) -> Tensor:
    """What each token takes of the values of all, from an empty state: float64 `[B, D, T, T]`.

    `o_i = sum_j weights_ij v_j` in every channel. Arguments and errors as `recurrent_wkv4`.
    """
    k, _, w, u, _ = prepare(k, k, log_decay, bonus, reset, None)
    return _logits(k, w, u, reset).softmax(dim=2).permute(0, 3, 1, 2)


def _logits(k: Tensor, w: Tensor, u: Tensor, reset: Tensor | None) -> Tensor:
    """Of what each token sees of all tokens, `[B, T, T, D]`; -inf is hidden."""
    index = torch.arange(k.shape[1], device=k.device)
    passed = index[:, None] - index - 1
    own = torch.eye(len(index), dtype=torch.bool, device=k.device)[..., None]
    logits = k[:, None] + torch.where(own, u, passed[..., None] * w)
    hidden = (passed < -1)[None]
    if reset is not None:
        document = reset.cumsum(dim=1)
        hidden = hidden | (document[:, :, None] != document[:, None])
    return logits.masked_fill(hidden[..., None], -torch.inf)


def chunked_wkv4(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None = None,
    initial_state: WKV4State | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, WKV4State]:
    """Token by token in all chunks at once, then chunk by chunk: C + N steps instead of T.

    A token sees three things, in a softmax: itself, the part of its chunk before it, and the state
    before its chunk. Work and memory grow with T, whatever C. Arguments, results and errors as
    `recurrent_wkv4`; the result does not depend on `chunk_size`.
    """
    output_dtype = v.dtype
    k, v, w, u, state = prepare(k, v, log_decay, bonus, reset, initial_state)
    chunks = Chunks(k.shape[1], chunk_size)

    def cut(x: Tensor) -> Tensor:
        """`[B, T, X]` -> `[B, N, C, X]`."""
        return chunks.cut(x[:, :, None])[:, 0]

    keys, values = cut(k), cut(v)
    starts = None if reset is None else cut(reset[..., None].long()).bool()
    inside = _running(WKV4State(values, torch.ones_like(values), keys), w, starts)
    ends = [x[:, :-1, -1] for x in inside]  # the last chunk's is not carried anywhere
    wiped = None if starts is None else F.pad(starts.any(dim=2)[:, :-1], (0, 0, 1, 0))
    added = (torch.cat([x[:, None], y], dim=1) for x, y in zip(state, ends, strict=True))
    carried = WKV4State(
        *(x[:, :, None] for x in _running(WKV4State(*added), chunks.length * w, wiped))
    )

    index = torch.arange(chunks.length, device=k.device)
    from_chunk = F.pad(inside.max[:, :, :-1], (0, 0, 1, 0), value=EMPTY)
    from_state = carried.max + index[:, None] * w
    if starts is not None:
        from_chunk = from_chunk.masked_fill(starts, -torch.inf)
        from_state = from_state.masked_fill(starts.cumsum(dim=2) > 0, -torch.inf)
    top = torch.maximum(torch.maximum(from_chunk, from_state), u + keys).detach()
    own, near, far = (_exp(x - top, v.dtype) for x in (u + keys, from_chunk, from_state))
    num, den = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (inside.num, inside.den))
    o = (own * values + near * num + far * carried.num) / (own + near * den + far * carried.den)
    o = chunks.join(o[:, None])[:, :, 0]
    return o.to(output_dtype), _final_state(k, v, w, reset, state)


def _exp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that belong to float64 differences of logits."""
    return logits.to(dtype).exp()


def _running(added: WKV4State, w: Tensor, starts: Tensor | None) -> WKV4State:
    """The state after each of L things is added, the earlier ones decaying by w each time.

    Args:
        added: each part `[B, ..., L, D]`; `max` is the logit.
        w: `[D]`.
        starts: `[B, ..., L, 1]` bool, True where what came before is forgotten.

    Returns:
        Each part `[B, ..., L, D]`. Its `max` has no gradient: what is read from these states does
        not depend on which common factor they are kept relative to.
    """
    tops = []
    top = torch.full_like(added.max[..., 0, :], EMPTY)
    for step, logit in enumerate(added.max.detach().unbind(dim=-2)):
        if starts is not None:
            top = top.masked_fill(starts[..., step, :], EMPTY)
        top = torch.maximum(top + w.detach(), logit)
        tops.append(top)
    tops_after = torch.stack(tops, dim=-2)
    faded = tops_after[..., :-1, :] + w
    if starts is not None:
        faded = faded.masked_fill(starts[..., 1:, :], -torch.inf)
    keep = _exp(faded - tops_after[..., 1:, :], added.num.dtype)
    weights = _exp(added.max - tops_after, added.num.dtype)
    writes = (torch.stack([added.num, added.den]) * weights).unbind(dim=-2)
    states = [writes[0]]
    for write, kept in zip(writes[1:], keep.unbind(dim=-2), strict=True):
        states.append(torch.addcmul(write, kept, states[-1]))
    num, den = torch.stack(states, dim=-2).unbind()
    return WKV4State(num, den, tops_after)


def _final_state(
    k: Tensor, v: Tensor, w: Tensor, reset: Tensor | None, state: WKV4State
) -> WKV4State:
    """The state after the last token, from `state` before the first: one sum over all tokens."""
    time = k.shape[1]
    passed = torch.arange(time - 1, -1, -1, device=k.device)
    logits = torch.cat([(state.max + time * w)[:, None], k + passed[:, None] * w], dim=1)
    if reset is not None:
        document = F.pad(reset.cumsum(dim=1), (1, 0))
        logits = logits.masked_fill((document != document[:, -1:])[..., None], -torch.inf)
    latest = time - logits.detach().flip(1).argmax(dim=1, keepdim=True)
    top = logits.gather(1, latest)
    weights = _exp(logits - top, v.dtype)
    num = (weights * torch.cat([state.num[:, None], v], dim=1)).sum(dim=1)
    den = (weights * F.pad(state.den[:, None], (0, 0, 0, time), value=1.0)).sum(dim=1)
    return WKV4State(num, den, top[:, 0].to(v.dtype))


def prepare(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None,
    initial_state: WKV4State | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, WKV4State]:
    """Checks the arguments; v, `num` and `den` in the state's dtype, all logits in float64."""
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"k and v must both be [B, T, D], but are {[*k.shape]} and {[*v.shape]}")
    batch, time, width = k.shape
    if time < 1:
        raise ValueError("a sequence needs at least one token, but T is 0")
    for name, tensor in (("log_decay", log_decay), ("bonus", bonus)):
        if tensor.shape != (width,):
            raise ValueError(f"{name} must be [D] = {[width]}, but is {[*tensor.shape]}")
    check_reset(reset, batch, time)
    dtype = state_dtype(k, v)
    if initial_state is None:
        state = WKV4State.empty(batch, width, dtype=dtype, device=k.device)
    else:
        state = initial_state
    for name, part in zip(state._fields, state, strict=True):
        if part.shape != (batch, width):
            raise ValueError(
                f"initial_state.{name} must be {[batch, width]}, but is {[*part.shape]}"
            )
    state = WKV4State(state.num.to(dtype), state.den.to(dtype), state.max.double())
    w = log_decay.double().clamp(min=WIPED)
    return k.double(), v.to(dtype), w, bonus.double(), state
