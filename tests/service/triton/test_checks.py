"""The check of ids and weights as a kernel, in Triton's interpreter."""

from __future__ import annotations

from tests.service.triton.topk_cases import *  # noqa: F403
