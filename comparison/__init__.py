"""A bundle beside other methods of uncertainty and selective answering, on the same states, halves and test rows."""
