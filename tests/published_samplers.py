"""Naive reference samplers for diffusion language models (LLaDA, Dream, Fast-dLLM).

Written from their descriptions.  Plain loops, full logits, no speed.  A *cell* is a pair (batch row, absolute
position).  `logits_fn(ids [B, N]) -> float tensor [B, N, V]`; any attention mask or position ids
belong inside `logits_fn`.  The dtype of the logits is kept wherever the published code keeps it.

Noise
-----
All randomness comes from one object that the caller gives (protocol `Noise`).  A number is addressed
by what it is for, the step, and the cell, so an implementation that draws only for some cells sees
the same numbers as one that draws for all.

* `uniform(step, cells, vocab)`  float64 [len(cells), vocab], u in [0, 1): Gumbel-max of LLaDA and
  Fast-dLLM.  The token is argmax over v of exp(logit_v) / (-log u_v) ** temperature, in float64.
* `rows(step, cells)`            float32 [len(cells)], u in [0, 1): confidence of remasking='random'.
* `transfer(step, cells)`        float32 [len(cells)], u in [0, 1): Dream 'origin'; a cell is revealed
  when u < p_transfer.
* `categorical(step, cells, probs)`  int64 [len(cells)]: Dream tokens at temperature > 0.  Defined as an
  exponential race: argmax over v of probs_v / q_v, where q_v = -log(u_v) ~ Exp(1).
* `choice(step, probs [B, N], k)`    int64 [B, k], best first: Dream's alg_temp draw without
  replacement.  Exponential race again: the k largest of probs / q, q ~ Exp(1).

`step` counts forward passes from 0 over the whole call (never restarted per block).

Ties
----
Published code leaves ties to torch.topk (unspecified order).  Here: higher confidence first, then the
LOWER position.  Pass `trace=[]` to get (step, row, [(confidence, position) of candidates], chosen) and
let a test see whether a tie was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Cell = tuple[int, int]
LogitsFn = Callable[[torch.Tensor], torch.Tensor]
NEG_INF = float("-inf")


class Noise(Protocol):
    def uniform(self, step: int, cells: Sequence[Cell], vocab: int) -> torch.Tensor: ...
    def rows(self, step: int, cells: Sequence[Cell]) -> torch.Tensor: ...
    def transfer(self, step: int, cells: Sequence[Cell]) -> torch.Tensor: ...
    def categorical(self, step: int, cells: Sequence[Cell], probs: torch.Tensor) -> torch.Tensor: ...
    def choice(self, step: int, probs: torch.Tensor, k: int) -> torch.Tensor: ...


def first_k(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k highest scores, best first; ties go to the lower index."""
    return sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:k]


def schedule(masked: int, steps: int) -> list[int]:
    """Tokens to reveal at each step of a block: even shares, the remainder one each to the first."""
    base, extra = divmod(masked, steps)
    return [base + (1 if i < extra else 0) for i in range(steps)]


def gumbel_token(logits: torch.Tensor, temperature: float, u: torch.Tensor | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int((logits.double().exp() / (-u.log()) ** temperature).argmax())


# ---------------------------------------------------------------------------------------- LLaDA


def llada(
    logits_fn: LogitsFn,
    ids: torch.Tensor,
    *,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    mask_id: int = 126336,
    eos_id: int = 126081,
    eot_id: int = 126348,
    noise: Noise | None = None,
    eos_rule: str = "code",
    trace: list | None = None,
) -> torch.Tensor:
    """`eos_rule` says what confidence_eos_eot_inf does :
    'code'        as the published code does, temperature quirk and renormalisation included;
    'logits'      both logits -inf before the softmax at every temperature (upstream PR #139);
    'confidence'  as its docstring says: a cell whose token is EOS/EoT ranks after all other
                  candidates; other confidences stay as they were."""
    if remasking not in ("low_confidence", "random"):
        raise NotImplementedError(remasking)
    assert eos_rule in ("code", "logits", "confidence")
    assert gen_length % block_length == 0
    blocks = gen_length // block_length
    assert steps % blocks == 0
    per_block = steps // blocks
    batch, prompt = ids.shape
    x = torch.full((batch, prompt + gen_length), mask_id, dtype=torch.long)
    x[:, :prompt] = ids
    given = x != mask_id

    for block in range(blocks):
        begin, end = prompt + block * block_length, prompt + (block + 1) * block_length
        quota = [schedule(int((x[b, begin:end] == mask_id).sum()), per_block) for b in range(batch)]
        for i in range(per_block):
            step = block * per_block + i
            if cfg_scale > 0:
                blind = x.clone()
                blind[given] = mask_id
                both = logits_fn(torch.cat([x, blind]))
                cond, uncond = both[:batch], both[batch:]
                logits = uncond + (cfg_scale + 1) * (cond - uncond)
            else:
                logits = logits_fn(x).clone()
            if logits_eos_inf:
                logits[..., eos_id] = NEG_INF

            # every masked cell before the block's end may be revealed (masks left in the prompt or
            # in an earlier block included)
            cells = [(b, n) for b in range(batch) for n in range(end) if x[b, n] == mask_id]
            if not cells:
                continue
            u = noise.uniform(step, cells, logits.shape[-1]) if temperature != 0 else None
            tokens = [gumbel_token(logits[c], temperature, None if u is None else u[j]) for j, c in enumerate(cells)]

            if confidence_eos_eot_inf and eos_rule != "confidence":
                logits[..., eot_id] = NEG_INF
                if temperature == 0 or eos_rule == "logits":
                    logits[..., eos_id] = NEG_INF
            if remasking == "low_confidence":
                conf = [float(logits[c].softmax(-1)[t]) for c, t in zip(cells, tokens, strict=True)]
            else:
                conf = noise.rows(step, cells).tolist()
            if confidence_eos_eot_inf and eos_rule == "confidence":
                conf = [-1.0 if t in (eos_id, eot_id) else p for p, t in zip(conf, tokens, strict=True)]

            for b in range(batch):
                mine = [j for j, c in enumerate(cells) if c[0] == b]
                chosen = [mine[r] for r in first_k([conf[j] for j in mine], quota[b][i])]
                for j in chosen:
                    x[cells[j]] = tokens[j]
                if trace is not None:
                    trace.append((step, b, [(conf[j], cells[j][1]) for j in mine], [cells[j][1] for j in chosen]))
    return x


# ------------------------------------------------------------------------------------ Fast-dLLM


def fast_dllm(
    logits_fn: LogitsFn,
    ids: torch.Tensor,
    *,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    mask_id: int = 126336,
    noise: Noise | None = None,
    max_forwards: int = 100_000,
    trace: list | None = None,
) -> tuple[torch.Tensor, int]:
    """Without cache.  `factor` wins over `threshold`, which wins over the fixed schedule."""
    if remasking not in ("low_confidence", "random"):
        raise NotImplementedError(remasking)
    assert gen_length % block_length == 0
    blocks = gen_length // block_length
    assert steps % blocks == 0
    per_block = steps // blocks
    batch, prompt = ids.shape
    x = torch.full((batch, prompt + gen_length), mask_id, dtype=torch.long)
    x[:, :prompt] = ids
    forwards = 0

    for block in range(blocks):
        begin, end = prompt + block * block_length, prompt + (block + 1) * block_length
        quota = [schedule(int((x[b, begin:end] == mask_id).sum()), per_block) for b in range(batch)]
        i = 0
        while i == 0 or bool((x[:, begin:end] == mask_id).any()):
            if forwards == max_forwards:
                raise RuntimeError("no end: the model keeps choosing the mask token")
            logits = logits_fn(x)
            cells = [(b, n) for b in range(batch) for n in range(end) if x[b, n] == mask_id]
            u = noise.uniform(forwards, cells, logits.shape[-1]) if temperature != 0 else None
            tokens = [gumbel_token(logits[c], temperature, None if u is None else u[j]) for j, c in enumerate(cells)]
            if remasking == "low_confidence":
                conf = [float(logits[c].double().softmax(-1)[t]) for c, t in zip(cells, tokens, strict=True)]
            else:
                conf = noise.rows(forwards, cells).tolist()

            for b in range(batch):
                mine = [j for j, c in enumerate(cells) if c[0] == b]
                order = [mine[r] for r in first_k([conf[j] for j in mine], len(mine))]
                if not order:
                    continue
                if factor is not None:
                    take = factor_count([conf[j] for j in order], factor)
                elif threshold is not None:
                    take = 1 + sum(conf[j] >= threshold for j in order[1:])
                else:
                    take = quota[b][i]  # IndexError past the schedule, as published
                for j in order[:take]:
                    x[cells[j]] = tokens[j]
                if trace is not None:
                    trace.append(
                        (forwards, b, [(conf[j], cells[j][1]) for j in mine], [cells[j][1] for j in order[:take]])
                    )
            forwards += 1
            i += 1
    return x, forwards


def factor_count(ordered: Sequence[float], factor: float) -> int:
    """How many of the confidences (sorted, best first) pass; quirk: failing only at the last passes."""
    total = len(ordered)
    for r in range(1, total):  # the best always passes
        if ordered[r] < 1 - factor / (r + 2):
            return total if r == total - 1 else r
    return total


# ---------------------------------------------------------------------------------------- Dream


def keep_top_p(row: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep a token when the probability before it (in sorted order) is not above top_p."""
    order = torch.sort(row, descending=True, stable=True).indices
    mass = row[order].softmax(-1).cumsum(-1)
    out = torch.full_like(row, torch.finfo(row.dtype).min)
    for r in range(len(order)):
        if r == 0 or not mass[r - 1] > top_p:
            out[order[r]] = row[order[r]]
    return out


def keep_top_k(row: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens equal to the k-th largest logit stay too."""
    kth = row.topk(min(top_k, row.numel())).values[-1]
    return torch.where(row < kth, torch.finfo(row.dtype).min, row)


def dream_row(row: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Probabilities of one position: temperature, then top_p, then top_k, then softmax."""
    if temperature > 0:
        row = row / temperature
    if top_p is not None and top_p < 1:
        row = keep_top_p(row, top_p)
    if top_k is not None:
        row = keep_top_k(row, top_k)
    return row.softmax(-1)


def dream_confidence(probs: torch.Tensor, token: int, alg: str) -> torch.Tensor:
    if alg in ("maskgit_plus", "confidence_threshold"):
        return probs[token]
    if alg == "topk_margin":
        best = probs.sort(descending=True).values
        return best[0] - best[1]
    if alg == "entropy":
        return (probs * (probs + 1e-10).log()).sum()
    raise RuntimeError(f"Unknown alg: {alg}")


def dream_tokens(
    probs: torch.Tensor, cells: Sequence[Cell], step: int, temperature: float, noise: Noise | None
) -> list[int]:
    if temperature > 0:
        return noise.categorical(step, cells, probs).tolist()
    return [int(row.argmax()) for row in probs]


def dream(
    logits_fn: LogitsFn,
    ids: torch.Tensor,
    *,
    steps: int = 512,
    max_new_tokens: int = 20,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    mask_id: int = 151666,
    noise: Noise | None = None,
    tokens_hook: Callable | None = None,
    logits_hook: Callable | None = None,
    history: list | None = None,
    trace: list | None = None,
) -> torch.Tensor:
    batch, prompt = ids.shape
    x = torch.full((batch, prompt + max_new_tokens), mask_id, dtype=torch.long)
    x[:, :prompt] = ids
    times = torch.linspace(1, eps, steps + 1)  # float32, on purpose
    if tokens_hook is not None:
        x = tokens_hook(None, x, None)

    for step in range(steps):
        last = step == steps - 1
        raw = logits_fn(x)
        logits = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)  # position n reads the row of n - 1
        if logits_hook is not None:
            logits = logits_hook(step, x, logits)
        cells = [(b, n) for b in range(batch) for n in range(x.shape[1]) if x[b, n] == mask_id]
        share = 1 - times[step + 1] / times[step]

        if alg == "origin":
            if cells:
                u = noise.transfer(step, cells)
                limit = torch.tensor(1.0) if last else share
                cells = [c for j, c in enumerate(cells) if bool(u[j] < limit)]
            if cells:
                probs = torch.stack([dream_row(logits[c], temperature, top_p, top_k) for c in cells])
                for c, t in zip(cells, dream_tokens(probs, cells, step, temperature, noise), strict=True):
                    x[c] = t
        else:
            proposal: dict[Cell, int] = {}
            conf = torch.full(x.shape, NEG_INF, dtype=logits.dtype)
            if cells:
                probs = torch.stack([dream_row(logits[c], temperature, top_p, top_k) for c in cells])
                tokens = dream_tokens(probs, cells, step, temperature, noise)
                for c, p, t in zip(cells, probs, tokens, strict=True):
                    proposal[c] = t
                    conf[c] = dream_confidence(p, t, alg)
            elif alg not in ("maskgit_plus", "topk_margin", "entropy"):
                raise RuntimeError(f"Unknown alg: {alg}")
            mean = torch.tensor(len(cells)) / batch  # float32; one count for every row
            k = int(mean) if last else int(mean * share)
            if k > 0:
                if alg_temp is None or alg_temp == 0:
                    picks = [first_k(conf[b].tolist(), k) for b in range(batch)]
                else:
                    picks = noise.choice(step, (conf / alg_temp).softmax(-1), k).tolist()
                for b in range(batch):
                    for n in picks[b]:
                        # a pick that was not masked is overwritten BY the mask, as published
                        x[b, n] = proposal.get((b, n), mask_id)
                    if trace is not None:
                        trace.append((step, b, [(float(conf[c]), c[1]) for c in cells if c[0] == b], list(picks[b])))
        if tokens_hook is not None:
            x = tokens_hook(step, x, logits)
        if history is not None:
            history.append(x.clone())
    return x


def fast_dllm_dream(
    logits_fn: LogitsFn,
    ids: torch.Tensor,
    *,
    steps: int = 512,
    max_new_tokens: int = 20,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    mask_id: int = 151666,
    noise: Noise | None = None,
) -> tuple[torch.Tensor, int]:
    """Fast-dLLM's alg 'confidence_threshold' for Dream without cache: batch 1 only."""
    assert ids.shape[0] == 1
    x = torch.cat([ids, torch.full((1, max_new_tokens), mask_id, dtype=torch.long)], dim=1)
    masked = int((x == mask_id).sum())
    assert masked % steps == 0
    fresh, owed, step = masked // steps, 0, 0
    while step < steps:
        raw = logits_fn(x)
        logits = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
        cells = [(0, n) for n in range(x.shape[1]) if x[0, n] == mask_id]
        probs = torch.stack([dream_row(logits[c], temperature, top_p, top_k) for c in cells])
        tokens = dream_tokens(probs, cells, step, temperature, noise)
        conf = [float(p[t]) for p, t in zip(probs, tokens, strict=True)]
        budget, owed = fresh + owed, 0
        for rank, j in enumerate(first_k(conf, budget)):
            if rank > 0 and conf[j] < threshold:
                owed += 1
                if step >= steps - 1:
                    fresh, steps = 0, steps + 1
            else:
                x[cells[j]] = tokens[j]
        step += 1
    return x, steps
