"""Measurements of sora_kernels against what it replaces; README.md says how to run them."""
