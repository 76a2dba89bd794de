"""The batches that training draws: digits, or images on disk, varied, cached and sent to the device."""
