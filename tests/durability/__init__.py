"""Kills, faults, races, hostile input and fuzzing."""
