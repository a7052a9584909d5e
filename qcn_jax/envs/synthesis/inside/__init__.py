"""The script that synthesis runs inside a sandbox; plain standard library, sent there as text."""
