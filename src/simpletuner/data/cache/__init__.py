"""Disk caches of the encoders' results. The key is a hash of everything that a result depends on."""
