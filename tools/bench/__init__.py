"""The parts of `tools/bench_pipeline.py`: contenders, their measurement and what it means."""
