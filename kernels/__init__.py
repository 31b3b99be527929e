"""HOW chosen blocks are computed: the plan and its parts, the fp64 oracle, dense and block-sparse kernels."""
