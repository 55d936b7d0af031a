"""One interface to every method: what the training loop asks of GFT and of its rivals.

    gft     FlipOptimizer; where int_layers leaves some layers in fp32, AdamW for those in the same step
    adamw   torch.optim.AdamW on every weight
    muon    torch.optim.Muon on the matrices of the blocks, AdamW on embedding and head
    sgd     torch.optim.SGD with momentum 0.9 on every weight
    signsgd every weight moves by lr against the sign of its gradient; no state
    ste     AdamW on latent weights that are rounded to `bits` bits in the forward pass: at two bits to -1, 0, +1 times
            mean|w| as in BitNet b1.58, at one to -1, +1 times it, at more to a uniform grid up to max|w|; of weights
            only, activations stay fp32

The baselines' learning rate rises over `warmup` steps and falls linearly to lr_end * lr. Their weight decay is
decoupled: AdamW's.
"""

import torch
from torch import Tensor, nn

from run.config import Config
from gft.optimizer import FlipOptimizer
from run.schedule import scheduled


class FlipLearner:
    """GFT: flips, no gradients of weights."""

    def __init__(self, net: nn.Module, cfg: Config):
        keys = ("k", "k_end", "k_schedule", "k_warmup", "steps", "rule", "embedding_rule", "ortho_tile", "select_tile",
                "flip_prob", "flip_gamma", "step_size", "memory", "beta", "delta", "delta_bits", "delta_scale", "seed",
                "flip_at")  # fmt: skip
        self.optimizer = FlipOptimizer(net, **{key: getattr(cfg, key) for key in keys})
        self.floats = GradientLearner(net, cfg) if any(True for _ in net.parameters()) else None

    def loss_scale(self, tokens: int) -> float:
        """Factor on the summed loss. delta is not divided by the number of tokens: its int8 scale follows it anyway.

        Nor does AdamW, in the float layers there may be, ask how large a gradient is.
        """
        return 1.0

    def step(self, step: int) -> int:
        """Make step number `step`. Returns the number of weights changed."""
        return self.optimizer.step() + (self.floats.step(step) if self.floats else 0)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save beside the net's."""
        floats = self.floats.state() if self.floats else {}
        return self.optimizer.state_dict() | {f"float.{name}": value for name, value in floats.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave."""
        floats = {name.removeprefix("float."): state[name] for name in state if name.startswith("float.")}
        self.optimizer.load_state_dict({name: value for name, value in state.items() if not name.startswith("float.")})
        if self.floats:
            self.floats.load(floats)

    def state_bytes(self) -> int:
        """Bytes of state kept between steps."""
        return self.optimizer.state_bytes() + (self.floats.state_bytes() if self.floats else 0)

    def scale_bytes(self) -> int:
        """Bytes of scales: of layers, memory tiles and delayed deltas."""
        return self.optimizer.scale_bytes() + sum(layer.scale.nbytes for layer in self.optimizer.layers)


class GradientLearner:
    """AdamW, Muon, SGD, signSGD, or AdamW on latent weights (ste)."""

    def __init__(self, net: nn.Module, cfg: Config):
        self.cfg = cfg
        blocks = [p for name, p in net.named_parameters() if name.startswith("blocks.") and cfg.method == "muon"]
        others = [p for p in net.parameters() if not any(p is b for b in blocks)]
        if cfg.method in ("sgd", "signsgd"):
            momentum = 0.9 if cfg.method == "sgd" else 0.0
            first = torch.optim.SGD(others, lr=cfg.lr, momentum=momentum, fused=True)
        else:
            first = torch.optim.AdamW(
                others, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
            )
        self.optimizers = [(first, cfg.lr)]
        if blocks:
            muon = torch.optim.Muon(blocks, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95)
            self.optimizers.append((muon, cfg.muon_lr))
        self.weights = sum(p.numel() for p in net.parameters())

    def loss_scale(self, tokens: int) -> float:
        """Factor on the summed loss: its mean over the step's tokens."""
        return 1.0 / tokens

    def step(self, step: int) -> int:
        """Make step number `step` and clear gradients. Returns the number of weights changed: all of them."""
        for optimizer, lr in self.optimizers:
            now = scheduled(lr, self.cfg.lr_end * lr, "linear", step, self.cfg.steps, self.cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = now
            if self.cfg.method in ("sgd", "signsgd"):
                self._before_sgd(now)
            optimizer.step()
            optimizer.zero_grad()
        return self.weights

    @torch.no_grad()
    def _before_sgd(self, lr: float) -> None:
        """Decay the weights, and for signsgd leave the sign alone of their gradients:
        torch's SGD adds decay to them."""
        for _, _, p in self._parameters():
            if self.cfg.weight_decay:
                p.mul_(1 - lr * self.cfg.weight_decay)
            if self.cfg.method == "signsgd":
                p.grad.sign_()

    def _parameters(self) -> list[tuple[str, torch.optim.Optimizer, Tensor]]:
        return [
            (f"{i}.{j}", optimizer, p)
            for i, (optimizer, _) in enumerate(self.optimizers)
            for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        ]

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, named optimizer.parameter.key."""
        named = self._parameters()
        return {f"{name}.{key}": value for name, optimizer, p in named for key, value in optimizer.state[p].items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave."""
        for name, optimizer, p in self._parameters():
            own = {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
            optimizer.state[p] = {k: v.to(p.device) for k, v in own.items()}

    def state_bytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(value.nbytes for value in self.state().values())

    def scale_bytes(self) -> int:
        """Bytes of scales: none."""
        return 0


def make_learner(net: nn.Module, cfg: Config) -> FlipLearner | GradientLearner:
    """The learner of cfg.method for net's weights."""
    return FlipLearner(net, cfg) if cfg.method == "gft" else GradientLearner(net, cfg)
