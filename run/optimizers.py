"""The optimizers of a run: one or two torch optimizers, each with its schedule, for every method of train.py."""

import torch
from torch import nn

from gft.baselines import Muon, SignSGD
from gft.layers import IntEmbedding, int_layers
from gft.optimizer import FlipOptimizer
from run import distributed
from run.config import Config
from run.distributed import Ranks
from run.schedule import Schedule

Optimizers = list[tuple[torch.optim.Optimizer, Schedule]]


def make_optimizers(
    net: nn.Module, cfg: Config, tokens: int, ranks: Ranks = distributed.ALONE, graph: bool = False
) -> Optimizers:
    """One or two torch optimizers, each with its schedule: integer weights learn by flips, float weights by gradients.

    `tokens` are those of a step, whose votes are summed. In a CUDA `graph` learning rates are tensors.

    adamw    torch.optim.AdamW on every weight; also on the float layers of a gft run that has some
    muon     Muon on the matrices of the blocks, AdamW on embedding and head
    sgd      torch.optim.SGD with momentum 0.9; signsgd moves every weight by lr against the sign of its gradient
    ste      AdamW or Muon on latent weights, which the layers round (gft/baselines.py)
    """
    found: Optimizers = []
    if integers := int_layers(net):
        tables = [layer.weight for layer in integers if isinstance(layer, IntEmbedding)]
        others = [layer.weight for layer in integers if not isinstance(layer, IntEmbedding)]
        groups = [{"params": tables, "rule": cfg.embedding_rule}, {"params": others, "rule": cfg.rule}]
        flips = FlipOptimizer(
            [group for group in groups if group["params"]], lr=cfg.k, momentum=cfg.momentum, ortho_tile=cfg.ortho_tile,
            topk_tile=cfg.topk_tile, step_size=cfg.step_size, flip_prob=cfg.flip_prob, flip_gamma=cfg.flip_gamma,
            update=cfg.update, max_tokens=tokens, process_group=ranks.group,
        )  # fmt: skip
        found.append((flips, Schedule(flips, cfg.steps, cfg.k_end, cfg.k_schedule, cfg.k_warmup)))
    floats = {name: p for name, p in net.named_parameters() if p.is_floating_point()}
    blocks = [p for name, p in floats.items() if cfg.under_muon and name.startswith("blocks.")]
    others = [p for p in floats.values() if not any(p is block for block in blocks)]
    if cfg.method == "sgd":
        optimizer = torch.optim.SGD(others, lr=cfg.lr, momentum=0.9, fused=True)
        # Decoupled, as AdamW's: SGD's own weight decay would be part of the gradient.
        optimizer.register_step_pre_hook(lambda opt, *_: _decay(opt, cfg.weight_decay))
    elif cfg.method == "signsgd":
        optimizer = SignSGD(others, lr=cfg.lr, weight_decay=cfg.weight_decay)
    elif others:
        betas = (0.9, cfg.beta2)
        optimizer = torch.optim.AdamW(others, lr=cfg.lr, betas=betas,
                                      weight_decay=cfg.weight_decay, fused=True, capturable=graph)  # fmt: skip
    if others:
        found.append((optimizer, Schedule(optimizer, cfg.steps, cfg.lr_end * cfg.lr, warmup=cfg.warmup)))
    if blocks:
        muon = Muon(blocks, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, state=cfg.muon_state)
        found.append((muon, Schedule(muon, cfg.steps, cfg.lr_end * cfg.muon_lr, warmup=cfg.warmup)))
    for optimizer, _ in found if graph else ():
        dtype = torch.float64 if isinstance(optimizer, FlipOptimizer) else torch.float32
        for group in optimizer.param_groups:  # tensors, which schedules then write to
            group["lr"] = torch.as_tensor(group["lr"], dtype=dtype, device=group["params"][0].device)
    return found


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.mul_(1 - group["lr"] * weight_decay)


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """Bytes that optimizers keep between steps: of state, and of scales."""
    states = [state for o in optimizers for state in o.state_dict()["state"].values()]
    kept = [item for state in states for item in state.items() if item[0] != "rng"]
    scales = sum(tensor.nbytes for name, tensor in kept if name in ("momentum_scale", "delta_history"))
    return sum(tensor.nbytes for _, tensor in kept) - scales, scales
