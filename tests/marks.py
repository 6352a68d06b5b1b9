"""What a test needs of the machine."""

import pytest

from model.ops import native
from train.precision import CPU, is_fast_in_bf16

needs_kernels = pytest.mark.skipif(not native.is_available(), reason=native.status())
needs_tiles = pytest.mark.skipif(
    not is_fast_in_bf16(CPU), reason="no tiles of bfloat16, or no kernels"
)
