"""Kills, power failures, full disks and damaged files."""
