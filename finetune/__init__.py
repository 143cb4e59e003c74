"""From a pretrained language model to one whose answers can be judged (arXiv 2510.26183)."""
