"""What Triton's compiler makes of device code, for GPUs that need not be there. No test: tests run it as programs."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled_for(
    capability: tuple[int, int],
    code: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    warps: int,
    stages: int,
) -> dict[str, Any]:
    """Bytes of shared memory, what is used of registers and stack, and whether Hopper's products are in it.

    Args:
        capability: the GPU's.
        code: the kernel.
        types: of its arguments; of those that are not named, 32-bit integers.
        constants: of its constant arguments.
        aligned: arguments that are multiples of 16, as torch's pointers and strides are.
        warps, stages: of a program, and tiles loaded ahead.
    """
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    place = code.arg_names.index
    source = ASTSource(
        code,
        signature={name: types.get(name, "i32") for name in code.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {
        "shared": made.metadata.shared,
        "usage": usage.stdout + usage.stderr,
        "wgmma": "wgmma" in made.asm["ptx"],
    }
