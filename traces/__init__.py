"""Recorded Steps, for training predictors, replaying runs and looking at what routers do."""
