import os

import pytest
import torch

torch.set_num_threads(2)


def pytest_configure(config):
    """Only `pytest -m gpu` sees a GPU: bounds and pairs of processes of the other tests are for the CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
