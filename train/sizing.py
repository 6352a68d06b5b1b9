"""How much a model wants: tokens, memory, time. `python -m train.sizing` prints the table.

The rules are those of the literature; what a machine does is measured for a CPU (train/README.md)
and an assumption for everything else, which stands in the table's heading.
"""

import dataclasses
import sys
from dataclasses import dataclass

from model.config import SIZES, ModelConfig
from model.language_model import shapes_only
from model.presets import complete
from train.readable import readable_bytes, readable_count

TOKENS_PER_PARAMETER = 20
"""Where a model and its text grow alike (Hoffmann et al., arXiv 2203.15556, table 3)."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two means, in float32."""
BYTES_PER_ACTIVATION = 180
"""A token, layer and channel of RWKV-7 in float32, from the peaks in train/README.md."""


@dataclass(frozen=True)
class Machine:
    """What trains."""

    name: str
    devices: int
    rate: float
    """Matrix products a device can do, in operations a second."""
    used: float
    """The part of it that training is taken to reach."""


MACHINES = (
    Machine("2 cores", 1, 423e9, 0.47),  # measured: `ebb bench train`
    Machine("1 GPU", 1, 989e12, 0.15),  # NVIDIA's data sheet of the H100 SXM, dense bfloat16
    Machine("8 GPUs", 8, 989e12, 0.15),
    Machine("64 GPUs", 64, 989e12, 0.12),
)


@dataclass(frozen=True)
class Sizing:
    """A model and what training it takes."""

    name: str
    parameters: int
    multiplied: int
    """Parameters that every token is multiplied with: all but the embedding, which is looked up."""
    layers: int
    width: int

    @property
    def tokens(self) -> int:
        """Worth training on."""
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def operations(self) -> float:
        """`6 N D` (Kaplan et al., arXiv 2001.08361, section 2.1).

        Two for each parameter and token forwards, four backwards; the recurrence comes on top.
        """
        return 6.0 * self.multiplied * self.tokens

    def seconds(self, machine: Machine) -> float:
        """Of all training."""
        return self.operations / (machine.devices * machine.rate * machine.used)

    def fixed_bytes(self, processes: int = 1) -> float:
        """In each of the processes that `--shard` divides weights, gradients and AdamW among."""
        return BYTES_PER_PARAMETER * self.parameters / processes

    def activation_bytes(self, tokens: int) -> float:
        """For so many tokens that a process has in hand at a time."""
        return float(BYTES_PER_ACTIVATION) * tokens * self.layers * self.width


def sizing(name: str, config: ModelConfig) -> Sizing:
    """Of a shape; nothing is allocated."""
    model = shapes_only(config)
    parameters = model.num_parameters()
    embedding = model.embedding.weight.numel()
    return Sizing(name, parameters, parameters - embedding, config.num_layers, config.d_model)


def table() -> str:
    """Markdown: RWKV-7 in the presets' shapes and in those of two official checkpoints."""
    shapes = {name: (dataclasses.asdict(size), 4096) for name, size in SIZES.items()}
    for layers, width in ((24, 2048), (32, 2560)):
        large = {"num_layers": layers, "d_model": width, "head_dim": 64}
        shapes[f"{layers} x {width}"] = (large, 65_536)
    heads = [f"{m.name} at {m.used:.0%} of {m.rate / 1e12:.3g} TFLOP/s" for m in MACHINES]
    cells = ["model", "parameters", "tokens", "fixed memory", "for 2,048 tokens", *heads]
    lines = [f"| {' | '.join(cells)} |", "| --- " + "| --: " * (len(cells) - 1) + "|"]
    for name, (shape, vocab_size) in shapes.items():
        found = sizing(name, complete(ModelConfig(mixer="rwkv7", vocab_size=vocab_size, **shape)))
        cells = [
            name if name not in SIZES else f"`{name}`",
            readable_count(found.parameters),
            readable_count(found.tokens),
            readable_bytes(found.fixed_bytes()),
            readable_bytes(found.activation_bytes(2048)),
            *(_duration(found.seconds(machine)) for machine in MACHINES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _duration(seconds: float) -> str:
    """Two digits at most: it is an estimate."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds / size >= 9.5 else 1}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"


if __name__ == "__main__":
    sys.stdout.write(table())
