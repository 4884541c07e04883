"""Where tests marked `gpu` run: on the GPU; or, where FASTKL_DRY_RUN=1 asks for it, on the CPU with small shapes.

A dry run shows that the tests themselves work. It says nothing of the device.
"""

from __future__ import annotations

import os

import pytest
import torch

DRY_RUN = os.environ.get("FASTKL_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
needs_device = pytest.mark.skipif(DRY_RUN, reason="a dry run has no device")
