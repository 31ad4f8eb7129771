"""Recorded Steps, for training predictors and replaying runs. Empty so far."""
