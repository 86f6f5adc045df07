"""Tests of tensor names: renamed ones, and those of parts with other prefixes."""
