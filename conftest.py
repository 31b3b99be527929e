"""Keeps the checkout itself off sys.path: our folder kernels/ would hide Hugging Face's package `kernels`."""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent
# `python -m pytest` puts the working directory first on sys.path; Diffusers does `from kernels import get_kernel`
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
