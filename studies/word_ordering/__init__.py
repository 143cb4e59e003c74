"""What SDM fine-tuning does to the share of answers inside the region: arXiv 2510.26183's experiment, small."""
