"""What tests of the engine share."""

import pytest
import torch

from tests.tiny_engine import tiny_parts


@pytest.fixture(scope="module")
def parts():
    """A small random model and its processor, on one thread."""
    torch.set_num_threads(1)
    return tiny_parts()
