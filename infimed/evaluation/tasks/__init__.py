"""Benchmarks, one a file, all over `contracts.Task`."""
