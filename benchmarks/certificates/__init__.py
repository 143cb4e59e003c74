"""Whether certificates keep their word, over many redraws of everything."""
