"""What tests of models share."""

import pytest

from autograd import use


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.full), "none"], ids=["kernels", "forms"])
def either_way(request):
    """For the mark of a whole module, whose models are float64: kernels and forms; forms alone without --full."""
    with use(kernel=request.param):
        yield
