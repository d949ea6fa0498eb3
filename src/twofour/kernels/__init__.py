"""CUDA kernels, one folder a family; each family is one contract: Problem, Config, candidates, why_not, launch."""
