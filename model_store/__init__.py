"""Bundles: everything needed to score one served model, as one verified directory."""
