from collections.abc import Iterator

import pytest
import torch

from tests.pretended_cuda import Device, pretend

torch.set_num_threads(1)  # with more, bits depend on which seeds run together


@pytest.fixture(autouse=True)
def cuda(request: pytest.FixtureRequest) -> Iterator[Device | None]:
    """The device of a test marked `cuda`: pretended where there is none."""
    if request.node.get_closest_marker("cuda") is None or torch.cuda.is_available():
        yield None
    else:
        with pretend() as pretended:
            yield pretended
