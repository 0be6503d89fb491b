"""A residual image classifier in three stages, sized for small images (He et al. 2016, section 4.2).

Shapes: N images, C channels, S pixels a side. All residual blocks stand in one chain, `blocks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import JobError

STAGES = 3


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; a `stride` of 2 halves the sides, and the shortcut follows with a 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [N, C, S, S] -> class scores [N, classes].

    `depth` is 6 n + 2 layers with weights, n residual blocks in each of three stages; the stages have `width`,
    2 `width` and 4 `width` channels. Raises JobError for another depth.
    """

    def __init__(self, depth: int = 20, width: int = 16, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        per_stage, rest = divmod(depth - 2, 2 * STAGES)
        if per_stage < 1 or rest:
            raise JobError(f"depth={depth} of the ResNet: it must be 6 n + 2, such as 8, 14, 20, 32 or 56.")
        for name, value in (("width", width), ("classes", classes), ("channels", channels)):
            if value < 1:
                raise JobError(f"{name}={value} of the ResNet: it must be at least 1.")
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential()
        inputs = width
        for stage in range(STAGES):
            for index in range(per_stage):
                outputs = width * 2**stage
                self.blocks.append(Residual(inputs, outputs, stride=2 if stage and not index else 1))
                inputs = outputs
        self.head = nn.Linear(inputs, classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """He-normal convolutions; each block starts as its shortcut (Goyal et al. 2017, section 5.1)."""
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, Residual):
                nn.init.zeros_(module.norm2.weight)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise JobError(
                f"the ResNet takes images [N, {self.channels}, height, width] but was given {list(images.shape)}. "
                "Set channels= to what the images have, or reorder their axes."
            )
        x = self.blocks(self.stem(images))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def small(classes: int = 10, channels: int = 3) -> ResNet:
    """Eight layers, 16 to 64 channels, about 78 thousand parameters: learns in minutes on a laptop's processor."""
    return ResNet(depth=8, width=16, classes=classes, channels=channels)
