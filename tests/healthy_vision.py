"""Sound convolutional networks, as people write them, on small pictures of digits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from gradmend.setup import Setup
from healthy_data import CE, Built, Case, adam, adamw, cut, digits, photos, sgd, warmup


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def he_normal(model: nn.Module) -> nn.Module:
    """What torchvision's networks do to their convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        plain = stride == 1 and inputs == planes
        self.shortcut = None if plain else nn.Conv2d(inputs, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class SEBlock(nn.Module):
    """A basic block whose channels are weighted by a squeeze and an excitation."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(planes, planes // 4, 1),
            nn.ReLU(),
            nn.Conv2d(planes // 4, planes, 1),
            nn.Sigmoid(),
        )
        plain = stride == 1 and inputs == planes
        self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out * self.squeeze(out) + self.shortcut(x))


class ResNet(nn.Module):
    """The small-image stem of He et al. 2015 (section 4.2), four stages, global pooling."""

    def __init__(self, block: type, layers: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.inputs = width
        self.conv1, self.bn1 = conv3x3(3, width), nn.BatchNorm2d(width)
        stages = [self._stage(block, width << i, n, 1 if i == 0 else 2) for i, n in enumerate(layers)]
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(self.inputs, 10)
        he_normal(self)

    def _stage(self, block: type, planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for i in range(blocks):
            layers.append(block(self.inputs, planes, stride if i == 0 else 1))
            self.inputs = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(self.stages(x), 1)
        return self.fc(torch.flatten(x, 1))


def resnet18() -> Built:
    setup = Setup(ResNet(BasicBlock, (2, 2, 2, 2)), CE, sgd(0.05, 0.9, 5e-4), warmup(20))
    return setup, cut(32, *photos(12, 128))


def resnet_bottleneck() -> Built:
    schedule = partial(OneCycleLR, max_lr=0.01, total_steps=200)
    return Setup(ResNet(Bottleneck, (1, 1)), CE, adamw(1e-3), schedule), cut(32, *photos(8, 128))


def preactivation_resnet() -> Built:
    return Setup(ResNet(PreActBlock, (2, 2, 2)), CE, adamw(2e-3, 0.05)), cut(32, *photos(8, 128))


def se_resnet() -> Built:
    return Setup(ResNet(SEBlock, (1, 1, 1)), nn.CrossEntropyLoss(label_smoothing=0.1), adam(5e-3)), cut(
        32, *photos(12, 128)
    )


def vgg_bn() -> Built:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    features = [*block(3, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32)]
    features += [nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), nn.Flatten()]
    head = [nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(64, 10)]
    model = he_normal(nn.Sequential(*features, *head))
    return Setup(model, CE, sgd(0.02, 0.9, 5e-4)), cut(32, *photos(8, 128))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 400)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def lenet() -> Built:
    return Setup(LeNet(), CE, adam(2e-3)), cut(32, *digits(32))


def lenet_tanh() -> Built:
    """As in 1998: tanh and averaging."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.Tanh(),
        nn.Linear(64, 10),
    )
    return Setup(model, CE, sgd(0.1, 0.9)), cut(32, *digits(16))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(out)))], dim=1)


def densenet() -> Built:
    def transition(channels: int) -> list[nn.Module]:
        half = nn.Conv2d(channels, channels // 2, 1, bias=False)
        return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), half, nn.AvgPool2d(2)]

    blocks = [DenseLayer(16 + 8 * i, 8) for i in range(3)]
    more = [DenseLayer(20 + 8 * i, 8) for i in range(3)]
    head = [nn.BatchNorm2d(44), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(44, 10)]
    model = nn.Sequential(conv3x3(3, 16), *blocks, *transition(40), *more, *head)
    return Setup(he_normal(model), CE, adam(5e-3)), cut(32, *photos(8, 128))


class InvertedResidual(nn.Module):
    """A depthwise separable convolution between an expansion and a linear bottleneck."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, act: type[nn.Module], se: bool = False
    ) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), act()
        )
        self.gate: nn.Module | None = None
        if se:
            down, up = nn.Conv2d(hidden, hidden // 4, 1), nn.Conv2d(hidden // 4, hidden, 1)
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), down, nn.ReLU(), up, nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        if self.gate is not None:
            out = out * self.gate(out)
        out = self.project(out)
        return x + out if self.residual else out


def mobilenet(act: type[nn.Module], se: bool) -> nn.Module:
    sizes = [(8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1)]
    blocks = [InvertedResidual(*size, act, se) for size in sizes]
    stem = [conv3x3(3, 8), nn.BatchNorm2d(8), act()]
    head = [nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), act(), nn.AdaptiveAvgPool2d(1)]
    return he_normal(nn.Sequential(*stem, *blocks, *head, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)))


def mobilenet_v2() -> Built:
    optimizer = partial(torch.optim.RMSprop, lr=2e-3, momentum=0.9, alpha=0.9, eps=1e-3)
    return Setup(mobilenet(nn.ReLU6, se=False), CE, optimizer), cut(32, *photos(8, 128))


def mobilenet_v3() -> Built:
    return Setup(mobilenet(nn.Hardswish, se=True), CE, adamw(3e-3)), cut(32, *photos(8, 128))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.one(x), inplace=True), F.relu(self.three(x), inplace=True)], 1)


def squeezenet() -> Built:
    head = [nn.Dropout(0.2), nn.Conv2d(64, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    fires = [Fire(24, 12, 24), nn.MaxPool2d(2), Fire(48, 16, 32)]
    model = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.ReLU(inplace=True), *fires, *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model[-4].weight, std=0.01)
    return Setup(model, CE, adam(3e-3)), cut(32, *digits(16))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.pwconv2(self.act(self.pwconv1(self.norm(out))))
        return x + (self.gamma * out).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> Built:
    stem = [nn.Conv2d(3, 16, 2, 2), ChannelNorm(16)]
    down = [ChannelNorm(16), nn.Conv2d(16, 32, 2, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10)]
    blocks = [ConvNeXtBlock(16), ConvNeXtBlock(16), *down, ConvNeXtBlock(32), ConvNeXtBlock(32)]
    model = nn.Sequential(*stem, *blocks, *head)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return Setup(model, CE, adamw(4e-3, 0.05), warmup(20)), cut(32, *photos(8, 128))


class FixupBlock(nn.Module):
    """Residual without normalization: the last convolution of a branch begins at zero (Zhang et al. 2019)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, channels), conv3x3(channels, channels)
        self.biases, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(1))
        nn.init.normal_(self.conv1.weight, std=(2 / (9 * channels)) ** 0.5 * blocks**-0.5)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x + self.biases[0]) + self.biases[1])
        return F.relu(x + self.scale * self.conv2(out + self.biases[2]) + self.biases[3])


def fixup_resnet() -> Built:
    blocks = [FixupBlock(16, 6) for _ in range(6)]
    head = nn.Linear(16, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    stem = nn.Conv2d(1, 16, 3, 2, 1)
    model = nn.Sequential(stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return Setup(model, CE, adam(3e-3)), cut(32, *digits(16))


def groupnorm_batch_of_two() -> Built:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [conv3x3(inputs, outputs), nn.GroupNorm(4, outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    body = [*block(1, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32)]
    setup = Setup(nn.Sequential(*body, *head), CE, adam(5e-3), accumulate=4)
    return setup, cut(2, *digits(12, 64))


def frozen_trunk() -> Built:
    """Fine-tuning: a trunk that has learnt one half of the classes, frozen, under a new head."""
    trunk = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten())
    before = nn.Sequential(trunk, nn.Linear(1152, 10))
    optimizer = torch.optim.Adam(before.parameters(), lr=2e-3)
    for x, y in 4 * cut(64, *digits(16)):
        optimizer.zero_grad()
        CE(before(x), y).backward()
        optimizer.step()
    before.zero_grad()
    trunk.requires_grad_(False)
    head = nn.Linear(1152, 2)
    x, y = digits(16)
    return Setup(nn.Sequential(trunk, head), CE, adam(1e-3)), cut(32, x, y % 2)


CASES = (
    Case(resnet18, 30, 0.5),
    Case(resnet_bottleneck, 70, 0.8),
    Case(preactivation_resnet, 40, 0.5),
    Case(se_resnet, 60, 0.8),
    Case(vgg_bn, 50, 0.5),
    Case(lenet, 100, 0.3),
    Case(lenet_tanh, 100, 0.3),
    Case(densenet, 40, 1.3),
    Case(mobilenet_v2, 40, 1.0),
    Case(mobilenet_v3, 50, 0.8),
    Case(squeezenet, 150, 1.4),
    Case(convnext, 60, 0.5),
    Case(fixup_resnet, 120, 1.6),
    Case(groupnorm_batch_of_two, 120, 1.5),
    Case(frozen_trunk, 150, 0.25),
)
