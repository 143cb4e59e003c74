"""Makes a bundle from labelled data, and measures how good it is."""
