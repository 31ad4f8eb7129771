"""Predictors of the experts that come next. Empty so far: decode fetches on demand."""
