"""Proof that an installation computes on its GPUs what a CPU computes, and how fast: what `tools/check_gpu.py` does.

`plan.py` holds the sizes and `stages.py` the cases of each stage. `runner.py` has them answered in processes that
`worlds.py` starts, by the functions in `work/`, and keeps to the time there is; `outcomes.py` writes what they found.
"""
