"""The networks of `cifar_lib.models` in plain PyTorch, and the loop that trains them.

    python benchmarks/pytorch_loop.py THREADS

Needs PyTorch alone, of any interpreter. Says in a line of JSON what it is; then reads requests, one
a line, and answers each with the seconds of its steps: `benchmarks/pytorch.py` asks.
"""

import functools
import json
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES, SIDE = 100, 32
WARM_UP_STEPS = 2


class Whitening(nn.Conv2d):
    """A fixed convolution of normalised pixels; its filters do not matter for the time."""

    def __init__(self) -> None:
        super().__init__(3, 24, 2)
        self.weight.requires_grad = False
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("deviation", torch.full((3, 1, 1), 0.25))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images - self.mean) / self.deviation)


class Residual(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + super().forward(inputs)


class Pool(nn.Module):
    """The largest of each map, and with `mean` the mean added."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, maps: Tensor) -> Tensor:
        largest = maps.amax((2, 3))
        return largest + maps.mean((2, 3)) if self.mean else largest


class Head(nn.Linear):
    """Scaled logits in float32, whatever the precision."""

    def __init__(self, features: int, scale: float = 1.0, bias: bool = False) -> None:
        super().__init__(features, CLASSES, bias=bias)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(features.float()) * self.scale


def seed() -> nn.Module:
    layers, inputs = [], 3
    for filters in (128, 256, 512):
        layers += [nn.Conv2d(inputs, filters, 3, padding="same"), nn.ELU()]
        layers += [nn.Conv2d(filters, filters, 3), nn.ELU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
        inputs = filters
    layers += [nn.Flatten(), nn.Linear(512 * 2 * 2, 1024), nn.ELU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, Head(1024, bias=True))


def airbench() -> nn.Module:
    def normalised(width: int) -> list[nn.Module]:
        normalisation = nn.BatchNorm2d(width, eps=1e-5, momentum=0.4)
        normalisation.weight.requires_grad = False
        return [normalisation, nn.SiLU()]

    layers, inputs = [Whitening(), nn.SiLU()], 24
    for width in (64, 256, 256):
        layers += [convolution(inputs, width, 3), nn.MaxPool2d(2), *normalised(width)]
        layers += [convolution(width, width, 3), *normalised(width)]
        inputs = width
    return nn.Sequential(*layers, Pool(mean=False), Head(inputs, 1 / 9))


def speedrun() -> nn.Module:
    def normalised(width: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(width, eps=1e-5, momentum=0.1), nn.SiLU()]

    layers, inputs = [Whitening(), nn.SiLU()], 24
    for width, kernel, middle, (first, second) in (
        (64, 3, 64, (1, 1)),
        (256, 3, 192, (3, 1)),
        (768, 2, 512, (3, 3)),
    ):
        layers += [convolution(inputs, width, kernel), nn.MaxPool2d(2), *normalised(width)]
        pair = [convolution(width, middle, first), *normalised(middle)]
        pair += [convolution(middle, width, second), *normalised(width)]
        layers.append(Residual(*pair))
        inputs = width
    return nn.Sequential(*layers, Pool(mean=True), Head(inputs, 1.25 / 9))


def convolution(inputs: int, filters: int, kernel: int) -> nn.Module:
    return nn.Conv2d(inputs, filters, kernel, padding="same", bias=False)


NETWORKS = {"seed": seed, "airbench": airbench, "speedrun": speedrun}


def size(network: nn.Module) -> dict[str, int]:
    """Parameters as Keras counts them, and multiply-adds for one picture of 32 x 32 pixels."""
    # Keras' batch normalisation without a scale has none; PyTorch's has ones that stay.
    weights = [p for p in network.parameters() if p.requires_grad or p.dim() > 1]
    weights += [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    counted = []

    def count(layer: nn.Module, inputs: tuple, outputs: Tensor) -> None:
        counted.append(layer.weight.numel() * outputs[0, 0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    network(torch.zeros(2, 3, SIDE, SIDE))
    return {"parameters": sum(w.numel() for w in weights), "multiply_adds": sum(counted)}


@functools.cache
def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    network = NETWORKS[name]().to(memory_format=torch.channels_last)
    weights = [p for p in network.parameters() if p.requires_grad]
    if name == "seed":
        return network, torch.optim.RMSprop(weights, lr=3e-4, alpha=0.9, eps=1e-7)
    return network, torch.optim.SGD(weights, lr=3e-4, momentum=0.9, nesterov=True)


def steps(name: str, pixels: int, precision: str, batch_size: int) -> Iterator[float]:
    """The seconds of one step after the other, on one batch of random images."""
    network, optimizer = trained(name)
    images = torch.rand(batch_size, pixels, pixels, 3).permute(0, 3, 1, 2)
    labels = torch.randint(CLASSES, (batch_size,))
    while True:
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        yield time.perf_counter() - began


def measure(seconds: float, **step: str | int) -> list[float]:
    """The seconds of the steps after the first ones, of so many seconds."""
    taken: list[float] = []
    for number, duration in enumerate(steps(**step)):
        if number >= WARM_UP_STEPS:
            taken.append(duration)
        if sum(taken) >= seconds:
            return taken
    raise AssertionError("steps() never ends")


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    sizes = {name: size(network()) for name, network in NETWORKS.items()}
    about = {"version": torch.__version__, "threads": torch.get_num_threads(), "networks": sizes}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
