"""Linear transformer (Katharopoulos et al. 2020, arXiv 2006.16236): weights `phi(q) . phi(k)`."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.feature_maps import elu_plus_one
from model.layers.layer import Context, Layer, at_least_single
from model.ops.native.instructions import HeadRule, Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class LinearTransformerOptions(MixerOptions):
    """Of the normaliser."""

    eps: float = 1e-6
    """Added to the normaliser."""


class LinearTransformerState(NamedTuple):
    """The sum of all writes."""

    matrix: Tensor
    """`[B, H, K, V + 1]`: keys times values, and in the last column the keys alone."""


class LinearTransformer(Layer):
    """Additive recurrence without decay, normalised, with the feature map elu + 1."""

    Options: ClassVar[type[MixerOptions]] = LinearTransformerOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, LinearTransformerOptions)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.eps = config.options.eps
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def initial_state(self, batch_size: int) -> LinearTransformerState:
        """Nothing written yet: zeros, in at least float32."""
        weight = self.key.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim + 1)
        return LinearTransformerState(weight.new_zeros(shape, dtype=at_least_single(weight.dtype)))

    def forward(
        self, x: Tensor, state: LinearTransformerState, context: Context
    ) -> tuple[Tensor, LinearTransformerState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        q, k, v = (
            rearrange(project(x), "b t (h k) -> b t h k", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        o, matrix = context.run(
            "additive",
            elu_plus_one(q),
            elu_plus_one(k),
            v,
            normalize=True,
            initial_state=state.matrix,
            eps=self.eps,
        )
        y = self.output(rearrange(o, "b t h v -> b t (h v)"))
        return y, LinearTransformerState(matrix)

    def describe_step(
        self, program: Program, x: Vector, state: LinearTransformerState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        q = program.multiply(self.query.weight, x, activation="elu_plus_one")
        k = program.multiply(self.key.weight, x, activation="elu_plus_one")
        v = program.multiply(self.value.weight, x)
        program.barrier()
        rule = HeadRule(self.num_heads, self.num_heads, divide_eps=self.eps)
        y = program.heads(q, k, v, state.matrix, rule)
        program.barrier()
        program.multiply(self.output.weight, y, out=residual, add=True)
