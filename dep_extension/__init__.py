"""Disaggregated expert parallelism: attention on one group of GPUs, experts on another."""
