"""Fine-tunes a pretrained language model into an SDM language model (arXiv 2510.26183)."""
