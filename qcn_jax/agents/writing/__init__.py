"""Data that a model writes and checks bear out: pages rewritten, questions on documents, rankings of answers."""
