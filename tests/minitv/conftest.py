"""What tests of models share."""

import pytest

from autograd import use


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.full), "none"], ids=["kernels", "forms"])
def either_way(request):
    """Models run through kernels and through forms; in float64 through forms alone without --full."""
    with use(kernel=request.param):
        yield
