"""Prompt sets of `duoserve bench`: data, no code. See README.md for sources and licences."""
