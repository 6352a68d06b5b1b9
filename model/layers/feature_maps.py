"""Feature maps: what makes of a dot product a weight that can be summed into a state."""

import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive everywhere (arXiv 2006.16236, equation 7)."""
    return F.elu(x) + 1.0
