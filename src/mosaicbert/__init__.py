"""Pre-training and fine-tuning of BERT encoders, fast and strict."""
