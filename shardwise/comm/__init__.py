"""Ranks that talk: the mesh, one process group for every axis, collectives, fixed-tree sums."""
