"""Puts a load of conversations on any OpenAI-compatible server, and compares such runs.

`kvbm bench chat` is the load, `kvbm bench compare` the comparison.
"""
