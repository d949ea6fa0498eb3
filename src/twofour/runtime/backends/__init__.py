"""Backends, one file each; a backend's library is imported when it is used."""
