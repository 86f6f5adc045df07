"""Recovers an interrupted merge: the journal, the shards and the sources it used."""
