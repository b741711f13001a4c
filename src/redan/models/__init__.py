"""Networks: images in [0, 1] to logits, with their normalisation as first layer."""
