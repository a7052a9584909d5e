"""Problems that one answer solves: programs, functions, queries, secure code, texts under constraints.

A problem is a Task whose `checks` decide instead of pytest (`schema`), so that whatever plays tasks plays problems.
What an answer should give stays on the host: a sandbox sees one test's input at a time, and its output is compared
outside (`check`).
"""
