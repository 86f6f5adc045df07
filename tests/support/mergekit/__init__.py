"""Configurations that mergekit and mergeloom both run, and the program that runs mergekit."""
