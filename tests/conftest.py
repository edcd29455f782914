"""What every test runs under: one torch thread, a fixed seed, hypothesis without deadlines, and no heavy test unasked."""

from __future__ import annotations

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers must not fight over the cores

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not heavy"


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
