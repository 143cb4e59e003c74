"""From labelled data to a bundle, and how good it is."""
