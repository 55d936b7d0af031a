"""Random changes to images, on tensors: mirroring, random resized crop, mixup, CutMix; and bytes to normalised floats.

    crop     a box of a random share of the area and a random shape, stretched back over the whole image (bilinear)
    hflip    left and right exchanged
    mixup    x = w x + (1 - w) x', w ~ Beta(alpha, alpha) for each image (Zhang et al. 2018); x' is a partner's image
    CutMix   a box of x' of area 1 - w in x, w ~ Beta(alpha, alpha), then w = the area left (Yun et al. 2019)

Every number is Philox(seed, step, stream, image of the global batch), so an image changes in the same way in whichever
micro-batch or process it is. A partner is another image of the global batch; `augmented` reads it from the data,
wherever it is used itself.

Seed and step are read from a tensor on the images' device, and no shape depends on what is drawn. So on a GPU the host
waits for nothing, and a CUDA graph can hold all of this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kernels.philox import uniform_from

# A layer's streams are kernels.philox.Stream's ids, below 16, plus 16 times its index: 2^20 would be layer 65,536.
FIRST_STREAM = 1 << 20
HFLIP, CROP, PARTNER, MIX, WEIGHT = range(FIRST_STREAM, FIRST_STREAM + 5)

MIXES = ("none", "mixup", "cutmix", "both")
TRIES = 32  # of a draw that succeeds at least every other time


@dataclass(frozen=True)
class Augment:
    """What is done to a training image. The ranges are those of the box before it is clipped to the image."""

    hflip: float = 0.5  # probability of being mirrored
    crop_scale: tuple[float, float] = (0.35, 1.0)  # share of the image's area; (1, 1) is no crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height in pixels
    mix: str = "none"  # one of MIXES; "both" chooses for each image
    mix_alpha: float = 1.0  # of the Beta distribution: 1 is uniform, less is nearer to one of the two images


@dataclass(frozen=True, eq=False)
class Batch:
    """Images with mixed targets: the loss is weight * loss(labels) + (1 - weight) * loss(other_labels)."""

    images: Tensor  # (B, C, H, W) float32
    labels: Tensor  # (B,) int64
    other_labels: Tensor  # (B,) int64
    weight: Tensor  # (B,) float32 in [0, 1], of `labels`

    def soft_targets(self, classes: int) -> Tensor:
        """(B, classes) float32, each row adding up to 1."""
        targets = torch.zeros(len(self.labels), classes, device=self.labels.device)
        targets.scatter_add_(1, self.labels[:, None], self.weight[:, None])
        return targets.scatter_add_(1, self.other_labels[:, None], 1 - self.weight[:, None])


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of some images of a global batch."""

    rng: Tensor  # int64 [seed, step, ...]
    batch: int  # images in the global batch
    rows: Tensor  # (B,) int64, on rng's device: which of them

    def __call__(self, stream: int, each: int) -> Tensor:
        """`each` uniform numbers per image, (B, each) float64, whatever other images are asked for."""
        numbers = uniform_from(self.rng, stream, self.batch * each).view(self.batch, each)
        return numbers.index_select(0, self.rows)


def augmented(
    images: Tensor, labels: Tensor, chosen: Tensor, rows: Tensor, settings: Augment, scale: Tensor, rng: Tensor
) -> Batch:
    """The images `rows` (B,) of the global batch `chosen` (batch,), indices into `images` (N, H, W, C) uint8.

    `labels` (N,) int64, `scale` from `pixel_scale`, `rng` int64 [seed, step, ...]; all are on one device.
    """
    needed = rows
    if settings.mix != "none":
        count, batch, partner = len(rows), len(chosen), partners(rng, len(chosen)).index_select(0, rows)
        if count == batch:  # each partner is in the batch already
            needed, own, other = torch.arange(batch, device=rng.device), rows, partner
        else:
            needed = torch.cat([rows, partner])
            own, other = torch.arange(2 * count, device=rng.device).chunk(2)
    index, draws = chosen.index_select(0, needed), Draws(rng, len(chosen), needed)
    pixels, target = normalise(images.index_select(0, index), scale), labels.index_select(0, index)
    mirror = hflips(draws, settings.hflip)
    if settings.crop_scale == (1, 1):
        pixels = hflip(pixels, mirror)
    else:
        boxes = crop_boxes(draws, pixels.shape[-2:], settings.crop_scale, settings.crop_ratio)
        pixels = crop(pixels, mirrored(boxes, mirror))
    if settings.mix == "none":
        return Batch(pixels, target, target, torch.ones(len(rows), device=rng.device))
    draws = Draws(rng, len(chosen), rows)
    maps, weight = mix_maps(draws, pixels.shape[-2:], settings.mix, settings.mix_alpha)
    mixed = mix(pixels.index_select(0, own), pixels.index_select(0, other), maps)
    return Batch(mixed, target.index_select(0, own), target.index_select(0, other), weight)


def pixel_scale(mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    """What `normalise` multiplies pixels by and what it then takes away, by channel: (2, C, 1, 1) float32.

    `mean` and `std` are those of pixels / 255.
    """
    centre, spread = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    return torch.stack([1 / (255 * spread), centre / spread]).to(device, torch.float32)[:, :, None, None]


def normalise(images: Tensor, scale: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to float32 (B, C, H, W): (x / 255 - mean) / std, `scale` from `pixel_scale`."""
    return rearrange(images, "b h w c -> b c h w").contiguous().float().mul_(scale[0]).sub_(scale[1])


def hflips(draws: Draws, probability: float) -> Tensor:
    """Which of the images are mirrored: (B,) bool."""
    return draws(HFLIP, 1)[:, 0] < probability


def hflip(images: Tensor, chosen: Tensor) -> Tensor:
    """The images (B, C, H, W) of which `chosen` (B,) is true, left and right exchanged; the others as they are."""
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def crop_boxes(
    draws: Draws, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes (B, 4) float32: left, top, width, height in pixels, inside an image of `size` (height, width).

    The share of the area is uniform in `scale`, the logarithm of width / height in `ratio`, the place uniform. A box
    that is too wide or too high is clipped, and then smaller than it was drawn.
    """
    height, width = size
    u = draws(CROP, 4)
    area = (scale[0] + u[:, 0] * (scale[1] - scale[0])) * height * width
    shape = torch.exp(math.log(ratio[0]) + u[:, 1] * (math.log(ratio[1]) - math.log(ratio[0])))
    box_width, box_height = torch.sqrt(area * shape).clamp(max=width), torch.sqrt(area / shape).clamp(max=height)
    left, top = u[:, 2] * (width - box_width), u[:, 3] * (height - box_height)
    return torch.stack([left, top, box_width, box_height], dim=1).float()


def mirrored(boxes: Tensor, chosen: Tensor) -> Tensor:
    """The boxes (B, 4) of which `chosen` (B,) is true, from right to left: cropping to them flips too."""
    left, top, width, height = boxes.unbind(1)
    return torch.stack([left + width * chosen, top, torch.where(chosen, -width, width), height], dim=1)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image (B, C, H, W) becomes what is in its box (left, top, width, height), bilinearly stretched to H x W.

    A negative width is read from right to left.
    """
    height, width = images.shape[-2:]
    left, top, box_width, box_height = boxes[:, :, None].unbind(1)  # (B, 1) each
    x = 2 * (left + box_width * _centres(width, images.device)) / width - 1  # (B, W), -1 and 1 the image's edges
    y = 2 * (top + box_height * _centres(height, images.device)) / height - 1  # (B, H)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B, H, W, 2)
    return torch.nn.functional.grid_sample(images, grid, "bilinear", padding_mode="border", align_corners=False)


def partners(rng: Tensor, batch: int) -> Tensor:
    """For each image of the global batch the image it is mixed with, never itself if there are two: (batch,) int64.

    All are the same distance away, which is drawn; the order of a batch is random already.
    """
    distance = 1 + (uniform_from(rng, PARTNER, 1) * (batch - 1)).long()  # (1,)
    return (torch.arange(batch, device=rng.device) + distance) % batch


def mix_maps(draws: Draws, size: tuple[int, int], kind: str, alpha: float) -> tuple[Tensor, Tensor]:
    """How much of each pixel is the image's own, (B, 1, H, W) float32, and the mean of that, (B,) float32.

    `kind` is "mixup" (one number per image), "cutmix" (0 in a box, 1 around it) or "both" (half of each).
    """
    height, width = size
    weight = beta(draws, alpha)
    u = draws(MIX, 4)  # the choice, x, y, and one that is not used
    edge = torch.sqrt(1 - weight)
    inside_x, box_width = _span(u[:, 1], edge, width)
    inside_y, box_height = _span(u[:, 2], edge, height)
    box = inside_y[:, :, None] & inside_x[:, None, :]  # (B, H, W)
    left = 1 - (box_width * box_height).double() / (height * width)
    cut = u[:, 0] < {"mixup": 0.0, "cutmix": 1.0, "both": 0.5}[kind]
    maps = torch.where(cut[:, None, None], (~box).float(), weight.float()[:, None, None])
    return maps[:, None], torch.where(cut, left, weight).float()


def mix(images: Tensor, others: Tensor, maps: Tensor) -> Tensor:
    """maps * images + (1 - maps) * others: (B, C, H, W), with maps (B, 1, H, W)."""
    return torch.lerp(others, images, maps)


def beta(draws: Draws, alpha: float) -> Tensor:
    """One number from Beta(alpha, alpha) per image, 0 < alpha <= 1: (B,) float64.

    Joehnk's method: of pairs (u^(1/alpha), v^(1/alpha)) the first that adds up to at most 1, divided by its sum. At
    least half of them do, so that TRIES pairs all fail once in 2^32 images; the first is taken then.
    """
    u = draws(WEIGHT, 2 * TRIES) + 2.0**-33  # never 0
    log_x, log_y = (torch.log(u) / alpha).view(-1, TRIES, 2).unbind(-1)
    first = (torch.logaddexp(log_x, log_y) <= 0).to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.sigmoid((log_x - log_y).gather(1, first))[:, 0]


def _centres(n: int, device: torch.device) -> Tensor:
    """The middles of n pixels side by side that fill [0, 1]: (n,)."""
    return (torch.arange(n, device=device) + 0.5) / n


def _span(place: Tensor, share: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """About `share` * n pixels (B,) around `place` * n, cut off at the ends: (B, n) bool, and how many (B,)."""
    middle, half = (place * n).long(), (share * n / 2).long()
    start, end = (middle - half).clamp(min=0), (middle + half).clamp(max=n)
    pixel = torch.arange(n, device=place.device)
    return (pixel >= start[:, None]) & (pixel < end[:, None]), end - start
