"""The bodies of tests/test_gpu.py for kernels, run by Triton's interpreter."""

import triton  # noqa: F401  test_gpu asks whether it interprets
from test_gpu import (  # noqa: F401
    test_a_replayed_graph_reads_new_seeds,
    test_dequantize,
    test_far_addresses_of_zo_linear,
    test_far_addresses_of_zo_perturb,
    test_ops_run_on_the_current_stream,
    test_rows_have_the_same_bits_in_every_tile,
    test_tensors_of_another_device,
    test_twenty_runs_give_the_same_bits,
    test_zo_dense_linear,
    test_zo_linear,
    test_zo_linear_of_a_real_layer,
    test_zo_perturb,
    test_zo_update,
)
