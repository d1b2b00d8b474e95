"""Where, and in which precisions, the tests of numbers run: parity, and independence of the batch.

TEST_DEVICE   cpu (the default), cuda, cuda:1
TEST_DTYPE    float32, bfloat16 or float16; all of them by default
"""

import os

import torch

from service.backbone.base import DTYPES

DEVICE = torch.device(os.environ.get("TEST_DEVICE") or "cpu")
_ASKED = os.environ.get("TEST_DTYPE") or ""
if _ASKED and _ASKED not in DTYPES:
    raise ValueError(f"TEST_DTYPE is {_ASKED}, and none of {', '.join(DTYPES)}")
PRECISIONS = (_ASKED,) if _ASKED else tuple(DTYPES)
torch.backends.cudnn.allow_tf32 = False  # as a backbone that is loaded has it; some here are put together
