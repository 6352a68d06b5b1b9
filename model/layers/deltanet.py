"""DeltaNet (arXiv 2102.11174, 2406.06484) and Gated DeltaNet (arXiv 2412.06464).

The delta rule `S_t = S_{t-1} + beta k (v - k^T S_{t-1})^T`: what stands under a key is replaced,
not added to. Gated, the state decays by `alpha` a head before.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import inverse_softplus
from model.layers.layer import Context, Layer, at_least_single
from model.layers.norm import HeadRMSNorm
from model.layers.short_convolution import ShortConvolution
from model.ops.native.instructions import HeadRule, Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class DeltaNetOptions(MixerOptions):
    """Of the delta rule."""

    conv_size: int = 4
    """Taps of the short convolutions on q, k and v."""
    negative_eigenvalues: bool = False
    """Doubles beta, so that the state can be reflected: state tracking (arXiv 2411.12537)."""
    norm_eps: float = 1e-5
    """Of the norm over each head."""


class DeltaNetState(NamedTuple):
    """The convolution's last tokens and the matrix of each head."""

    window: Tensor
    """`[B, conv_size - 1, 3 D]`, of q, k and v."""
    matrix: Tensor
    """`[B, H, K, V]`."""


class DeltaNet(Layer):
    """`o = W_o norm(q S)`, q and k normalised to length 1 after the convolution's silu."""

    Options: ClassVar[type[MixerOptions]] = DeltaNetOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, DeltaNetOptions)
        width, self.num_heads, self.head_dim = config.d_model, config.num_heads, config.head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.convolution = ShortConvolution(3 * width, config.options.conv_size, bias=False)
        self.beta = nn.Linear(width, self.num_heads, bias=False)
        self.strength = 2.0 if config.options.negative_eigenvalues else 1.0
        self.head_norm = HeadRMSNorm(self.head_dim, config.options.norm_eps)

    def initial_state(self, batch_size: int) -> DeltaNetState:
        """No token yet: zeros, the matrix in at least float32."""
        window = self.convolution.initial_window(batch_size)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return DeltaNetState(window, window.new_zeros(shape, dtype=at_least_single(window.dtype)))

    def forward(
        self, x: Tensor, state: DeltaNetState, context: Context
    ) -> tuple[Tensor, DeltaNetState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        projected = [self.query(x), self.key(x), self.value(x)]
        convolved, window = self.convolution(projected, state.window, context.reset)
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", h=self.num_heads) for y in convolved)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = self.strength * torch.sigmoid(self.beta(x))[..., None]
        log_decay = self.log_decay(x)
        written = beta * k
        removal = -k if log_decay is None else -k * log_decay.exp()[..., None]
        o, matrix = context.run(
            "delta",
            q,
            written,
            v,
            a=removal,
            b=written,
            log_decay=log_decay,
            scale=self.head_dim**-0.5,
            initial_state=state.matrix,
        )
        return self.output(self.head_norm(o, self.gate_of(x))), DeltaNetState(window, matrix)

    def describe_step(
        self, program: Program, x: Vector, state: DeltaNetState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        vectors, width = [], x.size
        for place, projection in enumerate((self.query, self.key, self.value)):
            own = slice(place * width, (place + 1) * width)
            vectors.append(
                program.convolve(
                    program.multiply(projection.weight, x),
                    state.window,
                    self.convolution.taps[:, own],
                    None,
                    first=own.start,
                    channels=3 * width,
                )
            )
        beta = program.multiply(self.beta.weight, x, activation="sigmoid")
        rule = HeadRule(
            self.num_heads,
            self.num_heads,
            scale=self.head_dim**-0.5,
            is_delta=True,
            is_unit=True,
            strength=beta,
            strength_scale=self.strength,
            norm=self.head_norm.weight,
            norm_eps=self.head_norm.eps,
        )
        rule = self.described_decay_and_gate(program, x, rule)
        program.barrier()
        q, k, v = vectors
        y = program.heads(q, k, v, state.matrix, rule)
        program.barrier()
        program.multiply(self.output.weight, y, out=residual, add=True)

    def described_decay_and_gate(self, program: Program, x: Vector, rule: HeadRule) -> HeadRule:
        """The native step of `log_decay` and `gate_of`."""
        return rule

    def log_decay(self, x: Tensor) -> Tensor | None:
        """`[B, T, H]`; None for no decay."""
        return None

    def gate_of(self, x: Tensor) -> Tensor | None:
        """`[B, T, D]`, whose silu gates the heads' outputs; None for no gate."""
        return None

    def initialize(self, layer: int, num_layers: int) -> None:
        """Matrices as in every layer, and the convolution's own."""
        super().initialize(layer, num_layers)
        self.convolution.initialize()


class GatedDeltaNet(DeltaNet):
    """The same with a decay `alpha = exp(-exp(A_log) softplus(W_d x + dt_bias))` and a gate.

    arXiv 2412.06464, equation 10 and section 3.4.
    """

    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.decay = nn.Linear(config.d_model, self.num_heads, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(self.num_heads))
        """`[H]`, dt_bias."""
        self.decay_rate = nn.Parameter(torch.zeros(self.num_heads))
        """`[H]`, A_log."""
        self.gate = nn.Linear(config.d_model, config.d_model, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """`[B, T, H]`."""
        return -self.decay_rate.exp() * F.softplus(self.decay(x) + self.decay_bias)

    def gate_of(self, x: Tensor) -> Tensor:
        """`W_g x`."""
        y: Tensor = self.gate(x)
        return y

    def described_decay_and_gate(self, program: Program, x: Vector, rule: HeadRule) -> HeadRule:
        """The native step of `log_decay` and `gate_of`."""
        return replace(
            rule,
            log_decay=program.multiply(
                self.decay.weight, x, bias=self.decay_bias, activation="softplus"
            ),
            decay_scale=1.0,
            rate=-self.decay_rate.exp(),
            gate=program.multiply(self.gate.weight, x, activation="silu"),
        )

    def initialize(self, layer: int, num_layers: int) -> None:
        """As Mamba-2's decay: A uniform in (0, 16), steps log-uniform in (0.001, 0.1)."""
        super().initialize(layer, num_layers)
        self.decay_rate.uniform_(0.0, 16.0).log_()
        steps = torch.empty_like(self.decay_bias).uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.decay_bias.copy_(inverse_softplus(steps))
