"""What a fine-tuned or pre-trained model says of texts: of a file, or of validation data."""
