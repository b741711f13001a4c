"""Ways to train, each a file that reads like its paper."""
