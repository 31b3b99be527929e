"""WHICH blocks are computed: one file a method, and the catalogue of them."""
