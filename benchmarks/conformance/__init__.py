"""Checks on recorded vectors that `sdm` computes what the public implementation computed."""
