"""The recurrences once more, written out sum by sum: what the recurrent forms are checked against.

Nothing here is computed by `model.ops` but a score's weights, and nothing is fast. Arguments and
results are those of the recurrent forms, in float64.
"""

import torch
from torch import Tensor

from model.ops.attention import AnyScore, KVCache
from model.ops.scores import find_score
from model.ops.wkv4 import WKV4State
from train.verify.running import Function


def additive(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`S_t[i, j] = exp(g_t[i]) S_{t-1}[i, j] + k_t[i] v_t[j]`, one row of the state at a time."""
    batch, time, heads, keys = k.shape
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    outputs, finals = [], []
    for row in range(batch):
        for head in range(heads):
            state = torch.zeros(keys, v.shape[-1], dtype=v.dtype)
            if initial_state is not None:
                state = initial_state[row, head]
            for t in range(time):
                if reset is not None and reset[row, t]:
                    state = torch.zeros_like(state)
                old, lines = state, []
                for i in range(keys):
                    line = old[i]
                    if log_decay is not None:
                        g = log_decay[row, t, head]
                        line = torch.exp(g[i] if g.dim() else g) * line
                    lines.append(line + k[row, t, head, i] * v[row, t, head])
                state = torch.stack(lines)
                if bonus is None:
                    read = q[row, t, head] @ state
                else:
                    own = (q[row, t, head] * bonus[head] * k[row, t, head]).sum()
                    read = q[row, t, head] @ old + own * v[row, t, head]
                outputs.append(scale * read)
            finals.append(state)
    o = torch.stack(outputs).reshape(batch, heads, time, -1).transpose(1, 2)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + eps)
    return o, torch.stack(finals).reshape(batch, heads, keys, -1)


def delta(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = (diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T`, by the whole transition matrix."""
    batch, time, heads, keys = k.shape
    outputs, finals = [], []
    for row in range(batch):
        for head in range(heads):
            state = torch.zeros(keys, v.shape[-1], dtype=v.dtype)
            if initial_state is not None:
                state = initial_state[row, head]
            for t in range(time):
                if reset is not None and reset[row, t]:
                    state = torch.zeros_like(state)
                decay = torch.ones(keys, dtype=v.dtype)
                if log_decay is not None:
                    decay = decay * torch.exp(log_decay[row, t, head])
                transition = torch.diag(decay) + torch.outer(b[row, t, head], a[row, t, head])
                state = transition @ state + torch.outer(k[row, t, head], v[row, t, head])
                outputs.append(scale * (q[row, t, head] @ state))
            finals.append(state)
    o = torch.stack(outputs).reshape(batch, heads, time, -1).transpose(1, 2)
    return o, torch.stack(finals).reshape(batch, heads, keys, -1)


def attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: AnyScore = "softmax",
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
) -> tuple[Tensor, KVCache]:
    """`o_i = sum_j w_ij v_j`, the weights those of exactly the visible scores, in a row alone."""
    weigh = find_score(score)
    batch, time, heads, _ = k.shape
    outputs, all_keys, all_values, firsts = [], [], [], []
    for row in range(batch):
        keys, values = k[row], v[row]
        first = cached = 0
        if initial_state is not None:
            cached, first = initial_state.key.shape[1], int(initial_state.start[row])
            keys = torch.cat([initial_state.key[row], keys])
            values = torch.cat([initial_state.value[row], values])
        for t in range(time):
            if reset is not None and reset[row, t]:
                first = cached + t
            seen = slice(first, cached + t + 1)
            for head in range(heads):
                scores = (scale * (keys[seen, head] @ q[row, t, head]))[None, None, None]
                weights = weigh(scores, torch.ones_like(scores, dtype=torch.bool))[0, 0, 0]
                outputs.append(weights @ values[seen, head])
        all_keys.append(keys)
        all_values.append(values)
        firsts.append(first)
    o = torch.stack(outputs).reshape(batch, time, heads, -1)
    return o, KVCache(torch.stack(all_keys), torch.stack(all_values), torch.tensor(firsts))


def wkv4(
    *,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None = None,
    initial_state: WKV4State | None = None,
) -> tuple[Tensor, WKV4State]:
    """`o_t = sum_i exp(l_i) v_i / sum_i exp(l_i)`, the logits `l_i` in a list, nothing carried."""
    batch, time, width = k.shape
    outputs, parts = [], []
    for row in range(batch):
        for channel in range(width):
            w, u = log_decay[channel], bonus[channel]
            logits: list[Tensor] = []  # of all that was written, as they stand before token t
            values: list[Tensor] = []
            weights: list[Tensor] = []
            if initial_state is not None:
                num, den, largest = (x[row, channel] for x in initial_state)
                logits, values, weights = [largest], [num], [den]
            for t in range(time):
                if reset is not None and reset[row, t]:
                    logits, values, weights = [], [], []
                key, value = k[row, t, channel], v[row, t, channel]
                one = torch.ones_like(key)
                seen = torch.stack([*logits, u + key]).exp()
                top = (seen * torch.stack([*values, value])).sum()
                outputs.append(top / (seen * torch.stack([*weights, one])).sum())
                logits = [w + logit for logit in logits] + [key]
                values, weights = [*values, value], [*weights, one]
            all_logits = torch.stack(logits)
            largest = all_logits.max()
            factors = (all_logits - largest).exp()
            sums = [(factors * torch.stack(x)).sum() for x in (values, weights)]
            parts.append(torch.stack([*sums, largest]))
    o = torch.stack(outputs).reshape(batch, width, time).transpose(1, 2)
    return o, WKV4State(*torch.stack(parts).reshape(batch, width, 3).unbind(-1))


DEFINITIONS: dict[str, Function] = {
    "additive": additive,
    "delta": delta,
    "wkv4": wkv4,
    "attention": attention,
}
"""By the name of the row in `model.ops.OPS`."""
