"""Scheduling policies, one technique a file: who goes first, and how a step is divided."""
