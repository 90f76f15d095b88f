"""Tests, mirroring the packages; shared helpers are `tests.oracles` etc."""
