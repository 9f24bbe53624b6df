"""Addresses past 2^31 elements in the Triton kernels: the tests of tests/test_addressing.py."""

import triton  # noqa: F401  before the tests ask who interprets
from test_addressing import *  # noqa: F403
