"""Published sizes."""

import pytest

from qcn_jax.config_checks import check_model
from qcn_jax.model import parameter_count
from qcn_jax.sizes import SIZES

# Of the text model alone, as counted in the published files.
PUBLISHED = {"4b": 4_205_751_296, "9b": 8_953_803_264, "27b": 26_895_998_464, "35b-a3b": 34_660_610_688,
             "80b-a3b": 79_674_391_296}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_a_size(size):
    check_model(SIZES[size], size)
    count = parameter_count(SIZES[size])
    assert count == PUBLISHED.get(size, count)
    assert float(size.split("b")[0]) * 0.9e9 < count < float(size.split("b")[0]) * 1.1e9
