"""Families of problems, a file for each kind."""
