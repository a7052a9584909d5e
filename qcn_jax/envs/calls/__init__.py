"""Requests that calls of tools answer, where the tools are a user's own: JSON-schema functions in the system prompt.

Rows of files (`schema`) or made here (`make`); whether an answer is right (`check`) follows from its text, and nothing
is executed.
"""
