"""How far attention kernels are from float64, beside the plain twin: `python -m tokenloom.tests.attention_errors 0 80`.

A line for each drawn case of these seeds with KV or queries other than float32 and each kernel, interpreted: root mean
square errors of out, worst errors of lse, and the kernel's over the twin's.
"""

import sys

from tokenloom.attention.blockwise import Blockwise
from tokenloom.pallas_kernels.attention.tpu import TpuKernels
from tokenloom.pallas_kernels.attention.triton import TritonKernels
from tokenloom.pallas_kernels.chips import GPUS, TPUS
from tokenloom.tests.attention_cases import build, drawn, errors, run


def report(first: int, stop: int) -> None:
    """Prints the lines of seeds first..stop, and the largest ratio."""
    kernels = (TpuKernels(TPUS["TPU v5e"], interpret=True), TritonKernels(GPUS["H200"], interpret=True))
    worst = 0.0
    for case in map(drawn, range(first, stop)):
        for backend in kernels if not case.exact else ():
            problem = build(case, backend.layout(case.dim))
            [ours], [twins] = (
                run(one, case, problem) for one in (backend, Blockwise(lie=problem.view.layout))
            )
            (rms, _, lse), (its, _, its_lse) = errors(problem, *ours), errors(problem, *twins)
            ratio = rms / max(its, 1e-12)
            if rms > 1e-5:
                worst = max(worst, ratio)
            print(
                f"{case} {case.dtype} x {case.kv_dtype} {type(backend).__name__}: out {rms:.2e} and {its:.2e}, "
                f"{ratio:.3f}; lse {lse:.1e} and {its_lse:.1e}",
                flush=True,
            )
    print(f"at most {worst:.3f} times the twin's")


if __name__ == "__main__":
    report(*map(int, sys.argv[1:]))
