"""The parts of `tools/build_samples.py`: packages, volumes, stills, questions, facts, the data card."""
