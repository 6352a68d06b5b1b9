"""Models of other libraries at the shape of ours: `transformers` and the `rwkv` package."""

import contextlib
import importlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, Size
from model.language_model import LanguageModel, shapes_only
from model.layers.mamba2 import Mamba2, Mamba2Options
from model.pretrained import to_official
from train.bench.contenders import Contender, Running, count, shape_of
from train.benchmark import Begin, step_of
from train.matching import matched, num_parameters
from train.recipes import recipe_of

LIBRARIES = ("transformers", "rwkv")


def check_installed(library: str) -> None:
    """Refuses a library that cannot be imported.

    Raises:
        ValueError: saying what to do.
    """
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"{library} is not installed: `pip install {library}`, or leave out --against {library}"
        )


def load(library: str) -> Any:
    """Imports a library; the `rwkv` package reads the environment when it is imported."""
    with _quiet():
        if library == "rwkv":
            os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
            return importlib.import_module("rwkv.model")
        for name in ("rwkv.modeling_rwkv", "mamba2.modeling_mamba2", "llama.modeling_llama"):
            importlib.import_module(f"transformers.models.{name}")
        return importlib.import_module("transformers")


def shape_like(first: ModelConfig, library: str, mixer: str, size: Size) -> ModelConfig:
    """The shape to build another library's model after, with the parameters of `first`.

    Where the library fixes the width inside (its Mamba-2), or the comparison is of one and the same
    model (the `rwkv` package), they are as many as they are.

    Raises:
        ValueError: for a mixer that cannot have the size.
    """
    if mixer == "rwkv4" and size.num_layers < 2:
        raise ValueError("the RWKV-4 of transformers has at least two layers: choose such a --size")
    shape = shape_of(mixer, size, first.vocab_size)
    is_fixed = library == "rwkv" or mixer == "mamba2"
    return shape if is_fixed else matched(shape, num_parameters(first))


def build(contender: Contender, own: Callable[[ModelConfig], LanguageModel]) -> Running:
    """The model of another library; `own` gives ours of a shape, for its weights."""
    with _quiet():
        if contender.library == "rwkv":
            return RwkvPackage(own(contender.shape))
        return Transformers(contender.shape)


class Transformers(Running):
    """RWKV-4, Mamba-2 or Llama of `transformers`, in plain PyTorch as it comes."""

    def __init__(self, shape: ModelConfig) -> None:
        self._shape = shape
        self._model = _from_transformers(shape)
        self._carried = "state" if shape.mixer == "rwkv4" else "cache"
        self.parameters = count(self._model)
        self.multiplied = self.parameters - count(self._model.get_input_embeddings())
        self.head = count(self._model.get_output_embeddings())

    def training(self, context: int, batch_size: int, *, bf16: bool) -> Callable[[], object]:
        """A step like ours, with one group of parameters."""
        model, recipe = self._model.train(), recipe_of(self._shape.mixer)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            recipe.learning_rate(self._shape.d_model),
            recipe.betas,
            recipe.eps,
            recipe.weight_decay,
            fused=True,
        )

        def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=inputs, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        return step_of(
            model,
            loss_of,
            optimizer,
            self._shape.vocab_size,
            context,
            batch_size,
            bf16=bf16,
        )

    def prefilling(self, context: int) -> Callable[[], object]:
        """Reads random tokens."""
        self._model.eval()
        tokens = torch.randint(self._shape.vocab_size, (1, context))
        return lambda: self._read(tokens, None)

    def decoding(self, context: int) -> tuple[Begin, int]:
        """Its states are changed in place, so a burst goes on where the last one stopped.

        A KV cache is cut back, and the others cost the same at every place.
        """
        self._model.eval()
        prompt = torch.randint(self._shape.vocab_size, (1, context))
        carried = self._read(prompt, None)

        def begin() -> Callable[[Tensor], object]:
            if self._shape.mixer == "attention" and carried.get_seq_length() > context:
                carried.crop(context - carried.get_seq_length())
            return lambda token: self._read(token[None], carried)

        return begin, 4 * self.multiplied + _num_bytes(carried)

    @torch.no_grad()
    def _read(self, tokens: Tensor, carried: Any) -> Any:
        """Up to the logits after the last token; gives what is carried on."""
        output = self._model(
            input_ids=tokens, use_cache=True, logits_to_keep=1, **{self._carried: carried}
        )
        return getattr(output, self._carried)


def _from_transformers(shape: ModelConfig) -> Any:
    transformers = load("transformers")
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    if shape.mixer == "rwkv4":
        config = transformers.RwkvConfig(
            **common, intermediate_size=_ffn_dim(shape), rescale_every=0, context_length=1 << 20
        )
        return transformers.RwkvForCausalLM(config)
    if shape.mixer == "mamba2":
        assert isinstance(shape.options, Mamba2Options)
        options, (inner, heads) = shape.options, Mamba2.widths(shape)
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **common,
                num_heads=heads,
                head_dim=inner // heads,
                state_size=options.state_size,
                expand=options.expand,
                n_groups=options.groups,
                conv_kernel=options.conv_size,
            )
        )
    config = transformers.LlamaConfig(
        **common,
        intermediate_size=_ffn_dim(shape),
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
    )
    return transformers.LlamaForCausalLM(config)


def _ffn_dim(shape: ModelConfig) -> int:
    """Width of our channel mix."""
    if shape.ffn_dim is not None:
        return shape.ffn_dim
    mix: Any = shapes_only(shape).blocks[0].channel_mix
    widest: int = max(p.shape[0] for p in mix.parameters())
    return widest


class RwkvPackage(Running):
    """RWKV-7 of the `rwkv` package, float32, compiled by TorchScript as it recommends."""

    def __init__(self, model: LanguageModel) -> None:
        package = load("rwkv")
        self._vocabulary = model.config.vocab_size
        self.parameters = model.num_parameters()
        self.multiplied = self.parameters - model.embedding.weight.numel()
        self.head = model.head.weight.numel()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rwkv7.pth"
            torch.save(to_official(model.config, model.state_dict(), complete_first=True), path)
            self._model = package.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")

    def training(self, context: int, batch_size: int, *, bf16: bool) -> Callable[[], object]:
        """Not there."""
        raise AssertionError("the package does not train")

    def prefilling(self, context: int) -> Callable[[], object]:
        """Reads random tokens."""
        tokens = torch.randint(self._vocabulary, (context,)).tolist()
        return lambda: self._model.forward(tokens, None)

    def decoding(self, context: int) -> tuple[Begin, int]:
        """A token a call, with a copy of the state."""
        tokens = torch.randint(self._vocabulary, (context,)).tolist()
        with _quiet():
            _, state = self._model.forward(tokens, None)
        num_bytes = _num_bytes(state)

        def begin() -> Callable[[Tensor], object]:
            current = [part.clone() for part in state]

            def read(token: Tensor) -> None:
                nonlocal current
                _, current = self._model.forward([int(token)], current)

            return read

        return begin, 4 * self.multiplied + num_bytes


def _num_bytes(carried: Any) -> int:
    """Of all tensors in what a library carries from token to token."""
    found: dict[int, int] = {}
    left = [carried]
    while left:
        part = left.pop()
        if isinstance(part, Tensor):
            found[id(part)] = part.numel() * part.element_size()
        elif isinstance(part, list | tuple):
            left += part
        elif isinstance(part, dict):
            left += part.values()
        elif hasattr(part, "__dict__") and not isinstance(part, nn.Module):
            left += vars(part).values()
    return sum(found.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """These libraries print and warn; standard output is for results."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
