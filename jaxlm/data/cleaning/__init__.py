"""Cleaning: documents in, fewer and better documents out, and a count of what every rule did (docs/cleaning.md)."""
