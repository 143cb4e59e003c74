"""Does `sdm` compute what the public implementation computed? Recorded vectors say."""
