"""Attacks that measure what a claim of privacy is worth."""
