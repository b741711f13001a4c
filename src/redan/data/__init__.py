"""Images in: data sets, augmentation, batches."""
