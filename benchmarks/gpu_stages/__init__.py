"""The stages of benchmarks/gpu.py, one file each; `Stage` (report.py) says what a stage is given."""
